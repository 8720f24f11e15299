// Gradients of attention in bf16 by AMX's tile products, of one branch whose result is at hand (see attention_gradient.h).
//
// P, g Vᵀ (keys x queries) = K, V (16 keys x 32 dims, as they lie) · Qᵀ, gᵀ (pairs of dims x queries)
// dqᵀ (dims x queries) = Kᵀ (16 dims x 32 keys, laid out once for all queries) · dS (pairs of keys x queries)
// dV, dK (keys x dims) = P, dS (16 keys x 32 queries) · g, Q (pairs of queries x dims)
#pragma once

#include "amx.h"
#include "attention_gradient.h"

namespace ebr::cpu {
namespace {

constexpr int PULLED_KEYS = 128;  // whose slopes are made before they are used
constexpr int TWO = 2;            // blocks of queries at work, whose parts of dV and dK are added together

// A head's keys and values, and what is added up for them, [keys][width], padded to whole steps.
struct Pulled {
    bf16 *k, *v, *across;  // the last is Kᵀ by steps
    float *dk, *dv;
};

// A block of queries at work.
struct Pulling {
    bf16 *q, *g;                // pairs of dims x queries
    bf16 *q_rows, *g_rows;      // pairs of queries x dims
    float *s, *dp;              // [STEP][QUERIES]
    bf16* slopes;               // [PULLED_KEYS] pairs of keys x queries
    bf16 *p_rows, *slope_rows;  // a step's keys x queries
    float* dq;                  // [width][QUERIES]
    V sums[2], mean[2];         // logarithms of the denominators to base 2, Σ g·out
};

// QUERIES rows from `first` on, `count` of which are there, by pairs [QUERIES / 2][width].
void by_rows(const Heads& rows, int64_t b, int64_t h, int64_t first, int64_t count, int width, bf16* to) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) low[i] = i / 2 + i % 2 * 32, high[i] = low[i] + 16;
    const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
    const auto row = [&](int64_t n, int d) {
        return n < count ? _mm512_loadu_si512(at<bf16>(rows, b, h, first + n) + d) : _mm512_setzero_si512();
    };
    for (int64_t n = 0; n < QUERIES; n += 2, to += 2 * width)
        for (int d = 0; d < width; d += 32) {
            const __m512i one = row(n, d), other = row(n + 1, d);
            _mm512_store_si512(to + 2 * d, _mm512_permutex2var_epi16(one, lows, other));
            _mm512_store_si512(to + 2 * d + 32, _mm512_permutex2var_epi16(one, highs, other));
        }
}

// Likelihoods and slopes of a step's keys, `there` of which are there; those of the others are 0.
INLINE void amx_slopes(const float* s, const float* dp, int64_t there, float scale, float factor, const V (&sums)[2],
                       const V (&mean)[2], bf16* slopes, bf16* p_rows, bf16* slope_rows) {
    const __m512i interleave = by_pairs();
    const auto rounded = [](V high, V low) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); };
    for (int n = 0; n < STEP; n += 2) {
        V p[2][2], slope[2][2];
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) {
                const int at = (n + i) * QUERIES + j * W;
                p[i][j] = n + i < there ? exp2<false>(load(s + at) * scale - sums[j]) : V{};
                slope[i][j] = p[i][j] * (load(dp + at) - mean[j]) * factor;
            }
        for (int j = 0; j < 2; ++j)
            _mm512_store_si512(slopes + n * QUERIES + 2 * j * W, _mm512_permutexvar_epi16(interleave, rounded(slope[1][j], slope[0][j])));
        for (int i = 0; i < 2; ++i) {
            _mm512_store_si512(p_rows + (n + i) * QUERIES, rounded(p[i][1], p[i][0]));
            _mm512_store_si512(slope_rows + (n + i) * QUERIES, rounded(slope[i][1], slope[i][0]));
        }
    }
}

