// softmax(q kᵀ·scale + bias) v for a block of queries in one sweep over the keys (Milakov and Gimelshein, arXiv 1805.02867; Dao
// et al., arXiv 2205.14135).
//
// Everything is transposed: queries lie along the lanes of a vector, keys and dimensions of a head are rows. Then keys and
// values are read as they lie, one number at a time for all lanes, and maximum and sum need no step across lanes. A block's
// likelihoods and its part of the output stay in the first cache, keys and values in the second.
//
// The unit of all memory is four bytes: a float32, or, where the CPU multiplies bf16, a pair of it, whose products are added.
#pragma once

#include "vec.h"

namespace ebr::cpu {
namespace {

// Rows and vectors of a product that stays in registers: 24 of AVX-512's 32, 12 of the 16 that others have.
constexpr int R = W == 16 ? 8 : 4;
constexpr int C = 3;
constexpr int ROWS = 64;              // of likelihoods that are made before they are used
constexpr float LARGEST_LOGIT = 60.f;  // to base 2, up to which no likelihood underflows without the running maximum
constexpr int64_t FEWEST = 64;        // queries and keys for which it pays to know the largest key

#if defined(__AVX512BF16__)
template <typename T>
constexpr bool PAIRS = sizeof(T) == 2;
#else
template <typename T>
constexpr bool PAIRS = false;
#endif
template <typename T>
constexpr int PER_UNIT = PAIRS<T> ? 2 : 1;
template <typename T>
constexpr int KEYS = ROWS * PER_UNIT<T>;

// acc[r] += Σ_k a[r·ar + k·ak] · b[k·bk + ...], the sum of `depth` products, over c vectors.
template <typename T, int r, int c>
INLINE void product(V (&acc)[r][c], const float* a, int64_t ar, int64_t ak, const float* b, int64_t bk, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += ak, b += bk) {
        V x[c];
        for (int j = 0; j < c; ++j) x[j] = load(b + j * W);
        for (int i = 0; i < r; ++i) {
#if defined(__AVX512BF16__)
            if constexpr (PAIRS<T>) {
                int32_t pair;
                std::memcpy(&pair, a + i * ar, sizeof pair);
                const auto s = (__m512bh)_mm512_set1_epi32(pair);
                for (int j = 0; j < c; ++j) acc[i][j] = (V)_mm512_dpbf16_ps((__m512)acc[i][j], s, (__m512bh)x[j]);
                continue;
            }
#endif
            const V s = all(a[i * ar]);
            for (int j = 0; j < c; ++j) acc[i][j] += s * x[j];
        }
    }
}

// Likelihoods of a unit of keys from their logits, and their sum: of what was rounded, since likelihoods that are alike are all
// rounded to the same side.
template <typename T>
INLINE V likelihood(V first, V second, float scale, V largest, V& sum) {
    const V p = exp2<sizeof(T) == 4>(first * scale - largest);
#if defined(__AVX512BF16__)
    if constexpr (PAIRS<T>) {
        const V q = exp2<false>(second * scale - largest);
        const __m512i both = _mm512_permutexvar_epi16(by_pairs(), (__m512i)_mm512_cvtne2ps_pbh((__m512)q, (__m512)p));
        sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)_mm512_set1_epi16(0x3f80));
        return (V)both;
    }
#endif
    sum += p;
    return p;
}

// Logits of r keys to s, before they are scaled.
template <typename T, int r, int c>
INLINE void logits(const float* k, int64_t stride, const float* q, int units, float* s) {
    V acc[r][c] = {};
    product<T, r, c>(acc, k, stride, 1, q, c * W, units);
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) store(s + (i * c + j) * W, acc[i][j]);
}

// Likelihoods of r keys, where a maximum is known beforehand.
template <typename T, int r, int c>
INLINE void likelihoods(const float* k, int64_t stride, const float* q, int units, float scale, const V (&largest)[c],
                        V (&sums)[c], float* p) {
    constexpr int per = PER_UNIT<T>, rows = (r + per - 1) / per;
    V acc[rows * per][c] = {};
    if constexpr (r < per)  // a last key without its second
        for (int j = 0; j < c; ++j) acc[1][j] = all(-std::numeric_limits<float>::infinity());
    product<T, r, c>(reinterpret_cast<V(&)[r][c]>(acc), k, stride, 1, q, c * W, units);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < c; ++j)
            store(p + (i * c + j) * W, likelihood<T>(acc[i * per][j], acc[i * per + per - 1][j], scale, largest[j], sums[j]));
}

