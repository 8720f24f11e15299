// Attention in bf16 by AMX's tile products, float32 sums; built like attention.h, over tiles of 16 x 16.
//
// logits (keys x queries) = K (16 keys x 32 dims, as they lie) · Qᵀ (pairs of dims x queries)
// output (dims x queries) = Vᵀ (16 dims x 32 keys, laid out once for all queries) · P (pairs of keys x queries)
#pragma once

#include "attention.h"

namespace ebr::cpu {
namespace {

constexpr int QUERIES = 32;     // two tiles
constexpr int STEP = 32;        // keys of a tile product
constexpr int AMX_KEYS = 256;   // whose logits are made before they are used
constexpr float BOUND = 60.f;   // of a logit to base 2, below which no likelihood underflows without the running maximum

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = 16;
    }
};

// A branch's keys and values of one head: K [keys][width], V by steps [width][STEP]; keys padded with zeros to whole steps.
struct Packed {
    const bf16 *k, *v;
    float largest;  // norm of a key
};

void pack(const Attention& a, const Branch& branch, int64_t b, int64_t h, bf16* k, bf16* v, float* largest) {
    const int width = a.width;
    const int64_t padded = (branch.keys + STEP - 1) / STEP * STEP;
    V most{};
    for (int64_t n = 0; n < padded; ++n) {
        if (n >= branch.keys) {
            std::memset(k + n * width, 0, sizeof(bf16) * width);
            continue;
        }
        const bf16* x = at<bf16>(branch.k, b, h, n);
        V squares{};
        for (int d = 0; d < width; d += W) {
            const V y = load(x + d);
            squares += y * y;
        }
        std::memcpy(k + n * width, x, sizeof(bf16) * width);
        most = larger(most, all(sum(squares)));
    }
    *largest = std::sqrt(most[0]);
    // 32 keys by pairs of dims, then the pairs' halves apart: two rows of Vᵀ.
    alignas(64) uint16_t even[32], odd[32];
    for (int i = 0; i < 32; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const __m512i evens = _mm512_load_si512(even), odds = _mm512_load_si512(odd);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(branch.v.token * 2)));
    for (int64_t n = 0; n < padded; n += STEP, v += STEP * width) {
        const int64_t left = branch.keys - n;
        const __mmask16 low = left >= 16 ? 0xffff : (1u << left) - 1;
        const __mmask16 high = left >= 32 ? 0xffff : left <= 16 ? 0 : (1u << (left - 16)) - 1;
        for (int d = 0; d < width; d += 2) {
            const bf16* x = at<bf16>(branch.v, b, h, n) + d;
            const __m512i zero = _mm512_setzero_si512();
            const __m512i first = _mm512_mask_i32gather_epi32(zero, low, offsets, x, 1);
            const __m512i second = _mm512_mask_i32gather_epi32(zero, high, offsets, x + 16 * branch.v.token, 1);
            _mm512_storeu_si512(v + d * STEP, _mm512_permutex2var_epi16(first, evens, second));
            _mm512_storeu_si512(v + (d + 1) * STEP, _mm512_permutex2var_epi16(first, odds, second));
        }
    }
}

// Logits of STEP keys with 32 queries, to s [STEP][QUERIES].
INLINE void amx_logits(const bf16* k, const bf16* q, int width, float* s) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < width; d += 32) {
        _tile_loadd(6, q + d * QUERIES, 4 * QUERIES);
        _tile_loadd(7, q + d * QUERIES + 32, 4 * QUERIES);
        _tile_loadd(4, k + d, 2 * width);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, k + 16 * width + d, 2 * width);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, s, 4 * QUERIES);
    _tile_stored(1, s + 16, 4 * QUERIES);
    _tile_stored(2, s + 16 * QUERIES, 4 * QUERIES);
    _tile_stored(3, s + 16 * QUERIES + 16, 4 * QUERIES);
}

