// Gradients of the row-wise operations: a row and its gradient are read once, kept as float32 in the first cache, written once.
#pragma once

#include "rows.h"

namespace ebr::cpu {
namespace {

template <typename T>
INLINE V part_of(const T* x, int64_t d, int64_t width) {
    return d + W <= width ? load(x + d) : some(x + d, width - d);
}
template <typename T>
INLINE void put_part(T* x, int64_t d, int64_t width, V v) {
    d + W <= width ? store(x + d, v) : put(x + d, v, width - d);
}

// dx = s + (w·g − mean(w·g) − n·mean(w·g·n)) / deviation, dy = gate·dx; without the first mean for RMSNorm.
template <typename T>
void norm_gradient_row(const T* s, const T* g, const T* x, const float* gate, const float* weight, T* dx, T* dy, int64_t width,
                       float eps, bool centred, float* row) {
    float* slope = row + (width + W - 1) / W * W;
    V sums{}, squares{}, means{}, products{};
    for (int64_t d = 0; d < width; d += W) {
        const V v = part_of(x, d, width);
        sums += v;
        store(row + d, v);
    }
    const float mean = centred ? sum(sums) / width : 0;
    for (int64_t d = 0; d < width; d += W) {
        V v = load(row + d) - mean;
        if (d + W > width) v = some(reinterpret_cast<const float*>(&v), width - d);
        squares += v * v;
        store(row + d, v);
    }
    const float inverse = 1 / std::sqrt(sum(squares) / width + eps);
    for (int64_t d = 0; d < width; d += W) {
        const V v = part_of(g, d, width) * load(weight + d), n = load(row + d) * inverse;
        means += v;
        products += v * n;
        store(row + d, n);
        store(slope + d, v);
    }
    const float flat = centred ? sum(means) / width : 0, along_n = sum(products) / width;
    for (int64_t d = 0; d < width; d += W) {
        V v = (load(slope + d) - flat - load(row + d) * along_n) * inverse;
        if (s) v += part_of(s, d, width);
        put_part(dx, d, width, v);
        if (gate) put_part(dy, d, width, v * load(gate + d));
    }
}

template <typename T>
const T* row_of(const Rows& x, int64_t b, int64_t n) {
    return reinterpret_cast<const T*>(x.address) + b * x.batch + n * x.token;
}

template <typename T>
void norm_gradient_all(const NormGradient& a) {
    const int64_t padded = (a.width + W - 1) / W * W, tables = padded * 2;
    float* table = static_cast<float*>(room(Use::tables, sizeof(float) * a.batch * tables));  // gate, weight of every sample
    std::memset(table, 0, sizeof(float) * a.batch * tables);
    for (int64_t b = 0; b < a.batch; ++b) {
        if (a.gate.address) widen(a.gate, b * a.gate.batch, a.width, table + b * tables);
        widen(a.weight, b * a.weight.batch, a.width, table + b * tables + padded);
    }
    const int64_t rows = a.batch * a.tokens;
    spread((rows + SOME - 1) / SOME, a.threads, [&](int64_t part) {
        float* row = static_cast<float*>(room(Use::part, sizeof(float) * 2 * padded));
        for (int64_t i = part * SOME; i < rows && i < (part + 1) * SOME; ++i) {
            const int64_t b = i / a.tokens, n = i % a.tokens;
            const float* to = table + b * tables;
            const T* s = a.sum_gradient.address ? row_of<T>(a.sum_gradient, b, n) : nullptr;
            T *dx = reinterpret_cast<T*>(a.dx) + i * a.width, *dy = a.dy ? reinterpret_cast<T*>(a.dy) + i * a.width : nullptr;
            norm_gradient_row(s, row_of<T>(a.gradient, b, n), row_of<T>(a.total, b, n), dy ? to : nullptr, to + padded, dx, dy,
                              a.width, a.eps, a.centred, row);
        }
    });
}

bool norm_gradient(const NormGradient& a) {
    a.total.dtype == Dtype::float32 ? norm_gradient_all<float>(a) : norm_gradient_all<bf16>(a);
    return true;
}

// The gradient of normed numbers from theirs, in place: (g − n·mean(g·n)) / length.
INLINE void rms_gradient(const float* x, float* g, int64_t width, float eps) {
    V squares{}, products{};
    for (int64_t d = 0; d < width; d += W) squares += load(x + d) * load(x + d), products += load(x + d) * load(g + d);
    const float inverse = 1 / std::sqrt(sum(squares) / width + eps), along_x = sum(products) / width * inverse * inverse;
    for (int64_t d = 0; d < width; d += W) store(g + d, (load(g + d) - load(x + d) * along_x) * inverse);
}

template <typename T>
void rope_gradient_all(const RopeGradient& a) {
    const int64_t head = a.width / a.heads, half = head / 2, norms = a.per_head ? head : a.width;
    float* weights = static_cast<float*>(room(Use::tables, sizeof(float) * 2 * norms));
    widen(a.q_weight, 0, norms, weights);
    widen(a.k_weight, 0, norms, weights + norms);
    const int64_t rows = a.batch * a.tokens;
    spread((rows + SOME - 1) / SOME, a.threads, [&](int64_t part) {
        float* row = static_cast<float*>(room(Use::part, sizeof(float) * (2 * a.width + 2 * half)));
        float *slope = row + a.width, *cos = slope + a.width, *sin = cos + half;
        for (int64_t i = part * SOME; i < rows && i < (part + 1) * SOME; ++i) {
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
                    const float* w = weights + p * norms + (a.per_head ? 0 : h * head);
                    for (int64_t d = 0; d < half; d += W) {
                        const V u = load(g + d), v = load(g + half + d), x = load(cos + d), y = load(sin + d);
                        store(s + d, (u * x + v * y) * load(w + d));
                        store(s + half + d, (v * x - u * y) * load(w + half + d));
                    }
                }
                if (p == 2) continue;
                const T* x = row_of<T>(a.qkv, b, n) + p * a.width;
                for (int64_t d = 0; d < a.width; d += W) store(row + d, load(x + d));
                if (n < a.length)
                    for (int64_t d = 0; d < a.width; ++d) row[d] += value(a.rows, added + p * a.width + d);
                for (int64_t d = 0; d < a.width; d += norms) rms_gradient(row + d, slope + d, norms, a.eps);
                for (int64_t d = 0; d < a.width; d += W) store(to + d, load(slope + d));
            }
        }
    });
}

bool rope_gradient(const RopeGradient& a) {
    if (a.width / a.heads % (2 * W)) return false;
    a.qkv.dtype == Dtype::float32 ? rope_gradient_all<float>(a) : rope_gradient_all<bf16>(a);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