// out = out·shrink + Σ_rows v·p for r dimensions; no shrinking where SHRINK is false.
template <typename T, bool SHRINK, int r, int c>
INLINE void mix(const float* v, int64_t stride, const float* p, int64_t rows, const V (&shrink)[c], float* out) {
    V acc[r][c];
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) {
            const V o = load(out + (i * c + j) * W);
            acc[i][j] = SHRINK ? o * shrink[j] : o;
        }
    product<T, r, c>(acc, v, 1, stride, p, c * W, rows);
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < c; ++j) store(out + (i * c + j) * W, acc[i][j]);
}

template <typename T>
const T* at(const Heads& x, int64_t b, int64_t h, int64_t n) {
    return reinterpret_cast<const T*>(x.address) + b * x.batch + h * x.head + n * x.token;
}

// W units of a row.
template <typename T>
INLINE V units_at(const T* x) {
    if constexpr (PAIRS<T>) return load(reinterpret_cast<const float*>(x));
    else return load(x);
}

// Rows as units from `x` on: as they lie, or converted into `kept`.
template <typename T>
INLINE const float* as_units(const T* x, int64_t& stride, int64_t rows, int width, float* kept) {
    if constexpr (sizeof(T) == 4 || PAIRS<T>) {
        stride /= PER_UNIT<T>;
        return reinterpret_cast<const float*>(x);
    } else {
        for (int64_t i = 0; i < rows; ++i) {
            int d = 0;
            for (; d + W <= width; d += W) store(kept + i * width + d, load(x + i * stride + d));
            for (; d < width; ++d) kept[i * width + d] = one(x + i * stride + d);
        }
        stride = width;
        return kept;
    }
}

// Rows from `first` on in pairs, [rows / 2] units of a width, `stride` apart; an odd last row is paired with zeros.
template <typename T>
void pair_rows(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t rows, int width, int64_t stride, float* to) {
#if defined(__AVX512BF16__)
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i)
        for (int half = 0; half < 2; ++half) order[half][i] = static_cast<uint16_t>(16 * half + i / 2 + i % 2 * 32);
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t n = 0; n < rows; n += 2, to += stride) {
        const T *x = at<T>(from, b, h, first + n), *y = n + 1 < rows ? at<T>(from, b, h, first + n + 1) : nullptr;
        int d = 0;
        for (; d + 32 <= width; d += 32) {
            const __m512i u = _mm512_loadu_si512(x + d), v = y ? _mm512_loadu_si512(y + d) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(u, low, v));
            _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(u, high, v));
        }
        for (; d < width; ++d) {
            const uint32_t pair = x[d] | static_cast<uint32_t>(y ? y[d] : 0) << 16;
            std::memcpy(to + d, &pair, sizeof pair);
        }
    }
#endif
}

// The largest norm of a head's keys; NaN or infinity if one of them is not finite.
template <typename T>
float largest_key(const Branch& branch, int64_t b, int64_t h, int width) {
    float most = 0;
    for (int64_t n = 0; n < branch.keys; ++n) {
        const T* x = at<T>(branch.k, b, h, n);
        V squares{};
        int d = 0;
        for (; d + W <= width; d += W) squares += load(x + d) * load(x + d);
        float square = sum(squares);
        for (; d < width; ++d) square += one(x + d) * one(x + d);
        most = square <= most ? most : square;
        if (square != square) return square;
    }
    return std::sqrt(most);
}

// What is known of a head before its queries are met.
struct Known {
    const float* pairs;  // values in pairs, where they are used
    float largest;       // norm of a key; NaN where it is not known
};

