// Row-wise operations in one pass each: a row is read once, kept as float32 in the first cache, and written once.
#pragma once

#include "vec.h"

namespace ebr::cpu {
namespace {

constexpr int64_t SOME = 16;  // rows of a part

INLINE float value(const Rows& x, int64_t offset) {
    return x.dtype == Dtype::float32 ? reinterpret_cast<const float*>(x.address)[offset]
                                     : one(reinterpret_cast<const bf16*>(x.address) + offset);
}

// Calls f(vector, position) over a row, and f(its last numbers, padded with zeros) once if the width is no multiple.
template <typename F>
INLINE void along(int64_t width, F&& f) {
    int64_t d = 0;
    for (; d + W <= width; d += W) f(d, std::integral_constant<bool, true>());
    if (d < width) f(d, std::integral_constant<bool, false>());
}

// A vector of a row, or its last `count` numbers and zeros.
template <typename T>
INLINE V some(const T* x, int64_t count) {
    V v{};
    for (int64_t i = 0; i < count; ++i) v[i] = one(x + i);
    return v;
}
template <typename T>
INLINE void put(T* x, V v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) set(x + i, v[i]);
}

// A table's row as float32, whatever it is.
INLINE void widen(const Rows& x, int64_t offset, int64_t width, float* to) {
    for (int64_t d = 0; d < width; ++d) to[d] = value(x, offset + d);
}

template <typename T>
void norm_row(const T* x, const T* y, const float* gate, const float* weight, const float* bias, T* total, T* out, int64_t width,
              float eps, float* row) {
    V sums{};
    along(width, [&](int64_t d, auto whole) {
        const int64_t left = width - d;
        V v = whole ? load(x + d) : some(x + d, left);
        if (y) {
            const V w = whole ? load(y + d) : some(y + d, left);
            v = gate ? v + w * load(gate + d) : v + w;
            if (total) whole ? store(total + d, v) : put(total + d, v, left);
        }
        sums += v;
        store(row + d, v);
    });
    const float mean = bias ? sum(sums) / width : 0;
    V squares{};
    along(width, [&](int64_t d, auto whole) {
        V v = load(row + d) - mean;
        if (!whole) v = some(reinterpret_cast<const float*>(&v), width - d);
        squares += v * v;
        store(row + d, v);
    });
    const float inverse = 1 / std::sqrt(sum(squares) / width + eps);
    along(width, [&](int64_t d, auto whole) {
        const V n = load(row + d) * inverse * load(weight + d);
        const V v = bias ? n + load(bias + d) : n;
        whole ? store(out + d, v) : put(out + d, v, width - d);
    });
}

template <typename T>
void norm_all(const Norm& a) {
    const int64_t padded = (a.width + W - 1) / W * W, tables = padded * 3;
    float* table = static_cast<float*>(room(Use::tables, sizeof(float) * a.batch * tables));  // gate, weight, bias of every sample
    std::memset(table, 0, sizeof(float) * a.batch * tables);  // what lies behind a row is multiplied by zeros, and added up
    for (int64_t b = 0; b < a.batch; ++b) {
        float* to = table + b * tables;
        if (a.gate.address) widen(a.gate, b * a.gate.batch, a.width, to);
        widen(a.weight, b * a.weight.batch, a.width, to + padded);
        if (a.bias.address) widen(a.bias, b * a.bias.batch, a.width, to + 2 * padded);
    }
    const int64_t rows = a.batch * a.tokens;
    spread((rows + SOME - 1) / SOME, a.threads, [&](int64_t part) {
        float* row = static_cast<float*>(room(Use::part, sizeof(float) * padded));
        for (int64_t i = part * SOME; i < rows && i < (part + 1) * SOME; ++i) {
            const int64_t b = i / a.tokens, n = i % a.tokens;
            const float* to = table + b * tables;
            const T* x = reinterpret_cast<const T*>(a.x.address) + b * a.x.batch + n * a.x.token;
            const T* y = a.y.address ? reinterpret_cast<const T*>(a.y.address) + b * a.y.batch + n * a.y.token : nullptr;
            T* total = a.total ? reinterpret_cast<T*>(a.total) + i * a.width : nullptr;
            T* out = reinterpret_cast<T*>(a.out) + i * a.width;
            norm_row(x, y, a.gate.address ? to : nullptr, to + padded, a.bias.address ? to + 2 * padded : nullptr, total, out, a.width, a.eps, row);
        }
    });
}

bool norm(const Norm& a) {
    a.x.dtype == Dtype::float32 ? norm_all<float>(a) : norm_all<bf16>(a);
    return true;
}

template <typename T>
void rope_all(const Rope& a) {
    const int64_t head = a.width / a.heads, half = head / 2;
    const int64_t norms = a.per_head ? head : a.width;
    float* weights = static_cast<float*>(room(Use::tables, sizeof(float) * 2 * norms));
    widen(a.q_weight, 0, norms, weights);
    widen(a.k_weight, 0, norms, weights + norms);
    const int64_t rows = a.batch * a.tokens;
    spread((rows + SOME - 1) / SOME, a.threads, [&](int64_t part) {
        float* row = static_cast<float*>(room(Use::part, sizeof(float) * (a.width + 2 * half)));
        float *cos = row + a.width, *sin = cos + half;
        for (int64_t i = part * SOME; i < rows && i < (part + 1) * SOME; ++i) {
            const int64_t b = i / a.tokens, n = i % a.tokens;
            const T* x = reinterpret_cast<const T*>(a.qkv.address) + b * a.qkv.batch + n * a.qkv.token;
            const int64_t added = b * a.rows.batch + n * a.rows.token;
            widen(a.cos, n * a.cos.token, half, cos);
            widen(a.sin, n * a.sin.token, half, sin);
            for (int p = 0; p < 3; ++p, x += a.width) {
                for (int64_t d = 0; d < a.width; d += W) store(row + d, load(x + d));
                if (n < a.length)
                    for (int64_t d = 0; d < a.width; ++d) row[d] += value(a.rows, added + p * a.width + d);
                float inverse = 1;
                if (p < 2 && !a.per_head) {
                    V squares{};
                    for (int64_t d = 0; d < a.width; d += W) squares += load(row + d) * load(row + d);
                    inverse = 1 / std::sqrt(sum(squares) / a.width + a.eps);
                }
                T* to = reinterpret_cast<T*>(p == 0 ? a.q : p == 1 ? a.k : a.v);
                for (int h = 0; h < a.heads; ++h) {
                    const float* in = row + h * head;
                    T* out = to + ((b * a.heads + h) * a.tokens + n) * head;
                    if (p == 2) {
                        for (int64_t d = 0; d < head; d += W) store(out + d, load(in + d));
                        continue;
                    }
                    if (a.per_head) {
                        V squares{};
                        for (int64_t d = 0; d < head; d += W) squares += load(in + d) * load(in + d);
                        inverse = 1 / std::sqrt(sum(squares) / head + a.eps);
                    }
                    const float* w = weights + p * norms + (a.per_head ? 0 : h * head);
                    for (int64_t d = 0; d < half; d += W) {
                        const V u = load(in + d) * inverse * load(w + d), v = load(in + half + d) * inverse * load(w + half + d);
                        const V c = load(cos + d), s = load(sin + d);
                        store(out + d, u * c - v * s);
                        store(out + half + d, u * s + v * c);
                    }
                }
            }
        }
    });
}

bool rope(const Rope& a) {
    if (a.width / a.heads % (2 * W)) return false;
    a.qkv.dtype == Dtype::float32 ? rope_all<float>(a) : rope_all<bf16>(a);
    return true;
}

// x·sigmoid(2u) = gelu_tanh(x), u = sqrt(2/pi)·(x + 0.044715·x³): no difference that cancels where x is negative.
template <bool PRECISE>
INLINE V gelu_of(V x) {
    const V u = x * (x * x * (-2.f * 0.79788456080286535588f * LOG2E * 0.044715f) - 2.f * 0.79788456080286535588f * LOG2E);
#if defined(__AVX512F__)
    // A reciprocal and a step of Newton's: a division takes four times as long. Past 2^126, where it has none, gelu is below that.
    const V d = exp2<PRECISE>((V)_mm512_min_ps(_mm512_set1_ps(126.f), (__m512)u)) + 1.f;
    const V r = (V)_mm512_rcp14_ps((__m512)d);
    return u > 126.f ? all(-0.f) : x * (r * (2.f - d * r));
#else
    return x / (exp2<PRECISE>(u) + 1.f);
#endif
}

// Its derivative σ + x·σ·(1 − σ)·2u', σ = sigmoid(2u); past ten the second part is nothing, and its powers do not overflow.
template <bool PRECISE>
INLINE V gelu_slope(V x) {
    const V z = -larger(all(-10.f), -larger(all(-10.f), x)), square = z * z;
    const V u = z * (square * (-2.f * 0.79788456080286535588f * LOG2E * 0.044715f) - 2.f * 0.79788456080286535588f * LOG2E);
    const V d = exp2<PRECISE>(u) + 1.f;
#if defined(__AVX512F__)
    const V r = (V)_mm512_rcp14_ps((__m512)larger(all(0.f), -larger(all(-1e38f), -d))), s = r * (2.f - d * r);
#else
    const V s = 1.f / d;
#endif
    return s + z * s * (1.f - s) * (square * (6.f * 0.79788456080286535588f * 0.044715f) + 2.f * 0.79788456080286535588f);
}

template <typename T>
void gelu_all(const Gelu& a) {
    const T *x = reinterpret_cast<const T*>(a.x), *g = reinterpret_cast<const T*>(a.gradient);
    T* out = reinterpret_cast<T*>(a.out);
    constexpr int64_t piece = 1 << 14;
    constexpr bool precise = sizeof(T) == 4;
    spread((a.size + piece - 1) / piece, a.threads, [&](int64_t i) {
        const int64_t end = (i + 1) * piece < a.size ? (i + 1) * piece : a.size;
        int64_t d = i * piece;
        if (g) {
            for (; d + W <= end; d += W) store(out + d, gelu_slope<precise>(load(x + d)) * load(g + d));
            if (d < end) put(out + d, gelu_slope<precise>(some(x + d, end - d)) * some(g + d, end - d), end - d);
            return;
        }
        for (; d + W <= end; d += W) store(out + d, gelu_of<precise>(load(x + d)));
        if (d < end) put(out + d, gelu_of<precise>(some(x + d, end - d)), end - d);
    });
}

bool gelu(const Gelu& a) {
    a.dtype == Dtype::float32 ? gelu_all<float>(a) : gelu_all<bf16>(a);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
