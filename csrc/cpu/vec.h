// Vectors of float32 as wide as the level's registers, and the arithmetic that all operations share.
//
// Included by one level_*.cpp each, compiled for its instructions: everything here has internal linkage, so that no function
// compiled for a newer CPU is ever linked into an older one's path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ops.h"

namespace ebr::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));
using bf16 = uint16_t;

#define INLINE inline __attribute__((always_inline))

constexpr float LOG2E = 1.44269504088896340736f;

INLINE V all(float x) { return x - V{}; }  // -0 stays -0
INLINE V load(const float* x) {
    V v;
    std::memcpy(&v, x, sizeof v);
    return v;
}
INLINE void store(float* x, V v) { std::memcpy(x, &v, sizeof v); }

INLINE V load(const bf16* x) {
    H h;
    std::memcpy(&h, x, sizeof h);
    return (V)(__builtin_convertvector(h, U) << 16);
}
// To the nearest even; NaN stays NaN.
INLINE void store(bf16* x, V v) {
#if defined(__AVX512BF16__)
    const auto h = _mm512_cvtneps_pbh((__m512)v);
#else
    U u = (U)v;
    U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    rounded = v == v ? rounded : (u >> 16) | 0x40u;
    const H h = __builtin_convertvector(rounded, H);
#endif
    std::memcpy(x, &h, sizeof h);
}
INLINE float one(const float* x) { return *x; }
INLINE float one(const bf16* x) {
    const uint32_t u = static_cast<uint32_t>(*x) << 16;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}
INLINE void set(float* x, float f) { *x = f; }
INLINE void set(bf16* x, float f) {
    uint32_t u;
    std::memcpy(&u, &f, sizeof u);
    *x = static_cast<bf16>(f == f ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u);
}

// The larger; where either is NaN, b.
INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// By halves: one after another the lanes would take as long as a row.
INLINE float sum(V v) {
    typedef float Four __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
    const __m256 eight = (__m256)v;
#endif
#if defined(__AVX2__)
    const Four four = (Four)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
    const Four four = v;
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// 2^x; a polynomial of 2^f, f in [0, 1), that is 1 at 0: relative error 9e-5 (PRECISE: 9e-8). NaN stays NaN.
template <bool PRECISE>
INLINE V exp2(V x) {
#if defined(__AVX512F__)
    const V f = (V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    x = larger(all(-126.f), x);
    x = x > 128.f ? all(128.f) : x;  // whose power has the bits of infinity
#if defined(__AVX2__)
    const V whole = (V)_mm256_floor_ps((__m256)x);
#else
    const V whole = __builtin_convertvector(__builtin_convertvector(x + 128.f, I) - 128, V);  // x + 128 > 0: cut is floor
#endif
    const V f = x - whole;
#endif
    V p;
    if constexpr (PRECISE) {
        p = all(0.001867130515165627f);
        p = p * f + 0.009017028845846653f;
        p = p * f + 0.05579991266131401f;
        p = p * f + 0.24016444385051727f;
        p = p * f + 0.6931512951850891f;
    } else {
        p = all(0.0770670622587204f);
        p = p * f + 0.22764495015144348f;
        p = p * f + 0.6951168179512024f;
    }
    p = p * f + 1.f;
#if defined(__AVX512F__)
    return (V)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return p * (V)((__builtin_convertvector(whole, I) + 127) << 23);
#endif
}

#if defined(__AVX512F__)
// Transposes 16 x 16 numbers of 32 bits.
INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif

#if defined(__AVX512BF16__)
// The order that makes pairs of two vectors of bf16 that lie after each other.
INLINE __m512i by_pairs() {
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_load_si512(order);
}
#endif

// Transposes W x W numbers.
INLINE void transpose(V (&r)[W]) {
#if defined(__AVX512F__)
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = (__m512i)r[i];
    transpose(rows);
    for (int i = 0; i < 16; ++i) r[i] = (V)rows[i];
#elif defined(__AVX2__)
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        r[i] = (V)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = (V)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
#else
    for (int i = 0; i < W; ++i)
        for (int j = i + 1; j < W; ++j) {
            const float kept = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = kept;
        }
#endif
}

}  // namespace
}  // namespace ebr::cpu