// Products of 32 dims with all of a block's likelihoods, to o [32][QUERIES].
INLINE void amx_mix(const bf16* v, const bf16* p, int steps, int width, float* o) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < steps; ++i, v += STEP * width, p += STEP * QUERIES) {
        _tile_loadd(6, p, 4 * QUERIES);
        _tile_loadd(7, p + 32, 4 * QUERIES);
        _tile_loadd(4, v, 2 * STEP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, v + 16 * STEP, 2 * STEP);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, o, 4 * QUERIES);
    _tile_stored(1, o + 16, 4 * QUERIES);
    _tile_stored(2, o + 16 * QUERIES, 4 * QUERIES);
    _tile_stored(3, o + 16 * QUERIES + 16, 4 * QUERIES);
}

void amx_attend(const Attention& a, const Packed* packed, int64_t b, int64_t h, int64_t first) {
    constexpr int c = QUERIES / W;
    const int width = a.width;
    const int64_t count = a.queries - first < QUERIES ? a.queries - first : QUERIES;
    float* s = static_cast<float*>(room(Use::part, sizeof(float) * QUERIES * (AMX_KEYS * 3 / 2 + width * 7 / 2)));
    float *out = s + AMX_KEYS * QUERIES, *total = out + width * QUERIES, *fresh = total + width * QUERIES;
    bf16 *p = reinterpret_cast<bf16*>(fresh + width * QUERIES), *q = p + AMX_KEYS * QUERIES;
    const float scale = a.scale * LOG2E;

    // Qᵀ by pairs of dims, and the norms of the queries.
    const uint32_t* pairs[QUERIES];
    for (int64_t i = 0; i < QUERIES; ++i)
        pairs[i] = reinterpret_cast<const uint32_t*>(at<bf16>(a.q, b, h, first + (i < count ? i : 0)));
    alignas(64) float norms[QUERIES] = {};
    for (int d = 0; d < width / 2; ++d)
        for (int i = 0; i < QUERIES; ++i) {
            uint32_t x;
            std::memcpy(&x, pairs[i] + d, sizeof x);
            std::memcpy(q + (d * QUERIES + i) * 2, &x, sizeof x);
        }
    for (int d = 0; d < width; d += 2)
        for (int j = 0; j < QUERIES; j += W) {
            U u;
            std::memcpy(&u, q + d * QUERIES + 2 * j, sizeof u);
            const V low = (V)(u << 16), high = (V)(u & 0xffff0000u);
            store(norms + j, load(norms + j) + low * low + high * high);
        }
    float longest = 0;
    for (int i = 0; i < QUERIES; ++i) longest = norms[i] > longest || norms[i] != norms[i] ? norms[i] : longest;
    longest = std::sqrt(longest) * scale;

    alignas(64) static const uint16_t by_pairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i ones = _mm512_set1_epi16(0x3f80), interleave = _mm512_load_si512(by_pairs);
    for (int n = 0; n < a.count; ++n) {
        const Branch& branch = a.branches[n];
        const Packed& kv = packed[n];
        // |q·k| ≤ |q||k|: where that bound is small, it serves as the maximum, and nothing has to be scaled again. NaN: not so.
        const float bound = longest * kv.largest;
        const bool bounded = bound <= BOUND && !branch.bias;
        V largest[c], sums[c];
        for (int j = 0; j < c; ++j) largest[j] = all(bounded ? bound : -std::numeric_limits<float>::max()), sums[j] = V{};
        std::memset(out, 0, sizeof(float) * QUERIES * width);
        for (int64_t start = 0; start < branch.keys; start += AMX_KEYS) {
            const int keys = static_cast<int>(branch.keys - start < AMX_KEYS ? branch.keys - start : AMX_KEYS);
            const int steps = (keys + STEP - 1) / STEP;
            for (int i = 0; i < steps; ++i) amx_logits(kv.k + (start + i * STEP) * width, q, width, s + i * STEP * QUERIES);
            for (int i = keys; i < steps * STEP; ++i)
                for (int j = 0; j < c; ++j) store(s + (i * c + j) * W, all(-std::numeric_limits<float>::infinity()));
            V shrink[c];
            if (!bounded) {
                if (branch.bias)
                    for (int i = 0; i < keys; ++i)
                        for (int j = 0; j < c; ++j) {
                            float* x = s + (i * c + j) * W;
                            store(x, load(x) + reinterpret_cast<const float*>(branch.bias)[start + i] / a.scale);
                        }
                for (int j = 0; j < c; ++j) {
                    V most = all(-std::numeric_limits<float>::max());
                    for (int i = 0; i < keys; ++i) most = larger(load(s + (i * c + j) * W), most);
                    most = larger(most * scale, largest[j]);
                    shrink[j] = exp2<true>(largest[j] - most);
                    largest[j] = most;
                    sums[j] *= shrink[j];
                }
            }
            for (int i = 0; i < steps * STEP; i += 2)
                for (int j = 0; j < c; ++j) {
                    const V p0 = exp2<false>(load(s + (i * c + j) * W) * scale - largest[j]);
                    const V p1 = exp2<false>(load(s + ((i + 1) * c + j) * W) * scale - largest[j]);
                    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0);
                    const __m512i paired = _mm512_permutexvar_epi16(interleave, both);
                    // The sum of what was rounded: likelihoods that are alike are all rounded to the same side.
                    sums[j] = (V)_mm512_dpbf16_ps((__m512)sums[j], (__m512bh)paired, (__m512bh)ones);
                    _mm512_store_si512(p + (i * c + 2 * j) * W, paired);
                }
            for (int d = 0; d < width; d += 32)
                amx_mix(kv.v + start * width + d * STEP, p, steps, width, fresh + d * QUERIES);
            for (int d = 0; d < width; ++d)
                for (int j = 0; j < c; ++j) {
                    float* o = out + (d * c + j) * W;
                    const V add = load(fresh + (d * c + j) * W);
                    store(o, bounded ? load(o) + add : load(o) * shrink[j] + add);
                }
        }
        for (int j = 0; j < c; ++j) {
            const V by = branch.weight / sums[j];
            for (int d = 0; d < width; ++d) {
                float *x = out + (d * c + j) * W, *y = total + (d * c + j) * W;
                store(y, n ? load(x) * by + load(y) : load(x) * by);
            }
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        bf16* x = const_cast<bf16*>(at<bf16>(a.out, b, h, first + i));
        for (int d = 0; d < width; ++d) set(x + d, total[d * QUERIES + i]);
    }
}