// to [STEP][width] += Σ a [STEP][QUERIES] · rows over some blocks of queries, by tiles 0 to 3.
INLINE void amx_gather(int blocks, const bf16* const (&a)[TWO], const bf16* const (&rows)[TWO], int width, float* to) {
    for (int d = 0; d < width; d += 32) {
        float *top = to + d, *bottom = to + 16 * width + d;
        _tile_loadd(0, top, 4 * width);
        _tile_loadd(1, top + 16, 4 * width);
        _tile_loadd(2, bottom, 4 * width);
        _tile_loadd(3, bottom + 16, 4 * width);
        for (int block = 0; block < blocks; ++block) {
            _tile_loadd(6, rows[block] + 2 * d, 4 * width);
            _tile_loadd(7, a[block], 2 * QUERIES);
            _tile_dpbf16ps(0, 7, 6);
            _tile_loadd(4, a[block] + 16 * QUERIES, 2 * QUERIES);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, rows[block] + 2 * d + 32, 4 * width);
            _tile_dpbf16ps(1, 7, 5);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, top, 4 * width);
        _tile_stored(1, top + 16, 4 * width);
        _tile_stored(2, bottom, 4 * width);
        _tile_stored(3, bottom + 16, 4 * width);
    }
}

// The queries from `first` on are laid out for their work; `dweight` grows by their Σ D.
void amx_ready(const AttentionGradient& a, int64_t b, int64_t h, int64_t first, float* dweight, Pulling& block) {
    const int width = a.width;
    const int64_t count = a.queries - first < QUERIES ? a.queries - first : QUERIES;
    V ignored[2] = {};
    by_dims(a.q, b, h, first, count, width, block.q, ignored);
    by_dims(a.gradient, b, h, first, count, width, block.g, ignored);
    by_rows(a.q, b, h, first, count, width, block.q_rows);
    by_rows(a.gradient, b, h, first, count, width, block.g_rows);
    const float* logs = reinterpret_cast<const float*>(a.log_sums) + (b * a.heads + h) * a.queries + first;
    alignas(64) float each[QUERIES];
    for (int i = 0; i < QUERIES; ++i) each[i] = i < count ? logs[i] * LOG2E : 1e30f;  // a query that is not there likes nothing
    for (int j = 0; j < 2; ++j) block.sums[j] = load(each + j * W);
    products_of<bf16, 2>(a, b, h, first, count, block.mean);
    for (int j = 0; j < 2; ++j) *dweight += sum(block.mean[j]);
    std::memset(block.dq, 0, sizeof(float) * QUERIES * width);
}

// The queries from `first` on, up to TWO blocks of them.
void amx_pull(const AttentionGradient& a, const Pulled& one, int64_t b, int64_t h, int64_t first, int blocks, float* dweight,
              Pulling (&at_work)[TWO]) {
    const int width = a.width;
    const int64_t keys = a.branches[0].keys;
    const float scale = a.scale * LOG2E;
    for (int n = 0; n < blocks; ++n) amx_ready(a, b, h, first + n * QUERIES, dweight, at_work[n]);
    const bf16* const likely[TWO] = {at_work[0].p_rows, at_work[1].p_rows};
    const bf16* const sloping[TWO] = {at_work[0].slope_rows, at_work[1].slope_rows};
    const bf16* const gradients[TWO] = {at_work[0].g_rows, at_work[1].g_rows};
    const bf16* const queries[TWO] = {at_work[0].q_rows, at_work[1].q_rows};
    written();
    for (int64_t start = 0; start < keys; start += PULLED_KEYS) {
        const int64_t left = keys - start < PULLED_KEYS ? keys - start : PULLED_KEYS;
        const int steps = static_cast<int>((left + STEP - 1) / STEP);
        for (int i = 0; i < steps; ++i) {
            const int64_t key = start + i * STEP;
            for (int n = 0; n < blocks; ++n) {
                const Pulling& block = at_work[n];
                for (int half = 0; half < 2; ++half) {
                    amx_logits(one.k + (key + half * 16) * width, block.q, width, block.s + half * 16 * QUERIES);
                    amx_logits(one.v + (key + half * 16) * width, block.g, width, block.dp + half * 16 * QUERIES);
                }
                written();
                amx_slopes(block.s, block.dp, keys - key, scale, a.scale, block.sums, block.mean, block.slopes + i * STEP * QUERIES,
                           block.p_rows, block.slope_rows);
            }
            written();
            amx_gather(blocks, likely, gradients, width, one.dv + key * width);
            amx_gather(blocks, sloping, queries, width, one.dk + key * width);
        }
        for (int n = 0; n < blocks; ++n)
            for (int d = 0; d < width; d += 32) {
                float* dq = at_work[n].dq + d * QUERIES;
                load_sums(dq);
                for (int i = 0; i < steps; ++i)
                    amx_mix(one.across + (start + i * STEP) * width + d * STEP, at_work[n].slopes + i * STEP * QUERIES);
                store_sums(dq);
            }
        written();
    }
    for (int n = 0; n < blocks; ++n) {
        const int64_t own = first + n * QUERIES, count = a.queries - own < QUERIES ? a.queries - own : QUERIES;
        store_rows(at_work[n].dq, a.dq, b, h, own, count, width);
    }
}

