// The Python module ebr_engine._csrc. Memory and streams come as addresses, so that one build serves every version of torch.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;
using namespace ebr;

PYBIND11_MODULE(_csrc, m) {
    m.doc() = "Row-wise operations in CUDA; each returns whether its kernel serves the layout, having done nothing if not.";
    m.attr("DTYPES") = py::make_tuple("float32", "bfloat16", "float16", "float8_e4m3fn");  // as enum Dtype

    py::class_<Rows>(m, "Rows", py::module_local()).def(
        py::init([](uintptr_t address, int64_t batch, int64_t token, int dtype) {
            if (dtype < 0 || dtype > static_cast<int>(Dtype::float8_e4m3fn)) throw py::value_error("dtype is not one of DTYPES");
            return Rows{address, batch, token, static_cast<Dtype>(dtype)};
        }),
        py::arg("address"), py::arg("batch"), py::arg("token"), py::arg("dtype"));
    py::class_<Shape>(m, "Shape", py::module_local()).def(
        py::init([](int64_t batch, int64_t tokens, int width) {
            if (batch < 1 || tokens < 1 || width < 1) throw py::value_error("batch, tokens and width have to be positive");
            return Shape{batch, tokens, width};
        }),
        py::arg("batch"), py::arg("tokens"), py::arg("width"));

    m.def("layer_norm_modulate", &layer_norm_modulate);
    m.def("gated_residual_norm", &gated_residual_norm);
    m.def("qk_norm_rope", &qk_norm_rope);
    m.def("quantize_fp8", &quantize_fp8);
}
