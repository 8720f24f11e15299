// The gradient of a linear layer's weight and bias in bf16 by AMX's tile products, float32 sums: dW = gᵀ x, db = gᵀ 1.
//
// dW (outputs x inputs) = gᵀ (16 outputs x 32 rows, laid out anew) · x (pairs of rows x inputs), some rows at a time, whose share
// of both operands lies in the second cache beside the sums. The library's products lay the same out once for each of their blocks.
#pragma once

#include "amx.h"

namespace ebr::cpu {
namespace {

constexpr int64_t TAKEN = 256;              // rows whose products are added at a time
constexpr int64_t SQUARE = 32;              // outputs, and inputs, of a block of sums: two tiles
constexpr int64_t LONGEST = 512;            // outputs, and inputs, whose sums are made at a time
constexpr int64_t PANEL_SIZE = TAKEN * SQUARE;

// The sums of some outputs and inputs, which are multiples of SQUARE.
struct Region {
    int64_t output, outputs, input, inputs;
};

// Rows `first` to first + STEP of g, those from `count` on as zeros, as [outputs / SQUARE] panels of [SQUARE][STEP].
void lay_gradient(const WeightGradient& a, const Region& part, int64_t first, int64_t count, bf16* to) {
    alignas(64) uint16_t even[32], odd[32];
    for (int i = 0; i < 32; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const __m512i evens = _mm512_load_si512(even), odds = _mm512_load_si512(odd);
    const bf16* g = reinterpret_cast<const bf16*>(a.gradient) + first * a.outputs + part.output;
    for (int64_t d = 0; d < part.outputs; d += SQUARE, to += PANEL_SIZE) {
        __m512i low[16], high[16];
        load_pairs(g + d, a.outputs, count, low);
        load_pairs(g + 16 * a.outputs + d, a.outputs, count - 16, high);
        for (int i = 0; i < 16; ++i) {
            _mm512_store_si512(to + 2 * i * STEP, _mm512_permutex2var_epi16(low[i], evens, high[i]));
            _mm512_store_si512(to + (2 * i + 1) * STEP, _mm512_permutex2var_epi16(low[i], odds, high[i]));
        }
    }
}

// The same rows of x by pairs, as [inputs / SQUARE] panels of [STEP / 2][SQUARE pairs].
void lay_inputs(const WeightGradient& a, const Region& part, int64_t first, int64_t count, bf16* to) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) low[i] = i / 2 + i % 2 * 32, high[i] = low[i] + 16;
    const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
    const bf16* x = reinterpret_cast<const bf16*>(a.x) + first * a.inputs + part.input;
    const auto some_of = [&](int64_t n, int64_t d) {
        return n < count ? _mm512_loadu_si512(x + n * a.inputs + d) : _mm512_setzero_si512();
    };
    for (int64_t n = 0; n < STEP; n += 2, to += 2 * SQUARE)
        for (int64_t d = 0; d < part.inputs; d += SQUARE) {
            const __m512i one = some_of(n, d), other = some_of(n + 1, d);
            bf16* there = to + d / SQUARE * PANEL_SIZE;
            _mm512_store_si512(there, _mm512_permutex2var_epi16(one, lows, other));
            _mm512_store_si512(there + SQUARE, _mm512_permutex2var_epi16(one, highs, other));
        }
}

// sums [inputs / SQUARE][SQUARE][SQUARE] += a panel of gᵀ times every panel of x; bias [SQUARE][16] += the same times 1, where wanted.
void add_products(const bf16* g, const bf16* x, int64_t panels, int64_t steps, float* sums, const bf16* ones, float* bias) {
    if (bias) {
        _tile_loadd(0, bias, 64);
        _tile_loadd(1, bias + 16 * 16, 64);
        _tile_loadd(6, ones, 64);
        for (int64_t i = 0; i < steps; ++i) {
            _tile_loadd(4, g + i * SQUARE * STEP, 2 * STEP);
            _tile_loadd(5, g + i * SQUARE * STEP + 16 * STEP, 2 * STEP);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, bias, 64);
        _tile_stored(1, bias + 16 * 16, 64);
    }
    for (int64_t panel = 0; panel < panels; ++panel, sums += SQUARE * SQUARE, x += PANEL_SIZE) {
        float* bottom = sums + 16 * SQUARE;
        _tile_loadd(0, sums, 4 * SQUARE);
        _tile_loadd(1, sums + 16, 4 * SQUARE);
        _tile_loadd(2, bottom, 4 * SQUARE);
        _tile_loadd(3, bottom + 16, 4 * SQUARE);
        for (int64_t i = 0; i < steps; ++i) {
            const bf16 *left = g + i * SQUARE * STEP, *right = x + i * SQUARE * STEP;
            _tile_loadd(4, left, 2 * STEP);
            _tile_loadd(6, right, 4 * SQUARE);
            _tile_loadd(5, left + 16 * STEP, 2 * STEP);
            _tile_loadd(7, right + 32, 4 * SQUARE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 4 * SQUARE);
        _tile_stored(1, sums + 16, 4 * SQUARE);
        _tile_stored(2, bottom, 4 * SQUARE);
        _tile_stored(3, bottom + 16, 4 * SQUARE);
    }
}

void gather_region(const WeightGradient& a, const Region& part) {
    const int64_t down = part.outputs / SQUARE, across = part.inputs / SQUARE;
    const int64_t sums = part.outputs * part.inputs, biases = part.outputs * 16, ones = STEP * 16;
    const size_t halves = TAKEN * (part.outputs + part.inputs) + ones;
    float* memory = static_cast<float*>(room(Use::packed, sizeof(float) * (sums + biases) + sizeof(bf16) * halves));
    float* bias = memory + sums;
    bf16 *g = reinterpret_cast<bf16*>(bias + biases), *x = g + TAKEN * part.outputs, *one = x + TAKEN * part.inputs;
    const bool biased = a.db && part.input == 0;
    std::memset(memory, 0, sizeof(float) * (sums + biases));
    for (int64_t i = 0; i < ones; ++i) one[i] = 0x3f80;
    for (int64_t first = 0; first < a.rows; first += TAKEN) {
        const int64_t rows = std::min(a.rows - first, TAKEN), steps = (rows + STEP - 1) / STEP;
        spread(steps, a.threads, [&](int64_t i) {
            lay_gradient(a, part, first + i * STEP, rows - i * STEP, g + i * SQUARE * STEP);
            lay_inputs(a, part, first + i * STEP, rows - i * STEP, x + i * SQUARE * STEP);
        });
        spread(down, a.threads, [&](int64_t i) {
            static const TileConfig config;
            written();
            _tile_loadconfig(&config);
            add_products(g + i * PANEL_SIZE, x, across, steps, memory + i * across * SQUARE * SQUARE, one,
                         biased ? bias + i * SQUARE * 16 : nullptr);
            _tile_release();
            written();
        });
    }
    spread(down, a.threads, [&](int64_t i) {
        for (int64_t n = 0; n < SQUARE; ++n) {
            const int64_t output = part.output + i * SQUARE + n;
            float* to = reinterpret_cast<float*>(a.dw) + output * a.inputs + part.input;
            const float* from = memory + (i * across * SQUARE + n) * SQUARE;
            for (int64_t panel = 0; panel < across; ++panel, to += SQUARE, from += SQUARE * SQUARE)
                std::memcpy(to, from, sizeof(float) * SQUARE);
            if (biased) reinterpret_cast<float*>(a.db)[output] = bias[(i * SQUARE + n) * 16];
        }
    });
}

bool weight_gradient(const WeightGradient& a) {
    if (a.outputs % SQUARE || a.inputs % SQUARE || a.rows < 1) return false;
    const int64_t outputs = std::min(a.outputs, LONGEST), inputs = std::min(a.inputs, LONGEST);
    for (int64_t output = 0; output < a.outputs; output += outputs)
        for (int64_t input = 0; input < a.inputs; input += inputs)
            gather_region(a, {output, std::min(outputs, a.outputs - output), input, std::min(inputs, a.inputs - input)});
    return true;
}

}  // namespace
}  // namespace ebr::cpu
