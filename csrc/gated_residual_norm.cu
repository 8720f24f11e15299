#include "rows.cuh"

namespace ebr {

template <typename T, typename Out>
__global__ void __launch_bounds__(LARGEST_BLOCK)
gated_residual_norm_kernel(Rows x, Rows y, Rows gate, Rows weight, Rows bias, Rows total, Rows out, Rows scale, unsigned rows,
                           unsigned tokens, int width, float eps) {
    const unsigned index = row_index();
    if (index >= rows) return;
    const int64_t b = index / tokens, n = index % tokens;
    Row<T> row, branch;
    load_row<T>(x, b * x.batch + n * x.token, width, row);
    load_row<T>(y, b * y.batch + n * y.token, width, branch);
    each_vector<T>(width, [&](int i, int column) {
        float factor[VECTOR<T>];
        if (gate.address) load(gate, b * gate.batch + column, factor);
#pragma unroll
        for (int j = 0; j < VECTOR<T>; ++j) row[i][j] += gate.address ? branch[i][j] * factor[j] : branch[i][j];
    });
    store_row<T, T>(total, Rows{}, index, width, row);
    layer_norm<T>(row, weight, bias, b, width, eps);
    store_row<Out, T>(out, scale, index, width, row);
}

bool gated_residual_norm(const Rows& x, const Rows& y, const Rows& gate, const Rows& weight, const Rows& bias, const Rows& total,
                         const Rows& out, const Rows& scale, const Shape& shape, float eps, Stream stream) {
    return with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t rows = shape.batch * shape.tokens;
        if (!fits<T>(shape, rows) || y.dtype != x.dtype) return false;
        for (const Rows& input : {x, y, gate, weight, bias})
            if (!loadable(input)) return false;
        const auto kernel = scale.address ? gated_residual_norm_kernel<T, E4m3> : gated_residual_norm_kernel<T, T>;
        launch(kernel, rows, shape.width, stream, x, y, gate, weight, bias, total, out, scale, rows, shape.tokens,
               shape.width, eps);
        return true;
    });
}

}  // namespace ebr