// A sweep over the keys of a branch: the weighted sum of values to out [width][c], unscaled, and the sums of the weights.
template <typename T, bool BOUNDED, int c>
void sweep(const Branch& branch, const Known& known, int64_t b, int64_t h, const float* q, int width, float scale,
           V (&largest)[c], V (&sums)[c], float* s, float* out) {
    constexpr int per = PER_UNIT<T>, lanes = c * W;
    const int units = width / per;
    float *k_room = s + KEYS<T> * lanes, *v_room = k_room + ROWS * width;
    for (int64_t start = 0; start < branch.keys; start += KEYS<T>) {
        const int keys = static_cast<int>(branch.keys - start < KEYS<T> ? branch.keys - start : KEYS<T>);
        const int rows = (keys + per - 1) / per;
        int64_t k_stride = branch.k.token, v_stride = branch.v.token;
        const float* k = as_units(at<T>(branch.k, b, h, start), k_stride, keys, width, k_room);
        const float* v = known.pairs + start / per * width;
        if constexpr (PAIRS<T>) v_stride = width;
        else v = as_units(at<T>(branch.v, b, h, start), v_stride, keys, width, v_room);
        V shrink[c];
        int i = 0;
        if constexpr (BOUNDED) {
            for (; i + R <= keys; i += R)
                likelihoods<T, R, c>(k + i * k_stride, k_stride, q, units, scale, largest, sums, s + i / per * lanes);
            for (; i + per <= keys; i += per)
                likelihoods<T, per, c>(k + i * k_stride, k_stride, q, units, scale, largest, sums, s + i / per * lanes);
            if (i < keys) likelihoods<T, 1, c>(k + i * k_stride, k_stride, q, units, scale, largest, sums, s + i / per * lanes);
        } else {
            const float* bias = branch.bias ? reinterpret_cast<const float*>(branch.bias) + start : nullptr;
            for (; i + R <= keys; i += R) logits<T, R, c>(k + i * k_stride, k_stride, q, units, s + i * lanes);
            for (; i < keys; ++i) logits<T, 1, c>(k + i * k_stride, k_stride, q, units, s + i * lanes);
            for (int j = 0; j < c; ++j) shrink[j] = largest[j];
            for (i = 0; i < keys; ++i)
                for (int j = 0; j < c; ++j) {
                    float* x = s + (i * c + j) * W;
                    const V logit = bias ? load(x) * scale + bias[i] * LOG2E : load(x) * scale;
                    largest[j] = larger(logit, largest[j]);
                    store(x, logit);
                }
            for (; i < rows * per; ++i)
                for (int j = 0; j < c; ++j) store(s + (i * c + j) * W, all(-std::numeric_limits<float>::infinity()));
            for (int j = 0; j < c; ++j) {
                shrink[j] = exp2<true>(shrink[j] - largest[j]);
                sums[j] *= shrink[j];
            }
            for (i = 0; i < rows; ++i)  // in place: a row is written when it has been read
                for (int j = 0; j < c; ++j) {
                    const float* x = s + (i * per * c + j) * W;
                    store(s + (i * c + j) * W, likelihood<T>(load(x), load(x + (per - 1) * lanes), 1.f, largest[j], sums[j]));
                }
        }
        for (int d = 0; d < width; d += R) mix<T, !BOUNDED, R, c>(v + d, v_stride, s, rows, shrink, out + d * lanes);
    }
}

// `count` queries from `first` on as columns, [units][c] vectors, the rest zeros; returns the square of the largest norm.
template <typename T, int c>
float columns(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t count, int width, float* q) {
    constexpr int lanes = c * W, per = PER_UNIT<T>;
    const int units = width / per;
    float longest = 0;
    for (int j = 0; j < c; ++j) {
        V squares{};
        for (int d = 0; d < units; d += W) {
            V columns[W];
            for (int i = 0; i < W; ++i) {
                const int64_t n = j * W + i;
                const T* x = at<T>(from, b, h, first + (n < count ? n : 0)) + d * per;
                if (n >= count) columns[i] = V{};
                else if (d + W <= units) columns[i] = units_at(x);
                else {  // a head that is no multiple of a vector
                    columns[i] = V{};
                    std::memcpy(&columns[i], x, (units - d) * per * sizeof(T) * (sizeof(T) * per == 4));
                    if constexpr (sizeof(T) * per != 4)
                        for (int l = 0; l < units - d; ++l) columns[i][l] = one(x + l);
                }
            }
            transpose(columns);
            for (int i = 0; i < W && d + i < units; ++i) {
                store(q + (d + i) * lanes + j * W, columns[i]);
                if constexpr (PAIRS<T>) {
                    const V low = (V)((U)columns[i] << 16), high = (V)((U)columns[i] & 0xffff0000u);
                    squares += low * low + high * high;
                } else squares += columns[i] * columns[i];
            }
        }
        for (int i = 0; i < W; ++i) longest = squares[i] <= longest ? longest : squares[i];
    }
    return longest;
}

// Columns [width][c] of float32 as `count` rows from `first` on.
template <typename T, int c>
void store_columns(const float* columns, const Heads& to, int64_t b, int64_t h, int64_t first, int64_t count, int width) {
    for (int j = 0; j < c; ++j)
        for (int d = 0; d < width; d += W) {
            V rows[W] = {};
            for (int i = 0; i < W && d + i < width; ++i) rows[i] = load(columns + (d + i) * c * W + j * W);
            transpose(rows);
            for (int i = 0; i < W && j * W + i < count; ++i) {
                T* x = const_cast<T*>(at<T>(to, b, h, first + j * W + i)) + d;
                if (d + W <= width) store(x, rows[i]);
                else
                    for (int l = 0; l < width - d; ++l) set(x + l, rows[i][l]);
            }
        }
}

