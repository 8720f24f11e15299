"""The CUDA extension: its source on a CPU against the references, its build, and on a device the kernels themselves.

`cuda_on_host.h` stands in for nvcc and a device, so that the launchers, the binding and every line of the kernels run here.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ebr_engine
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm_fp8_ref, gated_residual_norm_ref
from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate_fp8_ref, layer_norm_modulate_ref
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope_ref
from ebr_engine.kernels.quantize_fp8 import quantize_fp8_ref

ROOT = Path(__file__).parents[2]
MODULE = "ebr_engine._csrc"
BUILT = importlib.util.find_spec(MODULE)
FLOAT32, BFLOAT16, FLOAT16, E4M3 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def script():
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nvcc(script):
    return script.find_nvcc(os.environ) or pytest.skip("needs nvcc")


@pytest.fixture(scope="session")
def on_host(script, nvcc, tmp_path_factory):
    """The extension's module, compiled to run on a CPU."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("csrc")
    (folder / "kernels.cpp").write_text(script.one_unit(script.KERNELS))
    compiler = [nvcc, "-c", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    commands = [
        [*compiler, "-O1", "-include", str(Path(__file__).with_name("cuda_on_host.h")), "kernels.cpp"],
        [*compiler, *includes, str(ROOT / script.BINDING)],
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: subprocess.run(command, cwd=folder, check=True), commands))
    subprocess.run(["g++", "-shared", "kernels.o", "binding.o", "-o", "_csrc.so"], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location(MODULE, folder / "_csrc.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda(on_host, monkeypatch):
    """The launchers, over the extension on a CPU; fresh memory holds NaN, so that what no kernel writes is seen."""

    def poisoned(create):
        return lambda *args, **kwargs: create(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setitem(sys.modules, MODULE, on_host)
    monkeypatch.setattr(ebr_engine, "_csrc", on_host, raising=False)
    monkeypatch.delitem(sys.modules, "ebr_engine.kernels.cuda", raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    launchers = importlib.import_module("ebr_engine.kernels.cuda")
    yield launchers
    sys.modules.pop("ebr_engine.kernels.cuda", None)


@pytest.fixture
def device_cuda():
    """The launchers, over the extension as it is installed."""
    if not torch.cuda.is_available() or BUILT is None:
        pytest.skip("needs a CUDA device and the extension")
    return importlib.import_module("ebr_engine.kernels.cuda")


def tables(batch, width, dtype=FLOAT32):
    """Weight and bias, of each sample or shared."""
    weight, bias = torch.randn(2, batch, width).unbind()
    return {"weight": (1 + weight / 2).to(dtype), "bias": bias.to(dtype)}


def close(value, reference):
    """Rounded once from float32 that differs by its own roundings: rarely, by a step of the dtype."""
    assert (value.dtype, value.shape) == (reference.dtype, reference.shape)
    assert value.is_contiguous()
    step = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.float(), reference.float(), rtol=max(step, 1e-5), atol=1e-5)
    if value.dtype != FLOAT32:
        assert (value != reference).sum() <= 1 + 0.01 * value.numel()


def close_fp8(values, scale, reference):
    assert (values.dtype, scale.dtype) == (E4M3, FLOAT32)
    assert (values.shape, scale.shape) == (reference.values.shape, reference.scale.shape)
    torch.testing.assert_close(scale, reference.scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(values.float(), reference.values.float(), rtol=2**-3, atol=2**-9)
    assert (values.view(torch.uint8) != reference.values.view(torch.uint8)).sum() <= 1 + 0.01 * values.numel()


# One vector; a warp, in part and whole; blocks of two warps and more, in part and whole; the real models'.
WIDTHS = [8, 256, 512, 520, 1024, 1536, 3072, 5120]
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])


def check_layer_norm_modulate(cuda, dtype, width, batch, tokens, device=CPU):
    x = (3 * torch.randn(batch, tokens, width) + 1).to(device, dtype)
    given = {name: table.to(device) for name, table in tables(batch, width).items()}
    close(cuda.layer_norm_modulate(x, **given, eps=1e-6), layer_norm_modulate_ref(x, **given, eps=1e-6))
    close_fp8(*cuda.layer_norm_modulate_fp8(x, **given, eps=1e-6), layer_norm_modulate_fp8_ref(x, **given, eps=1e-6))


def check_gated_residual_norm(cuda, dtype, width, batch, tokens, device=CPU, gated=True, affine=FLOAT32):
    x, y = torch.randn(2, batch, tokens, width).to(device, dtype).unbind()
    given = {"gate": torch.randn(batch, width).to(device) if gated else None}
    given |= {name: table.to(device) for name, table in tables(1, width, affine).items()}
    results, references = cuda.gated_residual_norm(x, y, **given, eps=1e-6), gated_residual_norm_ref(x, y, **given, eps=1e-6)
    for value, reference in zip(results, references):
        close(value, reference)
    total, *quantized = cuda.gated_residual_norm_fp8(x, y, **given, eps=1e-6)
    assert torch.equal(total, results[0])
    close_fp8(*quantized, gated_residual_norm_fp8_ref(x, y, **given, eps=1e-6)[1])


def check_qk_norm_rope(cuda, dtype, heads, head, batch, tokens, per_head, rows=None, device=CPU):
    width = heads * head
    angle = torch.rand(tokens, head // 2) * 6.3
    weights = (1 + torch.randn(2, head if per_head else width) / 2).unbind()
    given = {"q_weight": weights[0], "k_weight": weights[1], "cos": angle.cos(), "sin": angle.sin()}
    given = {name: table.to(device) for name, table in given.items()} | {"heads": heads, "eps": 1e-6, "rows": rows}
    qkv = (2 * torch.randn(batch, tokens, 3 * width)).to(device, dtype)
    results = cuda.qk_norm_rope(qkv, **given)
    for value, reference in zip(results, qk_norm_rope_ref(qkv, **given)):
        close(value, reference)


@pytest.fixture
def served(cuda, on_host, monkeypatch):
    """Whether the kernels served each of the calls since."""
    answers = []

    def recorded(function):
        def call(*args):
            answers.append(function(*args))
            return answers[-1]

        return call

    for op in ("layer_norm_modulate", "gated_residual_norm", "qk_norm_rope", "quantize_fp8"):
        monkeypatch.setattr(on_host, op, recorded(getattr(on_host, op)))
    return answers


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_modulate_is_the_reference(cuda, served, dtype, width):
    check_layer_norm_modulate(cuda, dtype, width, batch=2, tokens=3)
    assert served == [True, True]


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gated", [True, False])
def test_gated_residual_norm_is_the_reference(cuda, served, dtype, width, gated):
    check_gated_residual_norm(cuda, dtype, width, batch=2, tokens=3, gated=gated)
    assert served == [True, True]


@pytest.mark.parametrize("affine", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_affine_weights_may_be_of_another_dtype(cuda, served, dtype, affine):
    check_gated_residual_norm(cuda, dtype, 264, batch=2, tokens=3, affine=affine)
    assert served == [True, True]


@DTYPES
@pytest.mark.parametrize(("heads", "head"), [(1, 16), (3, 32), (4, 64), (5, 128), (12, 128), (24, 128), (40, 128)])
@pytest.mark.parametrize("per_head", [True, False])
def test_qk_norm_rope_is_the_reference(cuda, served, dtype, heads, head, per_head):
    check_qk_norm_rope(cuda, dtype, heads, head, batch=2, tokens=3, per_head=per_head)
    assert served == [True]


@pytest.mark.parametrize("rows_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (1, 4), (2, 4)])
@pytest.mark.parametrize("per_head", [True, False])
def test_qk_norm_rope_adds_a_prompts_rows(cuda, served, dtype, rows_dtype, shape, per_head):
    rows = torch.randn(*shape, 3 * 3 * 32).to(rows_dtype)
    check_qk_norm_rope(cuda, dtype, 3, 32, batch=2, tokens=5, per_head=per_head, rows=rows)
    assert served == [True]


@DTYPES
@pytest.mark.parametrize("shape", [(8,), (3, 256), (2, 3, 1536), (1, 13824), (2, 16384)])
def test_quantize_fp8_is_the_reference_bit_for_bit(cuda, served, dtype, shape):
    x = (torch.randn(shape) * 10.0 ** torch.randint(-4, 1, shape)).to(dtype)
    values, scale = cuda.quantize_fp8(x)
    reference = quantize_fp8_ref(x)
    assert torch.equal(values.view(torch.uint8), reference.values.view(torch.uint8))
    assert torch.equal(scale, reference.scale)
    assert served == [True]


def test_casts_are_to_the_nearest_even(cuda):
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    numbers = codes[codes.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    x = torch.cat([numbers, *(v for m in (numbers, middles) for v in (m.nextafter(up), m, m.nextafter(down)))])
    x = torch.cat([x[x.abs() <= 448], torch.full((8,), 448.0)])
    x = x[len(x) % 8 :]  # the row's scale is one
    values, scale = cuda.quantize_fp8(x)
    assert scale == 1
    assert torch.equal(values.view(torch.uint8), x.to(E4M3).view(torch.uint8))
    values, _ = cuda.quantize_fp8(x.bfloat16())
    assert torch.equal(values.view(torch.uint8), x.bfloat16().to(E4M3).view(torch.uint8))


def test_rows_of_zeros_nan_and_infinity_are_as_the_references(cuda):
    x = torch.randn(5, 1024)
    x[1] = 0
    x[2, 700] = torch.nan
    x[3, 3] = -torch.inf
    values, scale = cuda.quantize_fp8(x)
    reference = quantize_fp8_ref(x)
    assert torch.equal(values.isnan(), reference.values.isnan())
    torch.testing.assert_close(values.float(), reference.values.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scale, reference.scale, rtol=0, atol=0, equal_nan=True)


def test_rows_far_from_zero_keep_their_variance(cuda, served):
    x = torch.randn(1, 3, 512) + 1000
    given = tables(1, 512)
    exact = layer_norm_modulate_ref(x.double(), **given, eps=1e-6)
    value = cuda.layer_norm_modulate(x, **given, eps=1e-6)
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=8 * 1000 * torch.finfo(FLOAT32).eps)
    assert served == [True]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_rows_may_lie_apart(cuda, served, dtype):
    """A part of a wider projection, and tables and rows of every second sample."""
    wide = torch.randn(3, 5, 3 * 64).to(dtype)
    weight, bias, gate = torch.randn(3, 6, 64)[:, ::2].unbind()
    x, y = wide[..., 64:128], wide[:, :, 128:]
    close(cuda.layer_norm_modulate(x, weight, bias, 1e-6), layer_norm_modulate_ref(x, weight, bias, 1e-6))
    results = cuda.gated_residual_norm(x, y, gate, weight, bias, 1e-6)
    for value, reference in zip(results, gated_residual_norm_ref(x, y, gate, weight, bias, 1e-6)):
        close(value, reference)
    tables = torch.ones(16), torch.ones(16), torch.rand(5, 16)[:, :8], torch.rand(5, 16)[:, 8:]
    qkv, rows = torch.randn(3, 10, 96).to(dtype)[:, ::2], torch.randn(6, 2, 96)[::2]
    for value, reference in zip(cuda.qk_norm_rope(qkv, *tables, 2, 1e-6, rows), qk_norm_rope_ref(qkv, *tables, 2, 1e-6, rows)):
        close(value, reference)
    assert served == [True, True, True]


@pytest.mark.parametrize(("dtype", "width"), [(BFLOAT16, 33), (BFLOAT16, 12), (FLOAT32, 6), (FLOAT32, 16388)])
def test_rows_of_odd_or_too_large_widths_go_elsewhere(cuda, served, dtype, width):
    check_layer_norm_modulate(cuda, dtype, width, batch=2, tokens=3)
    check_gated_residual_norm(cuda, dtype, width, batch=2, tokens=3)
    x = torch.randn(3, width).to(dtype)
    assert torch.equal(cuda.quantize_fp8(x)[1], quantize_fp8_ref(x).scale)
    assert served == 5 * [False]


@pytest.mark.parametrize(
    ("heads", "head", "per_head"),
    [(2, 24, False), (2, 10, True), (2, 96, True), (1, 1024, True)],  # odd; heads that no power of two threads hold
)
def test_heads_of_odd_widths_go_elsewhere(cuda, served, heads, head, per_head):
    check_qk_norm_rope(cuda, BFLOAT16, heads, head, batch=2, tokens=3, per_head=per_head)
    assert served == [False]


def test_heads_that_are_no_power_of_two_are_served_where_the_norm_spans_them(cuda, served):
    check_qk_norm_rope(cuda, BFLOAT16, 2, 96, batch=2, tokens=3, per_head=False)
    assert served == [True]


def test_memory_that_wide_loads_cannot_read_goes_elsewhere(cuda, served):
    x, given = torch.randn(2 * 3 * 64 + 1)[1:].view(2, 3, 64), tables(2, 64)
    close(cuda.layer_norm_modulate(x, **given, eps=1e-6), layer_norm_modulate_ref(x, **given, eps=1e-6))
    x = torch.randn(2, 3, 65)[..., :64]
    close(cuda.layer_norm_modulate(x, **given, eps=1e-6), layer_norm_modulate_ref(x, **given, eps=1e-6))
    assert served == [False, False]


def test_float64_and_empty_batches_go_elsewhere(cuda, served):
    given = tables(1, 64)
    for x in (torch.randn(1, 3, 64).double(), torch.randn(1, 0, 64)):
        close(cuda.layer_norm_modulate(x, **given, eps=1e-6), layer_norm_modulate_ref(x, **given, eps=1e-6))
        results = cuda.gated_residual_norm(x, x, None, **given, eps=1e-6)
        for value, reference in zip(results, gated_residual_norm_ref(x, x, None, **given, eps=1e-6)):
            close(value, reference)
        assert cuda.quantize_fp8(x)[0].shape == x.shape
    assert served == []


def test_shapes_that_do_not_fit_together_are_refused(cuda):
    x, given = torch.randn(2, 3, 64), tables(2, 64)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 64\); \[2 or 1, 64\] was expected"):
        cuda.layer_norm_modulate(x, torch.ones(3, 64), given["bias"], 1e-6)
    with pytest.raises(ValueError, match=r"y has shape \(2, 2, 64\); that of x, \(2, 3, 64\), was expected"):
        cuda.gated_residual_norm(x, x[:, :2], None, **given, eps=1e-6)
    with pytest.raises(ValueError, match=r"gate has shape \(1, 32\)"):
        cuda.gated_residual_norm(x, x, torch.ones(1, 32), **given, eps=1e-6)
    weights = torch.ones(16), torch.ones(16)
    with pytest.raises(ValueError, match=r"cos has shape \(2, 8\)"):
        cuda.qk_norm_rope(torch.randn(1, 3, 96), *weights, torch.ones(2, 8), torch.ones(3, 8), 2, 1e-6, None)


def test_tensors_on_several_devices_are_refused(cuda):
    x = torch.randn(2, 3, 64)
    with pytest.raises(ValueError, match="tensors lie on cpu and meta: move them to one device"):
        cuda.layer_norm_modulate(x, torch.ones(1, 64, device="meta"), torch.ones(1, 64), 1e-6)


def test_the_binding_refuses_what_is_no_shape_or_dtype(on_host):
    with pytest.raises(ValueError, match="have to be positive"):
        on_host.Shape(batch=1, tokens=0, width=8)
    with pytest.raises(ValueError, match="not one of DTYPES"):
        on_host.Rows(address=0, batch=0, token=0, dtype=9)


@pytest.mark.skipif(BUILT is None, reason="the extension is not built")
def test_the_extension_imports_without_a_device_and_says_what_is_missing():
    code = f"""
import {MODULE} as csrc
rows = csrc.Rows(0, 0, 0, 0)
csrc.quantize_fp8(rows, rows, rows, csrc.Shape(1, 1, 8), 0)
"""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)
    assert re.search(r"RuntimeError: .*CUDA", ran.stderr)
    assert "ImportError" not in ran.stderr


def test_no_kernel_spills_registers(script, nvcc, tmp_path):
    unit = tmp_path / "kernels.cu"
    unit.write_text(script.one_unit(script.KERNELS))
    command = [nvcc, "-cubin", *script.COMPILE, "-Xptxas=-v", "-arch=sm_90a", str(unit), "-o", str(tmp_path / "kernels.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack.*?Used (\d+) registers", report, re.DOTALL)
    print(*(f"{registers:>4} registers  {name}" for name, _, registers in kernels), sep="\n")
    assert len(kernels) == 3 * (2 + 2 + 1 + 1)  # dtypes; two operations with and without fp8
    assert all(int(stack) == 0 for _, stack, _ in kernels)
    assert all(int(registers) <= 64 for *_, registers in kernels)  # a block of 1024 threads has no more


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
class TestOnADevice:
    """The kernels themselves, at the widths of Wan 1.3B, FLUX and Wan 14B."""

    @pytest.mark.parametrize("width", [1536, 3072, 5120])
    def test_norms_are_the_references(self, device_cuda, dtype, width):
        check_layer_norm_modulate(device_cuda, dtype, width, batch=2, tokens=1001, device=torch.device("cuda"))
        check_gated_residual_norm(device_cuda, dtype, width, batch=2, tokens=1001, device=torch.device("cuda"))

    @pytest.mark.parametrize(("heads", "per_head"), [(12, False), (24, True), (40, False)])
    def test_qk_norm_rope_is_the_reference(self, device_cuda, dtype, heads, per_head):
        rows = torch.randn(226, 3 * heads * 128, device="cuda").to(dtype) if per_head else None
        check_qk_norm_rope(device_cuda, dtype, heads, 128, 2, 1001, per_head, rows, torch.device("cuda"))

    @pytest.mark.parametrize("width", [256, 1536, 5120, 8960, 13824, 15360])
    def test_quantize_fp8_is_the_reference_bit_for_bit(self, device_cuda, dtype, width):
        x = (torch.randn(1001, width) * 10.0 ** torch.randint(-4, 1, (1001, width))).to(dtype)
        values, scale = device_cuda.quantize_fp8(x.cuda())
        reference = quantize_fp8_ref(x)
        assert torch.equal(values.cpu().view(torch.uint8), reference.values.view(torch.uint8))
        assert torch.equal(scale.cpu(), reference.scale)
