// Gradients of the row-wise operations: a row and its gradient are read once, kept as float32 in the first cache, written once.
#pragma once

#include "rows.h"

namespace ebr::cpu {
namespace {

constexpr int64_t PIECE = 256;  // tokens that are summed apart
constexpr int TOGETHER = 8;     // rows whose columns are added in registers

// `WHOLE`: rows have whole vectors.
template <bool WHOLE, typename T>
INLINE V part_of(const T* x, int64_t d, int64_t width) {
    return WHOLE || d + W <= width ? load(x + d) : some(x + d, width - d);
}
template <bool WHOLE, typename T>
INLINE void put_part(T* x, int64_t d, int64_t width, V v) {
    WHOLE || d + W <= width ? store(x + d, v) : put(x + d, v, width - d);
}

// What a row is normed by.
struct Moments {
    float mean, inverse;  // 0 where it is not centred; of the deviation
};

// dx = s + (w·g − mean(w·g) − n·mean(w·g·n)) / deviation, dy = gate·dx; without the first mean for RMSNorm.
template <bool WHOLE, typename T>
Moments norm_gradient_row(const T* s, const T* g, const T* x, const float* gate, const float* weight, T* dx, T* dy, int64_t width,
                          float eps, bool centred, float* row) {
    float* slope = row + (width + W - 1) / W * W;
    V sums{}, squares{}, means{}, products{};
    for (int64_t d = 0; d < width; d += W) {
        const V v = part_of<WHOLE>(x, d, width);
        sums += v;
        store(row + d, v);
    }
    const float mean = centred ? sum(sums) / width : 0;
    for (int64_t d = 0; d < width; d += W) {
        V v = load(row + d) - mean;
        if (!WHOLE && d + W > width) v = some(reinterpret_cast<const float*>(&v), width - d);
        squares += v * v;
        store(row + d, v);
    }
    const float inverse = 1 / std::sqrt(sum(squares) / width + eps);
    for (int64_t d = 0; d < width; d += W) {
        const V v = part_of<WHOLE>(g, d, width) * load(weight + d), n = load(row + d) * inverse;
        means += v;
        products += v * n;
        store(row + d, n);
        store(slope + d, v);
    }
    const float flat = centred ? sum(means) / width : 0, along_n = sum(products) / width;
    for (int64_t d = 0; d < width; d += W) {
        V v = (load(slope + d) - flat - load(row + d) * along_n) * inverse;
        if (s) v += part_of<WHOLE>(s, d, width);
        put_part<WHOLE>(dx, d, width, v);
        if (gate) put_part<WHOLE>(dy, d, width, v * load(gate + d));
    }
    return {mean, inverse};
}

template <typename T>
const T* row_of(const Rows& x, int64_t b, int64_t n) {
    return reinterpret_cast<const T*>(x.address) + b * x.batch + n * x.token;
}

template <bool WHOLE, typename T>
Moments moments(const T* x, int64_t width, float eps, bool centred) {
    V sums{}, squares{};
    if (centred) {
        for (int64_t d = 0; d < width; d += W) sums += part_of<WHOLE>(x, d, width);
    }
    const float mean = sum(sums) / width;
    for (int64_t d = 0; d < width; d += W) {
        V v = part_of<WHOLE>(x, d, width) - mean;
        if (!WHOLE && d + W > width) v = some(reinterpret_cast<const float*>(&v), width - d);
        squares += v * v;
    }
    return {mean, 1 / std::sqrt(sum(squares) / width + eps)};
}

// The part of COUNT rows in the sums of `NormGradient`: of each column's vector they are added in registers.
template <int COUNT, bool WHOLE, typename T>
void add_rows(const T* const* g, const T* const* x, T* const* dx, const T* const* y, const Moments* by, float* weight, float* bias,
              float* gate, int64_t width) {
    for (int64_t d = 0; d < width; d += W) {
        V along_n{}, plain{}, gated{};
        for (int i = 0; i < COUNT; ++i) {
            if (weight || bias) {
                const V v = part_of<WHOLE>(g[i], d, width);
                plain += v;
                if (weight) along_n += v * (part_of<WHOLE>(x[i], d, width) - by[i].mean) * by[i].inverse;
            }
            if (gate) gated += part_of<WHOLE>(dx[i], d, width) * part_of<WHOLE>(y[i], d, width);
        }
        if (weight) store(weight + d, load(weight + d) + along_n);
        if (bias) store(bias + d, load(bias + d) + plain);
        if (gate) store(gate + d, load(gate + d) + gated);
    }
}

// Where sums are asked for, parts of a sample's tokens are summed apart, so that one sample serves several threads, and then in
// their order.
template <typename T, bool WHOLE>
void norm_gradient_all(const NormGradient& a) {
    const int64_t padded = (a.width + W - 1) / W * W, tables = padded * 2, each = padded * 3;
    const uintptr_t sums[] = {a.weight_sums, a.bias_sums, a.gate_sums};
    const bool summed = sums[0] || sums[1] || sums[2];
    const int64_t piece = summed ? PIECE : SOME, parts = (a.tokens + piece - 1) / piece;
    const int64_t given = a.batch * tables, apart = summed ? a.batch * parts * each : 0;
    float* table = static_cast<float*>(room(Use::tables, sizeof(float) * (given + apart)));  // gate, weight of every sample
    std::memset(table, 0, sizeof(float) * (given + apart));
    for (int64_t b = 0; b < a.batch; ++b) {
        if (a.gate.address) widen(a.gate, b * a.gate.batch, a.width, table + b * tables);
        if (a.weight.address) widen(a.weight, b * a.weight.batch, a.width, table + b * tables + padded);
    }
    spread(a.batch * parts, a.threads, [&](int64_t i) {
        float* row = static_cast<float*>(room(Use::part, sizeof(float) * 2 * padded));
        const int64_t b = i / parts, first = i % parts * piece, last = std::min(first + piece, a.tokens);
        const float* to = table + b * tables;
        float* own[3];
        for (int which = 0; which < 3; ++which) own[which] = sums[which] ? table + given + i * each + which * padded : nullptr;
        const T *g[TOGETHER], *x[TOGETHER], *y[TOGETHER];
        T* dx[TOGETHER];
        Moments by[TOGETHER];
        for (int64_t n = first; n < last; n += TOGETHER) {
            const int count = static_cast<int>(std::min<int64_t>(TOGETHER, last - n));
            for (int k = 0; k < count; ++k) {
                const int64_t place = (b * a.tokens + n + k) * a.width;
                const T* s = a.sum_gradient.address ? row_of<T>(a.sum_gradient, b, n + k) : nullptr;
                T* dy = a.dy ? reinterpret_cast<T*>(a.dy) + place : nullptr;
                g[k] = row_of<T>(a.gradient, b, n + k), x[k] = row_of<T>(a.total, b, n + k);
                dx[k] = a.dx ? reinterpret_cast<T*>(a.dx) + place : nullptr;
                y[k] = a.gate_sums ? row_of<T>(a.y, b, n + k) : nullptr;
                if (dx[k])
                    by[k] = norm_gradient_row<WHOLE>(s, g[k], x[k], dy ? to : nullptr, to + padded, dx[k], dy, a.width, a.eps, a.centred, row);
                else if (own[0])
                    by[k] = moments<WHOLE>(x[k], a.width, a.eps, a.centred);
            }
            if (!summed) continue;
            if (count == TOGETHER) {
                add_rows<TOGETHER, WHOLE>(g, x, dx, y, by, own[0], own[1], own[2], a.width);
                continue;
            }
            for (int k = 0; k < count; ++k) add_rows<1, WHOLE>(g + k, x + k, dx + k, y + k, by + k, own[0], own[1], own[2], a.width);
        }
    });
    for (int which = 0; which < 3; ++which) {
        if (!sums[which]) continue;
        float* out = reinterpret_cast<float*>(sums[which]);
        for (int64_t b = 0; b < a.batch; ++b, out += a.width) {
            std::memset(out, 0, sizeof(float) * a.width);
            for (int64_t part = 0; part < parts; ++part) {
                const float* from = table + given + (b * parts + part) * each + which * padded;
                for (int64_t d = 0; d < a.width; ++d) out[d] += from[d];
            }
        }
    }
}

template <typename T>
void norm_gradient_of(const NormGradient& a) {
    a.width % W ? norm_gradient_all<T, false>(a) : norm_gradient_all<T, true>(a);
}

bool norm_gradient(const NormGradient& a) {
    a.total.dtype == Dtype::float32 ? norm_gradient_of<float>(a) : norm_gradient_of<bf16>(a);
    return true;
}

// The gradient of numbers that were normed, n, and weighed from that of the result, g, in place: (w·g − n·mean(w·g·n)) / length. And
// g·n is added to `sums`, unless they are null.
INLINE void rms_gradient(const float* x, float* g, const float* weight, float* sums, int64_t width, float eps) {
    V squares{}, products{};
    for (int64_t d = 0; d < width; d += W) {
        squares += load(x + d) * load(x + d);
        products += load(x + d) * load(g + d) * load(weight + d);
    }
    const float inverse = 1 / std::sqrt(sum(squares) / width + eps), along_x = sum(products) / width * inverse * inverse;
    for (int64_t d = 0; d < width; d += W) {
        const V v = load(g + d), n = load(x + d);
        if (sums) store(sums + d, load(sums + d) + v * n * inverse);
        store(g + d, (v * load(weight + d) - n * along_x) * inverse);
    }
}

template <typename T>
void rope_gradient_all(const RopeGradient& a) {
    const int64_t head = a.width / a.heads, half = head / 2, norms = a.per_head ? head : a.width;
    const int64_t rows = a.batch * a.tokens;
    const bool summed = a.dq_weight || a.dk_weight;
    const int64_t piece = summed ? PIECE : SOME, parts = (rows + piece - 1) / piece, apart = summed ? parts * 2 * norms : 0;
    float* weights = static_cast<float*>(room(Use::tables, sizeof(float) * (2 * norms + apart)));
    float* sums = weights + 2 * norms;  // of a part's rows
    std::memset(sums, 0, sizeof(float) * apart);
    widen(a.q_weight, 0, norms, weights);
    widen(a.k_weight, 0, norms, weights + norms);
    spread(parts, a.threads, [&](int64_t part) {
        float* row = static_cast<float*>(room(Use::part, sizeof(float) * (2 * a.width + 2 * half)));
        float *slope = row + a.width, *cos = slope + a.width, *sin = cos + half;
        for (int64_t i = part * piece; i < rows && i < (part + 1) * piece; ++i) {
            const int64_t b = i / a.tokens, n = i % a.tokens, added = b * a.rows.batch + n * a.rows.token;
            widen(a.cos, n * a.cos.token, half, cos);
            widen(a.sin, n * a.sin.token, half, sin);
            for (int p = 0; p < 3; ++p) {
                const Heads& from = p == 0 ? a.dq : p == 1 ? a.dk : a.dv;
                T* to = reinterpret_cast<T*>(a.dqkv) + (i * 3 + p) * a.width;
                for (int h = 0; h < a.heads; ++h) {
                    const T* g = reinterpret_cast<const T*>(from.address) + b * from.batch + h * from.head + n * from.token;
                    if (p == 2) {
                        for (int64_t d = 0; d < head; d += W) store(to + h * head + d, load(g + d));
                        continue;
                    }
                    float* s = slope + h * head;
                    for (int64_t d = 0; d < half; d += W) {
                        const V u = load(g + d), v = load(g + half + d), x = load(cos + d), y = load(sin + d);
                        store(s + d, u * x + v * y);
                        store(s + half + d, v * x - u * y);
                    }
                }
                if (p == 2) continue;
                const T* x = row_of<T>(a.qkv, b, n) + p * a.width;
                for (int64_t d = 0; d < a.width; d += W) store(row + d, load(x + d));
                if (n < a.length)
                    for (int64_t d = 0; d < a.width; ++d) row[d] += value(a.rows, added + p * a.width + d);
                float* own = (p ? a.dk_weight : a.dq_weight) ? sums + (part * 2 + p) * norms : nullptr;
                for (int64_t d = 0; d < a.width; d += norms) rms_gradient(row + d, slope + d, weights + p * norms, own, norms, a.eps);
                for (int64_t d = 0; d < a.width; d += W) store(to + d, load(slope + d));
            }
        }
    });
    for (int p = 0; p < 2; ++p) {
        float* out = reinterpret_cast<float*>(p ? a.dk_weight : a.dq_weight);
        if (!out) continue;
        std::memset(out, 0, sizeof(float) * norms);
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t d = 0; d < norms; ++d) out[d] += sums[(part * 2 + p) * norms + d];
    }
}

bool rope_gradient(const RopeGradient& a) {
    if (a.width / a.heads % (2 * W)) return false;
    a.qkv.dtype == Dtype::float32 ? rope_gradient_all<float>(a) : rope_gradient_all<bf16>(a);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