bool amx_attention(const Attention& a) {
    if (a.dtype != Dtype::bfloat16 || a.width % 32 || a.width > LARGEST_HEAD) return attention(a);
    for (int n = 0; n < a.count; ++n)
        if (a.branches[n].keys < 1) return attention(a);
    // Keys and values of every branch and head, once for all queries.
    const int64_t pairs = a.batch * a.heads;
    size_t size = 0;
    for (int n = 0; n < a.count; ++n) size += (a.branches[n].keys + STEP - 1) / STEP * STEP * a.width * 2;
    char* memory = static_cast<char*>(room(Use::packed, pairs * (size * sizeof(bf16) + a.count * sizeof(Packed))));
    bf16* keys = reinterpret_cast<bf16*>(memory);
    Packed* packed = reinterpret_cast<Packed*>(memory + pairs * size * sizeof(bf16));
    spread(pairs, a.threads, [&](int64_t i) {
        bf16* k = keys + i * size;
        for (int n = 0; n < a.count; ++n) {
            const size_t part = (a.branches[n].keys + STEP - 1) / STEP * STEP * a.width;
            Packed& one = packed[i * a.count + n];
            one.k = k;
            one.v = k + part;
            pack(a, a.branches[n], i / a.heads, i % a.heads, k, k + part, &one.largest);
            k += 2 * part;
        }
    });
    const int64_t blocks = (a.queries + QUERIES - 1) / QUERIES;
    spread(pairs * blocks, a.threads, [&](int64_t i) {
        static const TileConfig config;
        _tile_loadconfig(&config);
        const int64_t pair = i / blocks;
        amx_attend(a, packed + pair * a.count, pair / a.heads, pair % a.heads, i % blocks * QUERIES);
        _tile_release();
    });
    return true;
}

}  // namespace
}  // namespace ebr::cpu
