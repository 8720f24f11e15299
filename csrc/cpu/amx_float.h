// Attention in float32 by AMX's bf16 products.
//
// A float32 number is the sum of three bf16 numbers, x = x0 + x1 + x2, each the rounding of what the ones before leave: 24 bits.
// Of the nine products of two such sums the six of x0y0, x0y1, x1y0, x1y1, x0y2, x2y0 matter; the others are as small as a
// float32's rounding. Sums are float32, and small products are added first, so that the error is that of float32 arithmetic; six
// bf16 products take less than half of the time of a float32 one. (Henry, Tang and Heinecke, arXiv 1904.06376.)
#pragma once

#include "amx.h"

namespace ebr::cpu {
namespace {

constexpr int PARTS = 3;
constexpr int FLOAT_KEYS = 128;  // whose logits are made before they are used
constexpr int GROUP = 4;         // blocks of queries that meet a block of keys in turn, while it lies in the second cache
constexpr int64_t FEWEST_KEYS = 64;

// Two vectors as pairs of bf16, in three parts.
INLINE void split(V low, V high, __m512i interleave, __m512i (&parts)[PARTS]) {
    for (int i = 0; i < PARTS; ++i) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        parts[i] = _mm512_permutexvar_epi16(interleave, both);
        low -= (V)((U)parts[i] << 16);
        high -= (V)((U)parts[i] & 0xffff0000u);
    }
}

// 16 rows of 16 numbers from x on, transposed; rows past `count` are zero.
INLINE void load_columns(const float* x, int64_t stride, int64_t count, __m512i (&r)[16]) {
    for (int i = 0; i < 16; ++i) r[i] = i < count ? _mm512_loadu_si512(x + i * stride) : _mm512_setzero_si512();
    transpose(r);
}

// A head's keys [PARTS][padded][width], and values [steps of STEP keys][PARTS][width][STEP].
void pack_float(const Attention& a, int64_t b, int64_t h, int64_t padded, bf16* k, bf16* v) {
    const Branch& branch = a.branches[0];
    const int width = a.width;
    for (int64_t n = 0; n < padded; ++n)
        for (int d = 0; d < width; d += W) {
            V x = n < branch.keys ? load(at<float>(branch.k, b, h, n) + d) : V{};
            for (int i = 0; i < PARTS; ++i) {
                bf16* to = k + (i * padded + n) * width + d;
                store(to, x);
                x -= load(to);
            }
        }
    for (int64_t n = 0; n < padded; n += STEP)
        for (int half = 0; half < 2; ++half)
            for (int d = 0; d < width; d += 16) {
                const int64_t first = n + 16 * half;
                __m512i columns[16];
                load_columns(at<float>(branch.v, b, h, first) + d, branch.v.token, branch.keys - first, columns);
                for (int c = 0; c < 16; ++c) {
                    V x = (V)columns[c];
                    for (int i = 0; i < PARTS; ++i) {
                        bf16* to = v + ((n / STEP * PARTS + i) * width + d + c) * STEP + 16 * half;
                        store(to, x);
                        x -= load(to);
                    }
                }
            }
}

INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void load_left(const bf16* a, int64_t stride) {
    _tile_loadd(4, a, stride);
    _tile_loadd(5, reinterpret_cast<const char*>(a) + 16 * stride, stride);
}
INLINE void load_right(const bf16* b) {
    _tile_loadd(6, b, 4 * QUERIES);
    _tile_loadd(7, b + 32, 4 * QUERIES);
}
INLINE void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// Tiles 0 to 3: 32 rows of a times 32 columns of b, each of `steps` tiles and in parts; small products first.
INLINE void multiply_parts(const bf16* a, int64_t stride, int64_t a_part, int64_t a_step, const bf16* b, int64_t b_part,
                           int64_t b_step, int steps) {
    zero_sums();
    for (int i = 0; i < steps; ++i) {  // each product shares a factor with the one before
        const bf16 *x = a + i * a_step, *y = b + i * b_step;
        load_left(x + 2 * a_part, stride), load_right(y), multiply();
        load_left(x + a_part, stride), multiply();
        load_right(y + b_part), multiply();
        load_left(x, stride), multiply();
        load_right(y + 2 * b_part), multiply();
    }
    for (int i = 0; i < steps; ++i) {
        load_left(a + i * a_step, stride), load_right(b + i * b_step), multiply();
    }
}

// What a block of queries keeps between blocks of keys.
struct State {
    bf16* q;     // [PARTS][pairs of dims][QUERIES][2]
    float* out;  // [width][QUERIES]
    V largest[2], sums[2];
};

void float_step(const Attention& a, State& state, const bf16* k, const bf16* v, int64_t padded, int keys, float* s, bf16* p,
                float* fresh) {
    const int width = a.width, steps = (keys + STEP - 1) / STEP;
    const __m512i interleave = by_pairs();
    written();
    for (int i = 0; i < steps; ++i) {
        multiply_parts(k + i * STEP * width, 2 * width, padded * width, STEP, state.q, width * QUERIES, STEP * QUERIES, width / STEP);
        store_sums(s + i * STEP * QUERIES);
    }
    written();
    V most[2] = {state.largest[0], state.largest[1]}, shrink[2];
    for (int i = 0; i < keys; ++i)
        for (int j = 0; j < 2; ++j) most[j] = larger(load(s + i * QUERIES + j * W), most[j]);
    for (int i = keys; i < steps * STEP; ++i)
        for (int j = 0; j < 2; ++j) store(s + i * QUERIES + j * W, all(-std::numeric_limits<float>::infinity()));
    for (int j = 0; j < 2; ++j) {
        shrink[j] = exp2<true>(state.largest[j] - most[j]);
        state.largest[j] = most[j];
        state.sums[j] *= shrink[j];
    }
    for (int i = 0; i < steps * STEP; i += 2)
        for (int j = 0; j < 2; ++j) {
            const V p0 = exp2<true>(load(s + i * QUERIES + j * W) - most[j]);
            const V p1 = exp2<true>(load(s + (i + 1) * QUERIES + j * W) - most[j]);
            state.sums[j] += p0 + p1;
            __m512i parts[PARTS];
            split(p0, p1, interleave, parts);
            for (int n = 0; n < PARTS; ++n) _mm512_store_si512(p + (n * FLOAT_KEYS + i) * QUERIES + 2 * j * W, parts[n]);
        }
    written();
    for (int d = 0; d < width; d += 32) {
        multiply_parts(v + d * STEP, 2 * STEP, width * STEP, PARTS * width * STEP, p, FLOAT_KEYS * QUERIES, STEP * QUERIES, steps);
        store_sums(fresh);
        written();
        for (int i = 0; i < 32; ++i)
            for (int j = 0; j < 2; ++j) {
                float* o = state.out + (d + i) * QUERIES + j * W;
                store(o, load(o) * shrink[j] + load(fresh + i * QUERIES + j * W));
            }
    }
}

void float_attend(const Attention& a, const bf16* k, const bf16* v, int64_t padded, int64_t b, int64_t h, int64_t first) {
    const int width = a.width;
    const size_t query = sizeof(bf16) * PARTS * width * QUERIES, sums = sizeof(float) * width * QUERIES;
    const size_t logits = sizeof(float) * FLOAT_KEYS * QUERIES, fresh = sizeof(float) * 32 * QUERIES;
    char* memory = static_cast<char*>(room(Use::part, GROUP * (query + sums) + logits * 5 / 2 + fresh));
    float* s = reinterpret_cast<float*>(memory + GROUP * (query + sums));
    bf16* p = reinterpret_cast<bf16*>(s + FLOAT_KEYS * QUERIES);
    float* added = reinterpret_cast<float*>(p + PARTS * FLOAT_KEYS * QUERIES);
    State states[GROUP];
    int blocks = 0;
    const V scale = all(a.scale * LOG2E);
    const __m512i interleave = by_pairs();
    for (; blocks < GROUP && first + blocks * QUERIES < a.queries; ++blocks) {
        State& state = states[blocks];
        state.q = reinterpret_cast<bf16*>(memory + blocks * (query + sums));
        state.out = reinterpret_cast<float*>(memory + blocks * (query + sums) + query);
        std::memset(state.out, 0, sums);
        for (int j = 0; j < 2; ++j) {
            state.largest[j] = all(-std::numeric_limits<float>::max());
            state.sums[j] = V{};
            const int64_t start = first + blocks * QUERIES + 16 * j;
            for (int d = 0; d < width; d += 16) {
                __m512i columns[16], parts[PARTS];
                load_columns(at<float>(a.q, b, h, start) + d, a.q.token, a.queries - start, columns);
                for (int i = 0; i < 16; i += 2) {
                    split((V)columns[i] * scale, (V)columns[i + 1] * scale, interleave, parts);
                    for (int n = 0; n < PARTS; ++n)
                        _mm512_store_si512(state.q + (n * width + d + i) * QUERIES + 2 * j * W, parts[n]);
                }
            }
        }
    }
    const int64_t all_keys = a.branches[0].keys;
    for (int64_t start = 0; start < all_keys; start += FLOAT_KEYS) {
        const int keys = static_cast<int>(all_keys - start < FLOAT_KEYS ? all_keys - start : FLOAT_KEYS);
        for (int i = 0; i < blocks; ++i)
            float_step(a, states[i], k + start * width, v + start * PARTS * width, padded, keys, s, p, added);
    }
    for (int n = 0; n < blocks; ++n)
        for (int j = 0; j < 2; ++j) {
            const V by = a.branches[0].weight / states[n].sums[j];
            const int64_t start = first + n * QUERIES + 16 * j;
            for (int d = 0; d < width; d += 16) {
                __m512i columns[16];
                for (int i = 0; i < 16; ++i) columns[i] = (__m512i)(load(states[n].out + (d + i) * QUERIES + j * W) * by);
                transpose(columns);
                for (int i = 0; i < 16 && start + i < a.queries; ++i)
                    _mm512_storeu_si512(const_cast<float*>(at<float>(a.out, b, h, start + i)) + d, columns[i]);
            }
        }
}

bool float_attention(const Attention& a) {
    if (a.log_sums || a.width % 32 || a.width > LARGEST_HEAD || a.count != 1 || a.branches[0].bias || a.branches[0].keys < FEWEST_KEYS)
        return attention(a);
    const int64_t padded = (a.branches[0].keys + STEP - 1) / STEP * STEP, size = padded * a.width * PARTS;
    const int64_t pairs = a.batch * a.heads;
    bf16* packed = static_cast<bf16*>(room(Use::packed, pairs * size * 2 * sizeof(bf16)));
    spread(pairs, a.threads, [&](int64_t i) {
        bf16* k = packed + i * size * 2;
        pack_float(a, i / a.heads, i % a.heads, padded, k, k + size);
    });
    const int64_t groups = (a.queries + GROUP * QUERIES - 1) / (GROUP * QUERIES);
    spread(pairs * groups, a.threads, [&](int64_t i) {
        static const TileConfig config;
        _tile_loadconfig(&config);
        const int64_t pair = i / groups;
        const bf16* k = packed + pair * size * 2;
        float_attend(a, k, k + size, padded, pair / a.heads, pair % a.heads, i % groups * GROUP * QUERIES);
        _tile_release();
    });
    return true;
}

}  // namespace
}  // namespace ebr::cpu
