// The Python module ebr_engine._cpu. Memory comes as addresses, so that one build serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "levels.h"

namespace py = pybind11;
using namespace ebr::cpu;

namespace {

const std::vector<Level>& found() {
    static const std::vector<Level> kept = levels();
    return kept;
}

const Table& table(int level) {
    if (level < 0 || level >= static_cast<int>(found().size())) throw py::value_error("this CPU has no such level");
    return *found()[level].table;
}

Dtype dtype_of(int dtype) {
    if (dtype < 0 || dtype > static_cast<int>(Dtype::bfloat16)) throw py::value_error("dtype is not one of DTYPES");
    return static_cast<Dtype>(dtype);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Operations on a CPU; each returns whether it serves the layout, having done nothing if not.";
    m.attr("DTYPES") = py::make_tuple("float32", "bfloat16");  // as enum Dtype
    m.attr("LARGEST_HEAD") = LARGEST_HEAD;
    m.attr("POOLED") = pooled();
    py::list names;
    for (const Level& level : found()) names.append(level.name);
    m.attr("LEVELS") = py::tuple(names);

    py::class_<Rows>(m, "Rows", py::module_local())
        .def(py::init([](uintptr_t address, int64_t batch, int64_t token, int dtype) {
            return Rows{address, batch, token, dtype_of(dtype)};
        }));
    py::class_<Heads>(m, "Heads", py::module_local())
        .def(py::init([](uintptr_t address, int64_t batch, int64_t head, int64_t token) {
            return Heads{address, batch, head, token};
        }));
    py::class_<Branch>(m, "Branch", py::module_local())
        .def(py::init([](const Heads& k, const Heads& v, int64_t keys, uintptr_t bias, float weight) {
            return Branch{k, v, keys, bias, weight};
        }));
    py::class_<BranchGradient>(m, "BranchGradient", py::module_local())
        .def(py::init([](uintptr_t dk, uintptr_t dv, uintptr_t dweight) { return BranchGradient{dk, dv, dweight}; }));

    m.def("attention", [](int level, const Heads& q, const Heads& out, const std::vector<Branch>& branches, int64_t batch,
                          int64_t heads, int64_t queries, int width, float scale, uintptr_t log_sums, int dtype, int threads) {
        const Attention a{q,     out,   branches.data(), static_cast<int>(branches.size()), batch, heads, queries, width,
                          scale, log_sums, dtype_of(dtype), threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.attention(a);
    });
    m.def("attention_gradient", [](int level, const Heads& q, const Heads& gradient, const Heads& out, const Heads& dq,
                                   const std::vector<Branch>& branches, const std::vector<BranchGradient>& gradients, int64_t batch,
                                   int64_t heads, int64_t queries, int64_t splits, int width, int padded, float scale,
                                   uintptr_t log_sums, int dtype, bool rounded, int threads) {
        if (gradients.size() != branches.size()) throw py::value_error("as many gradients as branches are needed");
        const AttentionGradient a{q, gradient, out, dq, branches.data(), gradients.data(), static_cast<int>(branches.size()), batch,
                                  heads, queries, splits, width, padded, scale, log_sums, dtype_of(dtype), rounded, threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.attention_gradient(a);
    });
    m.def("norm_gradient", [](int level, const Rows& sum_gradient, const Rows& gradient, const Rows& total, const Rows& gate,
                              const Rows& weight, const Rows& y, uintptr_t dx, uintptr_t dy, uintptr_t weight_sums,
                              uintptr_t bias_sums, uintptr_t gate_sums, int64_t batch, int64_t tokens, int64_t width, float eps,
                              bool centred, int threads) {
        const NormGradient a{sum_gradient, gradient, total, gate, weight, y, dx, dy, weight_sums, bias_sums, gate_sums, batch,
                             tokens, width, eps, centred, threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.norm_gradient(a);
    });
    m.def("rope_gradient", [](int level, const Heads& dq, const Heads& dk, const Heads& dv, const Rows& qkv, const Rows& q_weight,
                              const Rows& k_weight, const Rows& cos, const Rows& sin, const Rows& rows, int64_t length,
                              uintptr_t dqkv, uintptr_t dq_weight, uintptr_t dk_weight, int64_t batch, int64_t tokens, int64_t width,
                              int heads, bool per_head, float eps, int threads) {
        const RopeGradient a{dq,   dk,        dv,        qkv,   q_weight, k_weight, cos,   sin,      rows, length,
                             dqkv, dq_weight, dk_weight, batch, tokens,   width,    heads, per_head, eps,  threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.rope_gradient(a);
    });
    m.def("norm", [](int level, const Rows& x, const Rows& y, const Rows& gate, const Rows& weight, const Rows& bias,
                     uintptr_t total, uintptr_t out, int64_t batch, int64_t tokens, int64_t width, float eps, int threads) {
        const Norm a{x, y, gate, weight, bias, total, out, batch, tokens, width, eps, threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.norm(a);
    });
    m.def("rope", [](int level, const Rows& qkv, const Rows& q_weight, const Rows& k_weight, const Rows& cos, const Rows& sin,
                     const Rows& rows, int64_t length, uintptr_t q, uintptr_t k, uintptr_t v, int64_t batch, int64_t tokens,
                     int64_t width, int heads, bool per_head, float eps, int threads) {
        const Rope a{qkv, q_weight, k_weight, cos, sin, rows, length, q, k, v, batch, tokens, width, heads, per_head, eps, threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.rope(a);
    });
    m.def("channel_norm", [](int level, uintptr_t x, uintptr_t out, const Rows& weight, const Rows& bias, int64_t frames,
                             int64_t pixels, int64_t channels, int64_t groups, float eps, bool silu, int dtype, int threads) {
        const ChannelNorm a{x, out, weight, bias, frames, pixels, channels, groups, eps, silu, dtype_of(dtype), threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.channel_norm(a);
    });
    m.def("convolution", [](int level, const std::vector<uintptr_t>& frames, bool doubled, uintptr_t weight, uintptr_t bias,
                            uintptr_t added, uintptr_t out, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                            int threads) {
        Convolution a{{}, static_cast<int64_t>(frames.size()), doubled, weight, bias, added, out, height, width, channels, outputs,
                      threads};
        if (a.frames > LARGEST_FRAMES) throw py::value_error("a convolution sums over fewer frames");
        for (size_t i = 0; i < frames.size(); ++i) a.frame[i] = frames[i];
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.convolution(a);
    });
    m.def("weight_gradient", [](int level, uintptr_t gradient, uintptr_t x, uintptr_t dw, uintptr_t db, int64_t rows, int64_t outputs,
                                int64_t inputs, int threads) {
        const WeightGradient a{gradient, x, dw, db, rows, outputs, inputs, threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.weight_gradient && chosen.weight_gradient(a);
    });
    m.def("keep_memory", &keep_memory);
    m.def("keep_steps", &keep_steps);
    m.def("return_memory", &return_memory);
    m.def("gelu", [](int level, uintptr_t x, uintptr_t gradient, uintptr_t out, int64_t size, int dtype, int threads) {
        const Gelu a{x, gradient, out, size, dtype_of(dtype), threads};
        const Table& chosen = table(level);
        py::gil_scoped_release released;
        return chosen.gelu(a);
    });
}
