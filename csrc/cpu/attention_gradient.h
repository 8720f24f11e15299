// Gradients of attention, its likelihoods computed again from their logarithms of sums (Dao et al., arXiv 2205.14135), so that
// nothing of [queries, keys] is kept. With g the output's gradient, P a branch's likelihoods, w its weight:
//
//   D = rowsum(P ∘ g Vᵀ) = g · out     dS = w·scale · P ∘ (g Vᵀ − D)     dq = Σ dS K     dK = dSᵀ q     dV = w · Pᵀ g     dw = Σ D
//
// A block of queries lies along the lanes, as in attention.h, and meets the keys in tiles; what it adds to the keys' gradients
// is a product over its queries. Each part of the queries has sums of its own, so the result is the same for any threads.
#pragma once

#include "attention.h"

namespace ebr::cpu {
namespace {

constexpr int KEPT = 64;     // keys whose likelihoods and slopes are in the first cache
constexpr int LARGEST_COUNT = 16;  // of branches
constexpr int COLUMNS = 2;  // vectors of a row of the keys' gradients that a product holds

// A branch of one head as the products want it.
struct Sides {
    const float *k, *v, *mixed;  // rows of units by their dims, and keys (in pairs) for dq
    int64_t k_stride, v_stride;
    float *dk, *dv;
};

template <typename T>
int64_t sides_room(const Branch& branch, int width) {
    if constexpr (PAIRS<T>) return (branch.keys + 1) / 2 * width;
    return sizeof(T) == 4 ? 0 : 2 * branch.keys * width;
}

template <typename T>
Sides sides_of(const Branch& branch, int64_t b, int64_t h, int width, float* room) {
    Sides s{};
    s.k_stride = branch.k.token, s.v_stride = branch.v.token;
    s.k = as_units(at<T>(branch.k, b, h, 0), s.k_stride, branch.keys, width, room);
    s.v = as_units(at<T>(branch.v, b, h, 0), s.v_stride, branch.keys, width, room + branch.keys * width);
    s.mixed = s.k;
    if constexpr (PAIRS<T>) {
        pair_rows<T>(branch.k, b, h, 0, branch.keys, width, width, room);
        s.mixed = room;
    }
    return s;
}

// Queries from `first` on as rows of units (pairs of queries), `padded` wide with zeros.
template <typename T>
void rows_of(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t count, int width, int padded, float* to) {
    if (width < padded) std::memset(to, 0, sizeof(float) * ((count + PER_UNIT<T> - 1) / PER_UNIT<T>) * padded);
    if constexpr (PAIRS<T>) pair_rows<T>(from, b, h, first, count, width, padded, to);
    else
        for (int64_t n = 0; n < count; ++n, to += padded) {
            const T* x = at<T>(from, b, h, first + n);
            int d = 0;
            for (; d + W <= width; d += W) store(to + d, load(x + d));
            for (; d < width; ++d) to[d] = one(x + d);
        }
}

// What a block of queries needs while it meets the keys.
struct Block {
    float *q, *g;            // columns
    float *q_rows, *g_rows;  // of units
    float *p, *dp;           // [KEPT][lanes]: likelihoods, and g Vᵀ; the latter becomes the slopes, in units of keys
    bf16 *p_rows, *slope_rows;  // both as the products over queries want them, where these multiply pairs
    float* dq;
};

// Likelihoods of a tile's keys, and g Vᵀ; `mean` grows by the sum of their products, `total` by that of the likelihoods.
template <typename T, int c>
void scores(const Sides& s, const Branch& branch, int64_t start, int keys, const Block& at_work, int units, float scale,
            const V (&sums)[c], V (&mean)[c], V (&total)[c]) {
    constexpr int lanes = c * W;
    const float *k = s.k + start * s.k_stride, *v = s.v + start * s.v_stride;
    const float* bias = branch.bias ? reinterpret_cast<const float*>(branch.bias) + start : nullptr;
    int i = 0;
    for (; i + R <= keys; i += R) logits<T, R, c>(k + i * s.k_stride, s.k_stride, at_work.q, units, at_work.p + i * lanes);
    for (; i < keys; ++i) logits<T, 1, c>(k + i * s.k_stride, s.k_stride, at_work.q, units, at_work.p + i * lanes);
    for (i = 0; i + R <= keys; i += R) logits<T, R, c>(v + i * s.v_stride, s.v_stride, at_work.g, units, at_work.dp + i * lanes);
    for (; i < keys; ++i) logits<T, 1, c>(v + i * s.v_stride, s.v_stride, at_work.g, units, at_work.dp + i * lanes);
    for (i = 0; i < keys; ++i)
        for (int j = 0; j < c; ++j) {
            float* x = at_work.p + (i * c + j) * W;
            const V logit = bias ? load(x) * scale + bias[i] * LOG2E : load(x) * scale;
            const V p = exp2<sizeof(T) == 4>(logit - sums[j]);
            mean[j] += p * load(at_work.dp + (i * c + j) * W);
            total[j] += p;
            store(x, p);
        }
}

// The slopes dS of a tile, in place of g Vᵀ; likelihoods are divided by their sum, which rounding has off one.
template <typename T, int c>
void slopes(int keys, const Block& at_work, float factor, const V (&mean)[c], const V (&inverse)[c]) {
    constexpr int lanes = c * W;
    for (int i = 0; i < keys; i += PER_UNIT<T>)
        for (int j = 0; j < c; ++j) {
            const int64_t first = i * lanes + j * W;
            const V x = load(at_work.p + first) * inverse[j], slope = x * (load(at_work.dp + first) - mean[j]) * factor;
#if defined(__AVX512BF16__)
            if constexpr (PAIRS<T>) {
                const bool both = i + 1 < keys;
                const V y = both ? load(at_work.p + first + lanes) * inverse[j] : V{};
                const V second = both ? y * (load(at_work.dp + first + lanes) - mean[j]) * factor : V{};
                const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)slope);
                _mm512_storeu_si512(at_work.dp + i / 2 * lanes + j * W, _mm512_permutexvar_epi16(by_pairs(), pair));
                store(at_work.p_rows + first, x), store(at_work.slope_rows + first, slope);
                if (both) store(at_work.p_rows + first + lanes, y), store(at_work.slope_rows + first + lanes, second);
                continue;
            }
#endif
            store(at_work.p + first, x), store(at_work.dp + first, slope);
        }
}

