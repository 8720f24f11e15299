// softmax(q kᵀ·scale + bias) v for a block of queries in one sweep over the keys, with a running maximum and sum (Milakov and
// Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
//
// Everything is transposed: queries lie along the lanes of a vector, keys and dimensions of a head are rows. Then keys and
// values are read as they lie, one number at a time for all lanes, nothing of them is laid out anew, and maximum and sum need
// no step across lanes. A block's logits and its part of the output stay in the first cache, keys and values in the second.
#pragma once

#include "vec.h"

namespace ebr::cpu {
namespace {

// Rows and vectors of a product that stays in registers: 24 of AVX-512's 32, 12 of the 16 that others have.
constexpr int R = W == 16 ? 8 : 4;
constexpr int C = 3;
constexpr int KEYS = 64;  // whose logits are made before they are used

// acc[r] = Σ_k a[r·ar + k·ak] · b[k·c + ...], the sum of `depth` products, over c vectors.
template <int r, int c>
INLINE void product(V (&acc)[r][c], const float* a, int64_t ar, int64_t ak, const float* b, int64_t depth) {
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) acc[i][j] = V{};
    for (int64_t k = 0; k < depth; ++k, a += ak, b += c * W) {
        V x[c];
        for (int j = 0; j < c; ++j) x[j] = load(b + j * W);
        for (int i = 0; i < r; ++i) {
            const V s = all(a[i * ar]);
            for (int j = 0; j < c; ++j) acc[i][j] += s * x[j];
        }
    }
}

// Logits of r keys, and the largest so far of every query.
template <int r, int c>
INLINE void logits(const float* k, int64_t stride, const float* bias, const float* q, int width, float* s, V (&largest)[c]) {
    V acc[r][c];
    product<r, c>(acc, k, stride, 1, q, width);
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) {
            const V x = bias ? acc[i][j] + bias[i] * LOG2E : acc[i][j];
            largest[j] = larger(x, largest[j]);
            store(s + (i * c + j) * W, x);
        }
}

// out = out·shrink + Σ_keys v·p for r dimensions.
template <int r, int c>
INLINE void mix(const float* v, int64_t stride, const float* p, int64_t keys, const V (&shrink)[c], float* out) {
    V acc[r][c];
    product<r, c>(acc, v, 1, stride, p, keys);
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) {
            float* o = out + (i * c + j) * W;
            store(o, load(o) * shrink[j] + acc[i][j]);
        }
}

// Rows of float32: as they are, or converted into `kept`.
INLINE const float* floats(const float* x, int64_t& stride, int64_t, int, float*) { return x; }
INLINE const float* floats(const bf16* x, int64_t& stride, int64_t rows, int width, float* kept) {
    for (int64_t i = 0; i < rows; ++i) {
        int d = 0;
        for (; d + W <= width; d += W) store(kept + i * width + d, load(x + i * stride + d));
        for (; d < width; ++d) kept[i * width + d] = one(x + i * stride + d);
    }
    stride = width;
    return kept;
}

template <typename T>
const T* at(const Heads& x, int64_t b, int64_t h, int64_t n) {
    return reinterpret_cast<const T*>(x.address) + b * x.batch + h * x.head + n * x.token;
}

// Up to c vectors of queries from `first` on.
template <typename T, int c>
void attend(const Attention& a, int64_t b, int64_t h, int64_t first) {
    constexpr int lanes = c * W;
    const int width = a.width;
    const int64_t count = a.queries - first < lanes ? a.queries - first : lanes;
    float* q = static_cast<float*>(room(Use::part, sizeof(float) * (size_t(lanes) * (3 * width + KEYS) + 2 * KEYS * width)));
    float *out = q + lanes * width, *total = out + lanes * width, *s = total + lanes * width, *k_room = s + lanes * KEYS;
    float* v_room = k_room + KEYS * width;

    const float scale = a.scale * LOG2E;
    for (int64_t i = 0; i < lanes; ++i) {
        const T* x = at<T>(a.q, b, h, first + (i < count ? i : 0));
        for (int d = 0; d < width; ++d) q[d * lanes + i] = i < count ? one(x + d) * scale : 0.f;
    }
    for (int n = 0; n < a.count; ++n) {
        const Branch& branch = a.branches[n];
        V largest[c], sums[c];
        for (int j = 0; j < c; ++j) largest[j] = all(-std::numeric_limits<float>::max()), sums[j] = V{};
        std::memset(out, 0, sizeof(float) * lanes * width);
        for (int64_t start = 0; start < branch.keys; start += KEYS) {
            const int keys = static_cast<int>(branch.keys - start < KEYS ? branch.keys - start : KEYS);
            int64_t k_stride = branch.k.token, v_stride = branch.v.token;
            const float* k = floats(at<T>(branch.k, b, h, start), k_stride, keys, width, k_room);
            const float* v = floats(at<T>(branch.v, b, h, start), v_stride, keys, width, v_room);
            const float* bias = branch.bias ? reinterpret_cast<const float*>(branch.bias) + start : nullptr;
            V before[c], shrink[c];
            for (int j = 0; j < c; ++j) before[j] = largest[j];
            int i = 0;
            for (; i + R <= keys; i += R)
                logits<R, c>(k + i * k_stride, k_stride, bias ? bias + i : nullptr, q, width, s + i * lanes, largest);
            for (; i < keys; ++i)
                logits<1, c>(k + i * k_stride, k_stride, bias ? bias + i : nullptr, q, width, s + i * lanes, largest);
            for (int j = 0; j < c; ++j) {
                shrink[j] = exp2<true>(before[j] - largest[j]);
                sums[j] *= shrink[j];
            }
            for (i = 0; i < keys; ++i)
                for (int j = 0; j < c; ++j) {
                    float* x = s + (i * c + j) * W;
                    const V p = exp2<sizeof(T) == 4>(load(x) - largest[j]);
                    sums[j] += p;
                    store(x, p);
                }
            for (int d = 0; d < width; d += R) mix<R, c>(v + d, v_stride, s, keys, shrink, out + d * lanes);
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
        T* x = const_cast<T*>(at<T>(a.out, b, h, first + i));
        for (int d = 0; d < width; ++d) set(x + d, total[d * lanes + i]);
    }
}

template <typename T>
void attend_all(const Attention& a) {
    const int64_t blocks = (a.queries + C * W - 1) / (C * W);
    spread(a.batch * a.heads * blocks, a.threads, [&](int64_t i) {
        const int64_t block = i % blocks, h = i / blocks % a.heads, b = i / blocks / a.heads, first = block * C * W;
        const int64_t left = a.queries - first;
        if (left <= W) return attend<T, 1>(a, b, h, first);
        if (left <= 2 * W) return attend<T, 2>(a, b, h, first);
        return attend<T, C>(a, b, h, first);
    });
}

bool attention(const Attention& a) {
    if (a.width % 8 || a.width > LARGEST_HEAD || !a.count) return false;
    for (int n = 0; n < a.count; ++n)
        if (a.branches[n].keys < 1) return false;
    a.dtype == Dtype::float32 ? attend_all<float>(a) : attend_all<bf16>(a);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
