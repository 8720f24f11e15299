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

// 16 rows of 32 bf16 from x on, `stride` apart, as 16 pairs of columns; rows past `count` are zero.
INLINE void load_pairs(const bf16* x, int64_t stride, int64_t count, __m512i (&r)[16]) {
    for (int i = 0; i < 16; ++i) r[i] = i < count ? _mm512_loadu_si512(x + i * stride) : _mm512_setzero_si512();
    transpose(r);
}

// A branch's keys and values of one head: K [keys][width], V by steps [width][STEP]; keys padded with zeros to whole steps.
struct Packed {
    const bf16 *k, *v;
    float largest;  // norm of a key
};

void pack(int width, const Branch& branch, int64_t b, int64_t h, bf16* k, bf16* v, float* largest) {
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
    for (int64_t n = 0; n < padded; n += STEP, v += STEP * width)
        for (int d = 0; d < width; d += 32) {
            __m512i first[16], second[16];
            load_pairs(at<bf16>(branch.v, b, h, n) + d, branch.v.token, branch.keys - n, first);
            load_pairs(at<bf16>(branch.v, b, h, n + 16) + d, branch.v.token, branch.keys - n - 16, second);
            for (int i = 0; i < 16; ++i) {
                _mm512_storeu_si512(v + (d + 2 * i) * STEP, _mm512_permutex2var_epi16(first[i], evens, second[i]));
                _mm512_storeu_si512(v + (d + 2 * i + 1) * STEP, _mm512_permutex2var_epi16(first[i], odds, second[i]));
            }
        }
}

// The compiler knows not which memory a tile is loaded from: what was written for it has to be written.
INLINE void written() { asm volatile("" ::: "memory"); }

// Logits of 16 keys with 32 queries, to s [16][QUERIES].
INLINE void amx_logits(const bf16* k, const bf16* q, int width, float* s) {
    _tile_zero(4);
    _tile_zero(5);
    for (int d = 0; d < width; d += 32) {
        _tile_loadd(7, k + d, 2 * width);
        _tile_loadd(6, q + d * QUERIES, 4 * QUERIES);
        _tile_dpbf16ps(4, 7, 6);
        _tile_loadd(6, q + d * QUERIES + 32, 4 * QUERIES);
        _tile_dpbf16ps(5, 7, 6);
    }
    _tile_stored(4, s, 4 * QUERIES);
    _tile_stored(5, s + 16, 4 * QUERIES);
}

// Products of 32 dims with STEP likelihoods, added to tiles 0 to 3.
INLINE void amx_mix(const bf16* v, const bf16* p) {
    _tile_loadd(6, p, 4 * QUERIES);
    _tile_loadd(7, v, 2 * STEP);
    _tile_dpbf16ps(0, 7, 6);
    _tile_loadd(7, v + 16 * STEP, 2 * STEP);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(6, p + 32, 4 * QUERIES);
    _tile_dpbf16ps(3, 7, 6);
    _tile_loadd(7, v, 2 * STEP);
    _tile_dpbf16ps(1, 7, 6);
}

// 32 dims of the output [dims][QUERIES], to and from tiles 0 to 3.
INLINE void load_sums(const float* o) {
    _tile_loadd(0, o, 4 * QUERIES);
    _tile_loadd(1, o + 16, 4 * QUERIES);
    _tile_loadd(2, o + 16 * QUERIES, 4 * QUERIES);
    _tile_loadd(3, o + 16 * QUERIES + 16, 4 * QUERIES);
}
INLINE void store_sums(float* o) {
    _tile_stored(0, o, 4 * QUERIES);
    _tile_stored(1, o + 16, 4 * QUERIES);
    _tile_stored(2, o + 16 * QUERIES, 4 * QUERIES);
    _tile_stored(3, o + 16 * QUERIES + 16, 4 * QUERIES);
}

// Likelihoods of two keys from their logits, by pairs; the sum is of what was rounded: likelihoods that are alike are all
// rounded to the same side.
INLINE void likely(const float* s, float scale, const V (&largest)[2], V (&sums)[2], bf16* p) {
    const __m512i interleave = by_pairs(), ones = _mm512_set1_epi16(0x3f80);
    for (int j = 0; j < 2; ++j) {
        const V p0 = exp2<false>(load(s + j * W) * scale - largest[j]);
        const V p1 = exp2<false>(load(s + QUERIES + j * W) * scale - largest[j]);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0);
        const __m512i paired = _mm512_permutexvar_epi16(interleave, both);
        sums[j] = (V)_mm512_dpbf16_ps((__m512)sums[j], (__m512bh)paired, (__m512bh)ones);
        _mm512_store_si512(p + 2 * j * W, paired);
    }
}