// out [r][padded] += Σ over queries of a[r] · rows, for c vectors of columns.
template <typename T, int r, int c>
INLINE void gather(const float* a, int64_t ar, const float* rows, int padded, int64_t depth, float* out) {
    V acc[r][c];
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) acc[i][j] = load(out + i * padded + j * W);
    product<T, r, c>(acc, a, ar, 1, rows, padded, depth);
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) store(out + i * padded + j * W, acc[i][j]);
}

template <typename T>
void gather_tile(const void* from, int64_t stride, int keys, const float* rows, int padded, int64_t depth, float* out) {
    const float* a = static_cast<const float*>(from);
    int d = 0;
    for (; d + COLUMNS * W <= padded; d += COLUMNS * W) {
        int i = 0;
        for (; i + R <= keys; i += R) gather<T, R, COLUMNS>(a + i * stride, stride, rows + d, padded, depth, out + i * padded + d);
        for (; i < keys; ++i) gather<T, 1, COLUMNS>(a + i * stride, stride, rows + d, padded, depth, out + i * padded + d);
    }
    for (; d < padded; d += W) {
        int i = 0;
        for (; i + R <= keys; i += R) gather<T, R, 1>(a + i * stride, stride, rows + d, padded, depth, out + i * padded + d);
        for (; i < keys; ++i) gather<T, 1, 1>(a + i * stride, stride, rows + d, padded, depth, out + i * padded + d);
    }
}

