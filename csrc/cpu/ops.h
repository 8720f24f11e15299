// The operations on a CPU as the binding calls them; what they compute is defined by the references in kernels/<op>.py.
//
// A Table has one build of them all: the same templates compiled for a level of instructions (level_*.cpp). Which levels this
// CPU has is asked of the CPU itself when the module is loaded (levels.cpp), and a call names the one that it wants.
//
// Memory comes as addresses: nothing of torch is compiled or linked, so one build serves every version.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ebr::cpu {

constexpr int LARGEST_HEAD = 256;  // attention serves multiples of 8 up to it

enum class Dtype : int { float32, bfloat16 };

// Vectors of elements that lie side by side, at [batch, head, token]; strides in elements, 0 if shared.
struct Heads {
    uintptr_t address;
    int64_t batch, head, token;
};

// One softmax over `keys`, whose weighted sum of values is added to the output; `bias` [keys] float32 or 0, added to the logits.
struct Branch {
    Heads k, v;
    int64_t keys;
    uintptr_t bias;
    float weight;
};

struct Attention {
    Heads q, out;
    const Branch* branches;
    int count;  // of branches
    int64_t batch, heads, queries;
    int width;  // of a head
    float scale;
    uintptr_t log_sums;  // [count, batch, heads, queries] float32, logarithms of the softmaxes' denominators; 0: not wanted
    Dtype dtype;
    int threads;
};

// Gradients of a branch's keys and values, each [splits, batch, heads, keys, `padded` width] float32, 0 where they are not
// wanted; and of its weight, [splits, batch, heads]: to be added up over the splits.
struct BranchGradient {
    uintptr_t dk, dv, dweight;
};

// From `gradient`, the output's, and what attention has left. `out` is attention's result where there is one branch of weight 1
// (0: what it is for is computed again). The queries are split in `splits` parts, which may run side by side.
struct AttentionGradient {
    Heads q, gradient, out, dq;
    const Branch* branches;
    const BranchGradient* gradients;
    int count;
    int64_t batch, heads, queries, splits;
    int width, padded;  // the latter a multiple of every vector
    float scale;
    uintptr_t log_sums;
    Dtype dtype;
    bool rounded;  // gradients of keys and values are wanted in `dtype`, of one split, as wide as a head; few kernels do it
    int threads;
};

// Rows [batch, token] of elements that lie side by side; strides in elements.
struct Rows {
    uintptr_t address;  // 0: an input that is left out
    int64_t batch, token;
    Dtype dtype;
};

// x' = x + gate·y (just x without y) to `total`, its norm by weight and bias to `out`; both contiguous, in x's dtype. Without
// bias it is RMSNorm.
struct Norm {
    Rows x, y, gate, weight, bias;
    uintptr_t total, out;
    int64_t batch, tokens, width;
    float eps;
    int threads;
};

// From the gradients of `total` (or none) and of `out` those of x and, where there is a gate, of y, contiguous; all in one dtype.
// `centred`: the norm is LayerNorm, not RMSNorm. And sums over the tokens of each sample, float32 [batch, width]: of gradient·n, n
// the norm of `total`, of gradient, and of dx·y. An address of 0: not asked for.
struct NormGradient {
    Rows sum_gradient, gradient, total, gate, weight, y;
    uintptr_t dx, dy, weight_sums, bias_sums, gate_sums;
    int64_t batch, tokens, width;
    float eps;
    bool centred;
    int threads;
};

// q, k, v [batch, heads, tokens, head] in qkv's dtype. `per_head`: the norm is of each head alone.
struct Rope {
    Rows qkv, q_weight, k_weight, cos, sin, rows;
    int64_t length;  // of `rows`, in tokens
    uintptr_t q, k, v;
    int64_t batch, tokens, width;
    int heads;
    bool per_head;
    float eps;
    int threads;
};

// The gradient of qkv, contiguous, from those of q, k and v; the rest as in Rope. And those of the norms' weights, float32; an address
// of 0: not asked for.
struct RopeGradient {
    Heads dq, dk, dv;
    Rows qkv, q_weight, k_weight, cos, sin, rows;
    int64_t length;
    uintptr_t dqkv, dq_weight, dk_weight;
    int64_t batch, tokens, width;
    int heads;
    bool per_head;
    float eps;
    int threads;
};

// gelu_tanh of `size` elements; where `gradient` is not 0, its derivative times that.
struct Gelu {
    uintptr_t x, gradient, out;
    int64_t size;
    Dtype dtype;
    int threads;
};

// The norm of every pixel over its channels (`groups` 0: its root mean square, `eps` the least length) or of a frame's groups of
// channels, and SiLU; x and out [frames, pixels, channels] contiguous, weight and bias [channels].
struct ChannelNorm {
    uintptr_t x, out;
    Rows weight, bias;
    int64_t frames, pixels, channels, groups;
    float eps;
    bool silu;
    Dtype dtype;
    int threads;
};

constexpr int64_t LARGEST_FRAMES = 3;  // that a convolution sums over

// out = bias + added + the sum over frames of frame ∗ weight, 3 x 3 with zeros around, in float32.
struct Convolution {
    uintptr_t frame[LARGEST_FRAMES];  // each [height, width, channels] contiguous; 0: zeros
    int64_t frames;
    int doubled;                 // 1: frames have half the height and width, and every pixel counts as 2 x 2
    uintptr_t weight;            // [frames, outputs, 3, 3, channels] contiguous
    uintptr_t bias, added, out;  // [outputs], [height, width, outputs]; bias and added may be 0
    int64_t height, width, channels, outputs;
    int threads;
};

// Of a linear layer in bf16, whose inputs `x` [rows, inputs] and output's `gradient` [rows, outputs] are contiguous: the gradients
// `dw` [outputs, inputs] of the weight and `db` [outputs] of the bias, float32; an address of 0: not asked for.
struct WeightGradient {
    uintptr_t gradient, x, dw, db;
    int64_t rows, outputs, inputs;
    int threads;
};

// Each operation returns false, having done nothing, if it has no kernel for the layout.
struct Table {
    bool (*attention)(const Attention&);
    bool (*norm)(const Norm&);
    bool (*rope)(const Rope&);
    bool (*gelu)(const Gelu&);
    bool (*attention_gradient)(const AttentionGradient&);
    bool (*norm_gradient)(const NormGradient&);
    bool (*rope_gradient)(const RopeGradient&);
    bool (*channel_norm)(const ChannelNorm&);
    bool (*convolution)(const Convolution&);
    bool (*weight_gradient)(const WeightGradient&);  // null at a level without
};

extern const Table baseline, avx2, avx512, avx512_bf16, amx;

// Runs part(data, i) for i in [0, parts) on up to `threads` of torch's own OpenMP threads.
void spread(int64_t parts, int threads, void (*part)(void*, int64_t), void* data);
void keep_memory();
void keep_steps();
void return_memory();  // what is free goes back to the system
bool pooled();  // whether torch's OpenMP runtime was found; if not, everything runs on one thread

// Memory that this thread keeps between calls, by its use, aligned to a cache line. In pool.cpp: a template of the standard
// library that a level used would be linked once for all levels, perhaps the newest one's.
enum class Use : int { part, tables, packed };
void* room(Use use, size_t bytes);
void leave(Use use);  // give it back

template <typename F>
void spread(int64_t parts, int threads, F&& body) {
    spread(parts, threads, [](void* data, int64_t i) { (*static_cast<F*>(data))(i); }, &body);
}

}  // namespace ebr::cpu
