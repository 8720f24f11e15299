// The row-wise operations as the binding calls them; what they compute is defined by the references in kernels/<op>.py.
//
// An operation returns false, having done nothing, if its kernel cannot serve this layout: a row that is too long or not of
// whole 16-byte vectors, memory not aligned to them, a dtype it has no kernel for. It throws std::runtime_error if CUDA
// refuses the launch.
#pragma once

#include <cstdint>

namespace ebr {

enum class Dtype : int { float32, bfloat16, float16, float8_e4m3fn };

// Rows of elements that lie side by side; strides in elements, from sample to sample and from token to token, 0 if shared.
struct Rows {
    uintptr_t address;  // 0: an input that is left out
    int64_t batch, token;
    Dtype dtype;
};

struct Shape {
    int64_t batch, tokens;
    int width;
};

using Stream = uintptr_t;  // a cudaStream_t

// Results are contiguous, their strides are not read. `out` is of x's dtype, or e4m3 with a `scale` [batch, tokens] float32.
bool layer_norm_modulate(const Rows& x, const Rows& weight, const Rows& bias, const Rows& out, const Rows& scale,
                         const Shape& shape, float eps, Stream stream);

// `total` is the new residual stream, in x's dtype; without `gate` it is x + y.
bool gated_residual_norm(const Rows& x, const Rows& y, const Rows& gate, const Rows& weight, const Rows& bias, const Rows& total,
                         const Rows& out, const Rows& scale, const Shape& shape, float eps, Stream stream);

// `shape.width` is that of q: heads · head width. `rows` are added to the first `length` tokens. `per_head`: the norm is of each
// head alone, its weights as long as a head. q, k, v: [batch, heads, tokens, head width] in qkv's dtype.
bool qk_norm_rope(const Rows& qkv, const Rows& q_weight, const Rows& k_weight, const Rows& cos, const Rows& sin, const Rows& rows,
                  int64_t length, const Rows& q, const Rows& k, const Rows& v, const Shape& shape, int heads, bool per_head,
                  float eps, Stream stream);

bool quantize_fp8(const Rows& x, const Rows& values, const Rows& scale, const Shape& shape, Stream stream);

}  // namespace ebr