// Where the maximum is known beforehand. Three blocks of keys are at work at a time: the likelihoods of one are made by the
// vector units, while the tile unit makes the next ones' logits and the last ones' products, a few after each other.
void amx_bounded(const Packed& kv, int64_t all_keys, const bf16* q, int width, float scale, const V (&largest)[2], V (&sums)[2],
                 float* s, bf16* p, float* out) {
    const int64_t blocks = (all_keys + AMX_KEYS - 1) / AMX_KEYS, padded = (all_keys + STEP - 1) / STEP;
    constexpr int steps = AMX_KEYS / STEP;
    const auto steps_of = [&](int64_t block) {
        return block < 0 || block >= blocks ? 0 : static_cast<int>(padded - block * steps < steps ? padded - block * steps : steps);
    };
    const auto logits_of = [&](int64_t step, int half) {
        if (step >= padded) return;
        float* to = s + (step & 1) * STEP * QUERIES + half * 16 * QUERIES;
        amx_logits(kv.k + (step * STEP + half * 16) * width, q, width, to);
        for (int64_t i = all_keys - step * STEP - half * 16; i < 16; ++i)
            if (i >= 0)
                for (int j = 0; j < 2; ++j) store(to + i * QUERIES + j * W, all(-std::numeric_limits<float>::infinity()));
    };
    logits_of(0, 0);
    logits_of(0, 1);
    for (int64_t block = 0; block <= blocks; ++block) {
        const int now = steps_of(block), before = steps_of(block - 1);
        const bf16* p_before = p + ((block - 1) & 1) * AMX_KEYS * QUERIES;
        bf16* p_now = p + (block & 1) * AMX_KEYS * QUERIES;
        // Products of the block before: width/32 passes of `before` tile steps, some in each step of this one.
        const int passes = width / 32, work = passes * before;
        int done = 0;
        const auto mixed = [&](int until) {
            for (; done < until; ++done) {
                const int pass = done / before, i = done % before;
                if (i == 0) load_sums(out + pass * 32 * QUERIES);
                amx_mix(kv.v + ((block - 1) * steps + i) * STEP * width + pass * 32 * STEP, p_before + i * STEP * QUERIES);
                if (i == before - 1) store_sums(out + pass * 32 * QUERIES);
            }
        };
        for (int i = 0; i < now; ++i) {
            const int64_t step = block * steps + i;
            const float* from = s + (step & 1) * STEP * QUERIES;
            bf16* to = p_now + i * STEP * QUERIES;
            written();
            for (int part = 0; part < 4; ++part) {  // of 8 keys
                if (part < 2)
                    logits_of(step + 1, part);
                else
                    mixed(work * (2 * i + part - 1) / (2 * now));
                for (int n = part * 8; n < part * 8 + 8; n += 2) likely(from + n * QUERIES, scale, largest, sums, to + n * QUERIES);
            }
        }
        written();
        mixed(work);
    }
}

// In blocks of keys, whose maximum is known when all of their logits are.
void amx_searched(const Packed& kv, const Branch& branch, const bf16* q, int width, float scale,
                  V (&largest)[2], V (&sums)[2], float* s, bf16* p, float* out) {
    const float* bias = branch.bias ? reinterpret_cast<const float*>(branch.bias) : nullptr;
    for (int64_t start = 0; start < branch.keys; start += AMX_KEYS) {
        const int keys = static_cast<int>(branch.keys - start < AMX_KEYS ? branch.keys - start : AMX_KEYS);
        const int steps = (keys + STEP - 1) / STEP;
        for (int i = 0; i < 2 * steps; ++i) amx_logits(kv.k + (start + i * 16) * width, q, width, s + i * 16 * QUERIES);
        V most[2] = {largest[0], largest[1]};
        for (int i = 0; i < steps * STEP; ++i)
            for (int j = 0; j < 2; ++j) {
                float* x = s + i * QUERIES + j * W;
                V logit = load(x) * scale;
                if (bias && i < keys) logit += bias[start + i] * LOG2E;
                if (i >= keys) logit = all(-std::numeric_limits<float>::infinity());
                most[j] = larger(logit, most[j]);
                store(x, logit);
            }
        for (int j = 0; j < 2; ++j) {
            const V shrink = exp2<true>(largest[j] - most[j]);
            largest[j] = most[j];
            sums[j] *= shrink;
            for (int d = 0; d < width; ++d) store(out + d * QUERIES + j * W, load(out + d * QUERIES + j * W) * shrink);
        }
        for (int i = 0; i < steps * STEP; i += 2) likely(s + i * QUERIES, 1.f, largest, sums, p + i * QUERIES);
        written();
        for (int d = 0; d < width; d += 32) {
            load_sums(out + d * QUERIES);
            for (int i = 0; i < steps; ++i) amx_mix(kv.v + (start + i * STEP) * width + d * STEP, p + i * STEP * QUERIES);
            store_sums(out + d * QUERIES);
        }
    }
}