// Up to c vectors of queries from `first` on.
template <typename T, int c>
void attend(const Attention& a, const Known* known, int64_t b, int64_t h, int64_t first) {
    constexpr int lanes = c * W;
    const int width = a.width;
    const int64_t count = a.queries - first < lanes ? a.queries - first : lanes;
    float* q = static_cast<float*>(room(Use::part, sizeof(float) * (size_t(lanes) * (3 * width + KEYS<T>) + 2 * ROWS * width)));
    float *out = q + lanes * width, *total = out + lanes * width, *s = total + lanes * width;

    const float longest = columns<T, c>(a.q, b, h, first, count, width, q);
    const float scale = a.scale * LOG2E;
    for (int n = 0; n < a.count; ++n) {
        const Branch& branch = a.branches[n];
        // |q·k| ≤ |q||k|: where that bound is small it serves as the maximum, and nothing has to be scaled again. NaN: not so.
        const float bound = std::sqrt(longest) * scale * known[n].largest;
        const bool bounded = bound <= LARGEST_LOGIT;
        V largest[c], sums[c];
        for (int j = 0; j < c; ++j) largest[j] = all(bounded ? bound : -std::numeric_limits<float>::max()), sums[j] = V{};
        std::memset(out, 0, sizeof(float) * lanes * width);
        if (bounded) sweep<T, true, c>(branch, known[n], b, h, q, width, scale, largest, sums, s, out);
        else sweep<T, false, c>(branch, known[n], b, h, q, width, scale, largest, sums, s, out);
        if (a.log_sums) {
            float* to = reinterpret_cast<float*>(a.log_sums) + ((n * a.batch + b) * a.heads + h) * a.queries + first;
            for (int64_t i = 0; i < count; ++i) to[i] = largest[i / W][i % W] / LOG2E + std::log(sums[i / W][i % W]);
        }
        for (int j = 0; j < c; ++j) {
            const V by = branch.weight / sums[j];
            for (int d = 0; d < width; ++d) {
                float *x = out + (d * c + j) * W, *y = total + (d * c + j) * W;
                store(y, n ? load(x) * by + load(y) : load(x) * by);
            }
        }
    }
    store_columns<T, c>(total, a.out, b, h, first, count, width);
}

template <typename T>
void attend_all(const Attention& a) {
    const int64_t heads = a.batch * a.heads;
    size_t units = 0;
    if constexpr (PAIRS<T>)
        for (int n = 0; n < a.count; ++n) units += heads * ((a.branches[n].keys + 1) / 2) * a.width;
    const size_t bytes = (sizeof(Known) * heads * a.count + 63) / 64 * 64;
    char* memory = static_cast<char*>(room(Use::packed, bytes + sizeof(float) * units));
    Known* known = reinterpret_cast<Known*>(memory);
    float* pairs = reinterpret_cast<float*>(memory + bytes);
    spread(heads, a.threads, [&](int64_t i) {
        float* to = pairs;
        for (int n = 0; n < a.count; ++n) {
            const Branch& branch = a.branches[n];
            const int64_t b = i / a.heads, h = i % a.heads, size = (branch.keys + 1) / 2 * a.width;
            const bool worth = !branch.bias && branch.keys >= FEWEST && a.queries >= FEWEST;
            const float largest = worth ? largest_key<T>(branch, b, h, a.width) : std::numeric_limits<float>::quiet_NaN();
            known[i * a.count + n] = {to + i * size, largest};
            if constexpr (PAIRS<T>) {
                pair_rows<T>(branch.v, b, h, 0, branch.keys, a.width, a.width, to + i * size);
                to += heads * size;
            }
        }
    });
    const int64_t blocks = (a.queries + C * W - 1) / (C * W);
    spread(heads * blocks, a.threads, [&](int64_t i) {
        const int64_t block = i % blocks, pair = i / blocks, h = pair % a.heads, b = pair / a.heads, first = block * C * W;
        const int64_t left = a.queries - first;
        const Known* one = known + pair * a.count;
        if (left <= W) return attend<T, 1>(a, one, b, h, first);
        if (left <= 2 * W) return attend<T, 2>(a, one, b, h, first);
        return attend<T, C>(a, one, b, h, first);
    });
}

bool attention(const Attention& a) {
    if (a.width % 8 || a.width > LARGEST_HEAD || !a.count) return false;
    for (int n = 0; n < a.count; ++n) {
        const Branch& branch = a.branches[n];
        if (branch.keys < 1 || (PAIRS<bf16> && a.dtype == Dtype::bfloat16 && branch.k.token % 2)) return false;
    }
    a.dtype == Dtype::float32 ? attend_all<float>(a) : attend_all<bf16>(a);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