// A part of the queries of one head; each part has sums of its own.
void amx_pull_part(const AttentionGradient& a, int64_t part) {
    static const TileConfig config;
    const int width = a.width;
    const Branch& branch = a.branches[0];
    const int64_t heads = a.batch * a.heads, split = part / heads, pair = part % heads, h = pair % a.heads, b = pair / a.heads;
    const int64_t blocks = (a.queries + QUERIES - 1) / QUERIES, size = (branch.keys + STEP - 1) / STEP * STEP * width;
    const size_t floats = 2 * size + TWO * QUERIES * (2 * STEP + width);
    const size_t halves = 3 * size + TWO * QUERIES * (4 * width + PULLED_KEYS + 2 * STEP);
    float* x = static_cast<float*>(room(Use::part, sizeof(float) * floats + sizeof(bf16) * halves));
    bf16* y = reinterpret_cast<bf16*>(x + floats);
    const auto wide = [&](int64_t count) { return (x += count) - count; };
    const auto half = [&](int64_t count) { return (y += count) - count; };
    const Pulled one{half(size), half(size), half(size), wide(size), wide(size)};
    Pulling at_work[TWO];
    for (Pulling& block : at_work) {
        block.q = half(QUERIES * width), block.g = half(QUERIES * width);
        block.q_rows = half(QUERIES * width), block.g_rows = half(QUERIES * width);
        block.slopes = half(QUERIES * PULLED_KEYS), block.p_rows = half(QUERIES * STEP), block.slope_rows = half(QUERIES * STEP);
        block.s = wide(QUERIES * STEP), block.dp = wide(QUERIES * STEP), block.dq = wide(QUERIES * width);
    }
    const Branch turned{branch.v, branch.k, branch.keys, 0, 1.f};
    float ignored, total = 0;
    pack(width, turned, b, h, one.v, one.across, &ignored);
    std::memset(one.k, 0, sizeof(bf16) * size);
    for (int64_t n = 0; n < branch.keys; ++n) std::memcpy(one.k + n * width, at<bf16>(branch.k, b, h, n), sizeof(bf16) * width);
    std::memset(one.dk, 0, sizeof(float) * size);
    std::memset(one.dv, 0, sizeof(float) * size);
    written();
    _tile_loadconfig(&config);
    const int64_t last = (split + 1) * blocks / a.splits;
    for (int64_t i = split * blocks / a.splits; i < last; i += TWO)
        amx_pull(a, one, b, h, i * QUERIES, last - i < TWO ? 1 : TWO, &total, at_work);
    _tile_release();
    const BranchGradient& to = a.gradients[0];
    if (to.dweight) reinterpret_cast<float*>(to.dweight)[part] = total;
    if (a.rounded) {
        bf16 *dk = reinterpret_cast<bf16*>(to.dk) + part * branch.keys * width, *dv = reinterpret_cast<bf16*>(to.dv) + part * branch.keys * width;
        for (int64_t i = 0; i < branch.keys * width; i += W) store(dk + i, load(one.dk + i)), store(dv + i, load(one.dv + i));
        return;
    }
    for (int64_t n = 0; n < branch.keys; ++n) {
        const int64_t place = (part * branch.keys + n) * a.padded;
        std::memcpy(reinterpret_cast<float*>(to.dk) + place, one.dk + n * width, sizeof(float) * width);
        std::memcpy(reinterpret_cast<float*>(to.dv) + place, one.dv + n * width, sizeof(float) * width);
    }
}

bool amx_gradient(const AttentionGradient& a) {
    if (a.rounded && a.splits > 1) return false;
    const bool serves = a.dtype == Dtype::bfloat16 && a.count == 1 && a.out.address && !a.branches[0].bias && a.gradients[0].dk &&
                        a.branches[0].weight == 1 && a.branches[0].keys > 0 && a.splits > 0 && a.width % 32 == 0 && a.width <= LARGEST_HEAD;
    if (!serves) return attention_gradient(a);
    spread(a.splits * a.batch * a.heads, a.threads, [&](int64_t part) { amx_pull_part(a, part); });
    return true;
}

}  // namespace
}  // namespace ebr::cpu
