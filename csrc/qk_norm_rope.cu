#include "rows.cuh"

namespace ebr {

// A row is q, k or v of a token. A thread holds rotary pairs: a vector of some head's first half, and its partner in the second.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK)
qk_norm_rope_kernel(Rows qkv, Rows q_weight, Rows k_weight, Rows cos, Rows sin, Rows rows, unsigned length, Rows q, Rows k,
                    Rows v, unsigned count, unsigned tokens, int heads, int half, bool per_head, float eps) {
    constexpr int PAIRS = ELEMENTS / 2 / VECTOR<T>;
    const unsigned index = row_index();
    if (index >= count) return;
    const unsigned part = index % 3, token = index / 3;
    const int64_t b = token / tokens, n = token % tokens;
    const int lanes = half / VECTOR<T>;  // threads of a head
    const int width = heads * 2 * half;

    // Calls f(i, head, pair) for the vectors of pairs that this thread holds.
    const auto each_pair = [&](auto f) {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int place = i * blockDim.x + threadIdx.x, head = place / lanes;
            if (head < heads) f(i, head, place % lanes * VECTOR<T>);
        }
    };

    float first[PAIRS][VECTOR<T>], second[PAIRS][VECTOR<T>], squares[PAIRS] = {};
    const T* from = at<const T>(qkv) + b * qkv.batch + n * qkv.token + part * width;
    each_pair([&](int i, int head, int pair) {
        const int column = head * 2 * half + pair;
        load<Reuse::once>(from + column, first[i]);
        load<Reuse::once>(from + column + half, second[i]);
        if (n < length) {
            float prompt[VECTOR<T>];
            const int64_t offset = b * rows.batch + n * rows.token + part * width + column;
            load(rows, offset, prompt);
            for (int j = 0; j < VECTOR<T>; ++j) first[i][j] += prompt[j];
            load(rows, offset + half, prompt);
            for (int j = 0; j < VECTOR<T>; ++j) second[i][j] += prompt[j];
        }
#pragma unroll
        for (int j = 0; j < VECTOR<T>; ++j) squares[i] += first[i][j] * first[i][j] + second[i][j] * second[i][j];
    });

    if (part < 2) {
        Rows weight = k_weight;
        if (part == 0) weight = q_weight;
        float sum = 0;
        for (float& square : squares) {
            square = per_head ? reduce_warp(square, Add{}, lanes) : square;
            sum += square;
        }
        if (!per_head) sum = reduce_row<0>(sum, Add{});
        each_pair([&](int i, int head, int pair) {
            const float inverse = rsqrtf(per_head ? squares[i] / (2 * half) + eps : sum / width + eps);
            const int column = per_head ? pair : head * 2 * half + pair;
            float table[VECTOR<T>], turn[VECTOR<T>];
            load(weight, column, table);
            for (int j = 0; j < VECTOR<T>; ++j) first[i][j] *= inverse * table[j];
            load(weight, column + half, table);
            for (int j = 0; j < VECTOR<T>; ++j) second[i][j] *= inverse * table[j];
            load(cos, n * cos.token + pair, table);
            load(sin, n * sin.token + pair, turn);
#pragma unroll
            for (int j = 0; j < VECTOR<T>; ++j) {
                const float a = first[i][j], b = second[i][j];
                first[i][j] = a * table[j] - b * turn[j];
                second[i][j] = a * turn[j] + b * table[j];
            }
        });
    }

    T* to = part == 0 ? at<T>(q) : part == 1 ? at<T>(k) : at<T>(v);
    each_pair([&](int i, int head, int pair) {
        T* out = to + ((b * heads + head) * tokens + n) * 2 * half + pair;
        store(out, first[i]);
        store(out + half, second[i]);
    });
}

bool qk_norm_rope(const Rows& qkv, const Rows& q_weight, const Rows& k_weight, const Rows& cos, const Rows& sin, const Rows& rows,
                  int64_t length, const Rows& q, const Rows& k, const Rows& v, const Shape& shape, int heads, bool per_head,
                  float eps, Stream stream) {
    return with_type(qkv.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t count = 3 * shape.batch * shape.tokens;
        const int half = shape.width / heads / 2, lanes = half / VECTOR<T>;
        const bool whole_heads = half % VECTOR<T> == 0 && shape.width == heads * 2 * half;
        const bool in_a_warp = lanes <= WARP && (lanes & (lanes - 1)) == 0;  // as the norm of a head adds up
        if (!fits<T>(shape, count) || !whole_heads || (per_head && !in_a_warp)) return false;
        for (const Rows& input : {qkv, q_weight, k_weight, cos, sin, rows})
            if (!loadable(input)) return false;
        launch(qk_norm_rope_kernel<T>, count, shape.width, stream, qkv, q_weight, k_weight, cos, sin, rows, length, q, k, v,
               count, shape.tokens, heads, half, per_head, eps);
        return true;
    });
}

}  // namespace ebr