// g · out of every query, along the lanes.
template <typename T, int c>
void products_of(const AttentionGradient& a, int64_t b, int64_t h, int64_t first, int64_t count, V (&mean)[c]) {
    alignas(64) float each[c * W] = {};
    for (int64_t n = 0; n < count; ++n) {
        const T *x = at<T>(a.gradient, b, h, first + n), *y = at<T>(a.out, b, h, first + n);
        V total{};
        int d = 0;
        for (; d + W <= a.width; d += W) total += load(x + d) * load(y + d);
        each[n] = sum(total);
        for (; d < a.width; ++d) each[n] += one(x + d) * one(y + d);
    }
    for (int j = 0; j < c; ++j) mean[j] = load(each + j * W);
}

// Up to c vectors of queries from `first` on; `dweight` grows by each branch's Σ D.
template <typename T, int c>
void pull(const AttentionGradient& a, const Sides* sides, int64_t b, int64_t h, int64_t first, float* dweight, const Block& at_work) {
    constexpr int lanes = c * W, per = PER_UNIT<T>;
    const int width = a.width, units = width / per;
    const int64_t count = a.queries - first < lanes ? a.queries - first : lanes, depth = (count + per - 1) / per;
    const float scale = a.scale * LOG2E;
    columns<T, c>(a.q, b, h, first, count, width, at_work.q);
    columns<T, c>(a.gradient, b, h, first, count, width, at_work.g);
    rows_of<T>(a.q, b, h, first, count, width, a.padded, at_work.q_rows);
    rows_of<T>(a.gradient, b, h, first, count, width, a.padded, at_work.g_rows);
    std::memset(at_work.dq, 0, sizeof(float) * lanes * width);
    for (int n = 0; n < a.count; ++n) {
        const Branch& branch = a.branches[n];
        const Sides& s = sides[n];
        const float* logs = reinterpret_cast<const float*>(a.log_sums) + ((n * a.batch + b) * a.heads + h) * a.queries + first;
        alignas(64) float each[lanes];
        for (int i = 0; i < lanes; ++i) each[i] = i < count ? logs[i] * LOG2E : 1e30f;  // a query that is not there likes nothing
        V sums[c], mean[c] = {}, total[c] = {}, inverse[c], ignored[c] = {};
        for (int j = 0; j < c; ++j) sums[j] = load(each + j * W), inverse[j] = all(1.f);
        const auto keys_of = [&](int64_t start) { return static_cast<int>(branch.keys - start < KEPT ? branch.keys - start : KEPT); };
        const bool known = a.out.address, kept = !known && branch.keys <= KEPT;
        if (known) products_of<T, c>(a, b, h, first, count, mean);
        else
            for (int64_t start = 0; start < branch.keys; start += KEPT)
                scores<T, c>(s, branch, start, keys_of(start), at_work, units, scale, sums, mean, total);
        for (int j = 0; j < c; ++j) {
            if (!known) inverse[j] = total[j] > 0.f ? 1.f / total[j] : total[j], mean[j] *= inverse[j];
            dweight[n] += sum(mean[j]);
        }
        for (int64_t start = 0; start < branch.keys; start += KEPT) {
            const int keys = keys_of(start);
            if (!kept) scores<T, c>(s, branch, start, keys, at_work, units, scale, sums, ignored, ignored);
            slopes<T, c>(keys, at_work, branch.weight * a.scale, mean, inverse);
            const float* mixed = s.mixed + start / per * (PAIRS<T> ? width : s.k_stride);
            for (int d = 0; d < width; d += R)
                mix<T, false, R, c>(mixed + d, PAIRS<T> ? width : s.k_stride, at_work.dp, (keys + per - 1) / per, inverse, at_work.dq + d * lanes);
            if (!s.dk) continue;
            const void *p = PAIRS<T> ? static_cast<const void*>(at_work.p_rows) : at_work.p;
            const void *slope = PAIRS<T> ? static_cast<const void*>(at_work.slope_rows) : at_work.dp;
            gather_tile<T>(p, lanes / per, keys, at_work.g_rows, a.padded, depth, s.dv + start * a.padded);
            gather_tile<T>(slope, lanes / per, keys, at_work.q_rows, a.padded, depth, s.dk + start * a.padded);
        }
    }
    store_columns<T, c>(at_work.dq, a.dq, b, h, first, count, width);
}

