#include "rows.cuh"

namespace ebr {

template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK)
quantize_fp8_kernel(Rows x, Rows values, Rows scale, unsigned rows, int width) {
    const unsigned index = row_index();
    if (index >= rows) return;
    Row<T> row;
    load_row<T>(x, index * x.token, width, row);
    store_row<E4m3, T>(values, scale, index, width, row);
}

bool quantize_fp8(const Rows& x, const Rows& values, const Rows& scale, const Shape& shape, Stream stream) {
    return with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t rows = shape.batch * shape.tokens;
        if (!fits<T>(shape, rows) || !loadable(x)) return false;
        launch(quantize_fp8_kernel<T>, rows, shape.width, stream, x, values, scale, rows, shape.width);
        return true;
    });
}

}  // namespace ebr
