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

INLINE float sum(V v) {
    float total = 0;
    for (int i = 0; i < W; ++i) total += v[i];
    return total;
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

}  // namespace
}  // namespace ebr::cpu