template <typename T>
void pull_all(const AttentionGradient& a) {
    constexpr int lanes = C * W;
    const int64_t blocks = (a.queries + lanes - 1) / lanes, heads = a.batch * a.heads;
    int64_t packed = 0;
    for (int n = 0; n < a.count; ++n) packed += sides_room<T>(a.branches[n], a.width);
    const size_t block = size_t(lanes) * (3 * a.width + 2 * a.padded + 3 * KEPT), known = (sizeof(Sides) * a.count + 63) / 64 * 64;
    spread(a.splits * heads, a.threads, [&](int64_t part) {
        const int64_t split = part / heads, pair = part % heads, h = pair % a.heads, b = pair / a.heads;
        char* memory = static_cast<char*>(room(Use::part, known + sizeof(float) * (block + packed)));
        Sides* sides = reinterpret_cast<Sides*>(memory);
        float* x = reinterpret_cast<float*>(memory + known);
        const auto take = [&](int64_t width) { return (x += lanes * width) - lanes * width; };
        Block at_work;
        at_work.q = take(a.width), at_work.g = take(a.width), at_work.dq = take(a.width);
        at_work.q_rows = take(a.padded), at_work.g_rows = take(a.padded);
        at_work.p = take(KEPT), at_work.dp = take(KEPT);
        at_work.p_rows = reinterpret_cast<bf16*>(take(KEPT / 2)), at_work.slope_rows = reinterpret_cast<bf16*>(take(KEPT / 2));
        float sums[LARGEST_COUNT] = {};
        for (int n = 0; n < a.count; ++n) {
            const Branch& branch = a.branches[n];
            const BranchGradient& to = a.gradients[n];
            sides[n] = sides_of<T>(branch, b, h, a.width, x);
            x += sides_room<T>(branch, a.width);
            const int64_t size = branch.keys * a.padded;
            if (!to.dk) continue;
            sides[n].dk = reinterpret_cast<float*>(to.dk) + part * size;
            sides[n].dv = reinterpret_cast<float*>(to.dv) + part * size;
            std::memset(sides[n].dk, 0, sizeof(float) * size);
            std::memset(sides[n].dv, 0, sizeof(float) * size);
        }
        for (int64_t i = split * blocks / a.splits; i < (split + 1) * blocks / a.splits; ++i) {
            const int64_t first = i * lanes, left = a.queries - first;
            if (left <= W) pull<T, 1>(a, sides, b, h, first, sums, at_work);
            else if (left <= 2 * W) pull<T, 2>(a, sides, b, h, first, sums, at_work);
            else pull<T, C>(a, sides, b, h, first, sums, at_work);
        }
        for (int n = 0; n < a.count; ++n) {
            if (a.gradients[n].dweight) reinterpret_cast<float*>(a.gradients[n].dweight)[part] = sums[n];
            if (const float w = a.branches[n].weight; sides[n].dk && w != 1)
                for (int64_t i = 0; i < a.branches[n].keys * a.padded; ++i) sides[n].dv[i] *= w;
        }
    });
}

bool attention_gradient(const AttentionGradient& a) {
    if (a.rounded || a.width % 8 || a.width > LARGEST_HEAD || a.count < 1 || a.count > LARGEST_COUNT || a.padded % W || a.splits < 1) return false;
    for (int n = 0; n < a.count; ++n) {
        const Branch& branch = a.branches[n];
        if (branch.keys < 1) return false;
        if (PAIRS<bf16> && a.dtype == Dtype::bfloat16 && (branch.k.token % 2 || branch.v.token % 2)) return false;
    }
    a.dtype == Dtype::float32 ? pull_all<float>(a) : pull_all<bf16>(a);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
