// What the row-wise kernels share: how a row lies on threads, 16-byte loads and stores, reductions, the cast to fp8.
//
// A thread holds ELEMENTS of a row in registers as float32: two vectors of a 16-bit dtype, four of float32. Up to 512 elements
// a row is a warp's and a block has ROWS_OF_A_BLOCK of them; beyond, a row is a block's, with as many warps as it needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "ops.h"

namespace ebr {

constexpr int WARP = 32;
constexpr int ELEMENTS = 16;
constexpr int ROWS_OF_A_BLOCK = 4;
constexpr int LARGEST_BLOCK = 1024;
constexpr int LARGEST_WIDTH = ELEMENTS * LARGEST_BLOCK;

using E4m3 = __nv_fp8_storage_t;

template <typename T>
constexpr int VECTOR = 16 / sizeof(T);  // elements of an activation that are loaded at once

template <typename T>
using Row = float[ELEMENTS / VECTOR<T>][VECTOR<T>];

template <typename T>
__device__ T* at(const Rows& rows) {
    return reinterpret_cast<T*>(rows.address);
}

template <int BYTES>
using Chunk = std::conditional_t<BYTES % 16 == 0, uint4, std::conditional_t<BYTES % 8 == 0, uint2, unsigned>>;

enum class Reuse { once, often };  // a load that is used once does not push tables out of the first-level cache

template <Reuse REUSE, typename T, int COUNT>
__device__ void load(const T* from, float (&to)[COUNT]) {
    using Access = Chunk<COUNT * sizeof(T)>;
    constexpr int ACCESSES = COUNT * sizeof(T) / sizeof(Access);
    Access chunks[ACCESSES];
#pragma unroll
    for (int i = 0; i < ACCESSES; ++i) {
        const Access* address = reinterpret_cast<const Access*>(from) + i;
        chunks[i] = REUSE == Reuse::once ? __ldcs(address) : __ldg(address);
    }
    T elements[COUNT];
    std::memcpy(elements, chunks, sizeof(elements));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = static_cast<float>(elements[i]);
}

// A table's elements, whatever its dtype: all threads take the same way, which costs less than a kernel for each dtype.
template <int COUNT>
__device__ void load(const Rows& table, int64_t offset, float (&to)[COUNT]) {
    if (table.dtype == Dtype::float32)
        load<Reuse::often>(at<const float>(table) + offset, to);
    else if (table.dtype == Dtype::bfloat16)
        load<Reuse::often>(at<const __nv_bfloat16>(table) + offset, to);
    else
        load<Reuse::often>(at<const __half>(table) + offset, to);
}

// Two elements rounded to nearest, even; to e4m3, what is beyond the largest becomes the largest.
template <typename T>
__device__ auto pack(float first, float second) {
    if constexpr (std::is_same_v<T, float>)
        return make_float2(first, second);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __floats2bfloat162_rn(first, second);
    else if constexpr (std::is_same_v<T, __half>)
        return __floats2half2_rn(first, second);
    else
        return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

template <typename T, int COUNT>
__device__ void store(T* to, const float (&from)[COUNT]) {
    using Access = Chunk<COUNT * sizeof(T)>;
    static_assert(sizeof(Access) == COUNT * sizeof(T), "one store an activation vector");
    decltype(pack<T>(0, 0)) pairs[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) pairs[i] = pack<T>(from[2 * i], from[2 * i + 1]);
    Access chunk;
    std::memcpy(&chunk, pairs, sizeof(chunk));
    *reinterpret_cast<Access*>(to) = chunk;
}

// Which row a warp has; past the last one it has nothing to do.
__device__ inline unsigned row_index() { return blockIdx.x * blockDim.y + threadIdx.y; }

// Calls f(i, column) for the vectors of a row that this thread holds.
template <typename T, typename F>
__device__ void each_vector(int width, F f) {
#pragma unroll
    for (int i = 0; i < ELEMENTS / VECTOR<T>; ++i) {
        const int column = (i * blockDim.x + threadIdx.x) * VECTOR<T>;
        if (column < width) f(i, column);
    }
}

template <typename Combine, typename T>
__device__ T reduce_warp(T value, Combine combine, int lanes = WARP) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}

// Over the threads of a row; all of them get the result. STAGE differs between the reductions of a kernel, so that each has
// its own shared memory and one barrier is enough.
template <int STAGE, typename T, typename Combine>
__device__ T reduce_row(T value, Combine combine) {
    value = reduce_warp(value, combine);
    if (blockDim.x == WARP) return value;
    __shared__ T of_warp[LARGEST_BLOCK / WARP];
    const unsigned lane = threadIdx.x % WARP;
    if (lane == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    return reduce_warp(lane < blockDim.x / WARP ? of_warp[lane] : T{}, combine);
}

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
    __device__ unsigned operator()(unsigned a, unsigned b) const { return a > b ? a : b; }
};

template <typename T>
__device__ void load_row(const Rows& x, int64_t offset, int width, Row<T>& row) {
    const T* from = at<const T>(x) + offset;
    each_vector<T>(width, [&](int i, int column) { load<Reuse::once>(from + column, row[i]); });
}

// n · weight + bias, n the row without its mean and deviation: two passes over the registers, so that rows far from
// zero keep their variance.
template <typename T>
__device__ void layer_norm(Row<T>& row, const Rows& weight, const Rows& bias, int64_t b, int width, float eps) {
    float sum = 0, squares = 0;
    each_vector<T>(width, [&](int i, int) {
        for (float value : row[i]) sum += value;
    });
    const float mean = reduce_row<0>(sum, Add{}) / width;
    each_vector<T>(width, [&](int i, int) {
        for (float& value : row[i]) {
            value -= mean;
            squares += value * value;
        }
    });
    const float inverse = rsqrtf(reduce_row<1>(squares, Add{}) / width + eps);
    each_vector<T>(width, [&](int i, int column) {
        float scale[VECTOR<T>], shift[VECTOR<T>];
        load(weight, b * weight.batch + column, scale);
        load(bias, b * bias.batch + column, shift);
#pragma unroll
        for (int j = 0; j < VECTOR<T>; ++j) row[i][j] = row[i][j] * inverse * scale[j] + shift[j];
    });
}

// Writes a row of a contiguous result in dtype Out; e4m3 gets a scale, as in quantize_fp8_ref: both divisions are products with
// a reciprocal rounded to float32, never fused.
template <typename Out, typename T>
__device__ void store_row(const Rows& out, const Rows& scale, unsigned index, int width, Row<T>& row) {
    if constexpr (std::is_same_v<Out, E4m3>) {
        unsigned bits = 0;  // absolute values compare as their bits do, and NaN is the largest
        each_vector<T>(width, [&](int i, int) {
            for (float value : row[i]) bits = Max{}(bits, __float_as_uint(fabsf(value)));
        });
        const float largest = __uint_as_float(reduce_row<2>(bits, Max{}));
        float size = __fmul_rn(largest, static_cast<float>(1.0 / 448));
        size = size < 1e-12f ? 1e-12f : size;
        if (threadIdx.x == 0) at<float>(scale)[index] = size;
        const float inverse = __frcp_rn(size);
        each_vector<T>(width, [&](int i, int) {
            for (float& value : row[i]) value = __fmul_rn(value, inverse);
        });
    }
    Out* to = at<Out>(out) + static_cast<int64_t>(index) * width;
    each_vector<T>(width, [&](int i, int column) { store(to + column, row[i]); });
}

// Whether a kernel can load an input: in its dtype, 16 bytes at once.
inline bool loadable(const Rows& rows) {
    if (rows.dtype == Dtype::float8_e4m3fn) return false;
    const int64_t size = rows.dtype == Dtype::float32 ? 4 : 2;
    const auto whole = [&](int64_t elements) { return elements * size % 16 == 0; };
    return rows.address % 16 == 0 && whole(rows.batch) && whole(rows.token);
}

// Calls f with a value of the activation's type; false if it has none.
template <typename F>
bool with_type(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::float32: return f(float{});
        case Dtype::bfloat16: return f(__nv_bfloat16{});
        case Dtype::float16: return f(__half{});
        default: return false;
    }
}

// Runs a kernel with `rows` rows of `width` elements.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t rows, int width, Stream stream, Arguments... arguments) {
    cudaLaunchConfig_t config{};
    const unsigned warps = (width + WARP * ELEMENTS - 1) / (WARP * ELEMENTS);
    config.blockDim = dim3(warps * WARP, warps == 1 ? ROWS_OF_A_BLOCK : 1);
    config.gridDim = dim3((rows + config.blockDim.y - 1) / config.blockDim.y);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Whether rows of a type lie on threads, and their number fits a grid.
template <typename T>
bool fits(const Shape& shape, int64_t rows) {
    return shape.width % VECTOR<T> == 0 && shape.width <= LARGEST_WIDTH && rows <= INT32_MAX;
}

}  // namespace ebr
