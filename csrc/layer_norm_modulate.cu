#include "rows.cuh"

namespace ebr {

template <typename T, typename Out>
__global__ void __launch_bounds__(LARGEST_BLOCK)
layer_norm_modulate_kernel(Rows x, Rows weight, Rows bias, Rows out, Rows scale, unsigned rows, unsigned tokens, int width,
                           float eps) {
    const unsigned index = row_index();
    if (index >= rows) return;
    const int64_t b = index / tokens, n = index % tokens;
    Row<T> row;
    load_row<T>(x, b * x.batch + n * x.token, width, row);
    layer_norm<T>(row, weight, bias, b, width, eps);
    store_row<Out, T>(out, scale, index, width, row);
}

bool layer_norm_modulate(const Rows& x, const Rows& weight, const Rows& bias, const Rows& out, const Rows& scale,
                         const Shape& shape, float eps, Stream stream) {
    return with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t rows = shape.batch * shape.tokens;
        if (!fits<T>(shape, rows) || !loadable(x) || !loadable(weight) || !loadable(bias)) return false;
        const auto kernel = scale.address ? layer_norm_modulate_kernel<T, E4m3> : layer_norm_modulate_kernel<T, T>;
        launch(kernel, rows, shape.width, stream, x, weight, bias, out, scale, rows, shape.tokens, shape.width, eps);
        return true;
    });
}

}  // namespace ebr