// QUERIES rows from `first` on, `count` of which are there, by pairs of dims [width / 2][QUERIES]; and the squares of their norms.
void by_dims(const Heads& rows, int64_t b, int64_t h, int64_t first, int64_t count, int width, bf16* to, V (&norms)[2]) {
    for (int j = 0; j < 2; ++j)
        for (int d = 0; d < width; d += 32) {
            __m512i pairs[16];
            load_pairs(at<bf16>(rows, b, h, first + 16 * j) + d, rows.token, count - 16 * j, pairs);
            for (int i = 0; i < 16; ++i) {
                _mm512_store_si512(to + (d + 2 * i) * QUERIES + 2 * j * W, pairs[i]);
                const V low = (V)((U)pairs[i] << 16), high = (V)((U)pairs[i] & 0xffff0000u);
                norms[j] += low * low + high * high;
            }
        }
}

// Sums [width][QUERIES] as rows in bf16.
void store_rows(const float* sums, const Heads& to, int64_t b, int64_t h, int64_t first, int64_t count, int width) {
    for (int j = 0; j < 2; ++j)
        for (int d = 0; d < width; d += 32) {
            __m512i pairs[16];
            for (int i = 0; i < 16; ++i) {
                const float* y = sums + (d + 2 * i) * QUERIES + j * W;
                const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)load(y));
                const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)load(y + QUERIES));
                pairs[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            }
            transpose(pairs);
            for (int i = 0; i < 16 && 16 * j + i < count; ++i)
                _mm512_storeu_si512(const_cast<bf16*>(at<bf16>(to, b, h, first + 16 * j + i)) + d, pairs[i]);
        }
}

void amx_attend(const Attention& a, const Packed* packed, int64_t b, int64_t h, int64_t first) {
    const int width = a.width;
    const int64_t count = a.queries - first < QUERIES ? a.queries - first : QUERIES;
    float* s = static_cast<float*>(room(Use::part, sizeof(float) * QUERIES * (2 * AMX_KEYS + width * 5 / 2)));
    float *out = s + AMX_KEYS * QUERIES, *total = out + width * QUERIES;
    bf16 *p = reinterpret_cast<bf16*>(total + width * QUERIES), *q = p + 2 * AMX_KEYS * QUERIES;
    const float scale = a.scale * LOG2E;

    V norms[2] = {};
    by_dims(a.q, b, h, first, count, width, q, norms);
    float longest = 0;
    for (int j = 0; j < 2; ++j)
        for (int i = 0; i < W; ++i) longest = norms[j][i] > longest || norms[j][i] != norms[j][i] ? norms[j][i] : longest;
    longest = std::sqrt(longest) * scale;
    written();

    for (int n = 0; n < a.count; ++n) {
        const Branch& branch = a.branches[n];
        // |q·k| ≤ |q||k|: where that bound is small, it serves as the maximum, and nothing has to be scaled again. NaN: not so.
        const float bound = longest * packed[n].largest;
        const bool bounded = bound <= BOUND && !branch.bias;
        V largest[2], sums[2] = {};
        for (int j = 0; j < 2; ++j) largest[j] = all(bounded ? bound : -std::numeric_limits<float>::max());
        std::memset(out, 0, sizeof(float) * QUERIES * width);
        written();
        if (bounded)
            amx_bounded(packed[n], branch.keys, q, width, scale, largest, sums, s, p, out);
        else
            amx_searched(packed[n], branch, q, width, scale, largest, sums, s, p, out);
        written();
        if (a.log_sums) {
            float* to = reinterpret_cast<float*>(a.log_sums) + ((n * a.batch + b) * a.heads + h) * a.queries + first;
            for (int64_t i = 0; i < count; ++i) to[i] = largest[i / W][i % W] / LOG2E + std::log(sums[i / W][i % W]);
        }
        for (int j = 0; j < 2; ++j) {
            const V by = branch.weight / sums[j];
            for (int d = 0; d < width; ++d) {
                float *x = out + d * QUERIES + j * W, *y = total + d * QUERIES + j * W;
                store(y, n ? load(x) * by + load(y) : load(x) * by);
            }
        }
    }
    store_rows(total, a.out, b, h, first, count, width);
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
            pack(a.width, a.branches[n], i / a.heads, i % a.heads, k, k + part, &one.largest);
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
