"""The native code for CPUs: every level of instructions that this CPU has, against the operations' references in float64."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.attention import attention, attention_ref
from ebr_engine.kernels.channel_norm_silu import channel_norm_silu, channel_norm_silu_ref
from ebr_engine.kernels.convolution import convolution, convolution_ref, packed
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_ref
from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_ref
from ebr_engine.kernels.prompt_attention import prompt_attention, prompt_attention_ref
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from ebr_engine.kernels.rms_norm import rms_norm, rms_norm_ref

if importlib.util.find_spec("ebr_engine._cpu") is None:
    pytest.skip("needs the native code: EBR_BUILD_CPU=1 pip install .", allow_module_level=True)

from ebr_engine import _cpu
from ebr_engine.kernels import cpu
from tests.kernels.native import DTYPES, HEADS, LENGTHS, PER_HEAD, rotated

pytestmark = pytest.mark.usefixtures("poisoned")
CONVOLUTIONS = [(96, 32, 3, (25, 31)), (3, 7, 2, (40, 33)), (40, 64, 1, (16, 32))]
FLOOR = {torch.float32: 2e-7, torch.bfloat16: 2**-10}  # what rounding the result adds


@pytest.fixture(params=cpu.levels())
def level(request, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "auto")
    monkeypatch.setattr(backend, "CPU_LEVEL", request.param)
    return request.param


@pytest.fixture
def served(monkeypatch):
    """Whether the code served each of the calls since."""
    answers = []

    def recorded(function):
        def call(*args):
            answers.append(function(*args))
            return answers[-1]

        return call

    for name in ("attention", "norm", "rope", "gelu", "channel_norm", "convolution"):
        monkeypatch.setattr(_cpu, name, recorded(getattr(_cpu, name)))
    return answers


def distance(value, exact):
    assert value.shape == exact.shape
    return ((value.double() - exact).norm() / exact.norm()).item()


def as_exact_as_eager(results, reference, *inputs, **others):
    """Relative errors against float64 are at most twice those of the reference at the inputs' precision."""

    def listed(given):
        return given if isinstance(given, tuple) else (given,)

    def widened(x):
        return x.double() if isinstance(x, torch.Tensor) else x

    eager = listed(reference(*inputs, **others))
    exact = listed(reference(*map(widened, inputs), **{name: widened(x) for name, x in others.items()}))
    for value, plain, true in zip(listed(results), eager, exact, strict=True):
        assert value.dtype == plain.dtype
        assert distance(value, true) <= 2 * distance(plain, true) + FLOOR[value.dtype]


@DTYPES
@pytest.mark.parametrize(("batch", "width"), [(1, 256), (2, 8), (3, 67), (2, 1536), (1, 1)])
def test_layer_norm_modulate_is_the_reference(level, served, dtype, batch, width):
    x = (3 * torch.randn(batch, 37, 2 * width) + 1).to(dtype)[..., :width]  # of a larger tensor
    tables = 1 + torch.randn(batch, width), torch.randn(1, width)
    as_exact_as_eager(layer_norm_modulate(x, *tables), layer_norm_modulate_ref, x, *tables, eps=1e-6)
    assert served == [True]


@DTYPES
@pytest.mark.parametrize(("batch", "width"), [(1, 256), (3, 67)])
def test_rms_norm_is_the_reference(level, served, dtype, batch, width):
    x, weight = torch.randn(batch, 37, width).to(dtype), 1 + torch.randn(width).to(dtype) / 2
    as_exact_as_eager(rms_norm(x, weight), rms_norm_ref, x, weight, eps=1e-6)
    assert served == [True]


@DTYPES
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("batch", "width"), [(1, 256), (2, 40), (3, 67)])
def test_gated_residual_norm_is_the_reference(level, served, dtype, gated, batch, width):
    x, y = torch.randn(2, batch, 37, width).to(dtype)
    given = torch.randn(batch, width) if gated else None, torch.randn(1, width).to(dtype), torch.randn(1, width).to(dtype)
    as_exact_as_eager(gated_residual_norm(x, y, *given), gated_residual_norm_ref, x, y, *given, eps=1e-6)
    assert served == [True]


@DTYPES
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize(("frames", "width", "side"), [(1, 96, 30), (2, 20, 7), (3, 4, 1)])
def test_channel_norm_silu_is_the_reference(level, served, dtype, groups, frames, width, side):
    x = torch.randn(frames, width, side, side + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    tables = (1 + torch.randn(width) / 2, torch.randn(width) if groups else None, groups, 1e-6, True)
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    result = channel_norm_silu(x, *tables).permute(0, 2, 3, 1).flatten(1, 2)
    as_exact_as_eager(result, channel_norm_silu_ref, rows, *tables)
    assert served == [True]
    assert torch.equal(channel_norm_silu(x, *tables, overwrite=True), x)
    assert torch.equal(x.permute(0, 2, 3, 1).flatten(1, 2), result)


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize(("width", "outputs", "taps", "size"), CONVOLUTIONS)
def test_convolution_is_the_reference(level, served, doubled, width, outputs, taps, size):
    frames = [torch.randn(1, width, *size).contiguous(memory_format=torch.channels_last) for _ in range(taps)]
    weight, bias = packed(torch.randn(outputs, width, taps, 3, 3) / (9 * width * taps) ** 0.5), torch.randn(outputs)
    exact = convolution_ref([frame.double() for frame in frames], weight.double(), bias.double(), None, doubled)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = convolution(frames, weight, bias, doubled=doubled)
    finally:
        torch.set_num_threads(threads)
    assert distance(result, exact) < 1e-5
    assert served == [True]


def test_what_an_earlier_row_left_is_not_added_up(level):
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    spoiled = torch.full((2, 64), torch.nan)
    assert gated_residual_norm(x, y, spoiled, spoiled, spoiled)[1].isnan().all()
    x, y = x[..., :24].contiguous(), y[..., :24].contiguous()  # no multiple of a vector's 16
    gate, weight, bias = (torch.rand(2, 24) for _ in range(3))
    assert torch.allclose(
        gated_residual_norm(x, y, gate, weight, bias)[1], gated_residual_norm_ref(x, y, gate, weight, bias, 1e-6)[1], atol=1e-5
    )


@DTYPES
@PER_HEAD
@LENGTHS
@HEADS
def test_qk_norm_rope_is_the_reference(level, served, dtype, per_head, length, heads, head):
    qkv, *given, rows = rotated(dtype, per_head, length, heads, head)
    as_exact_as_eager(qk_norm_rope(qkv, *given, rows=rows), qk_norm_rope_ref, qkv, *given, eps=1e-6, rows=rows)
    assert served == [True]


SHAPES = [
    (1, 4, 256, 256, 64),
    (2, 3, 70, 70, 32),
    (1, 1, 1, 1, 64),
    (1, 2, 33, 300, 128),
    (2, 1, 100, 7, 16),
    (1, 1, 49, 577, 96),
]


@DTYPES
@pytest.mark.parametrize("size", [0.05, 1, 6])
@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "head"), SHAPES)
def test_attention_is_the_reference(level, served, dtype, size, batch, heads, queries, keys, head):
    q = (size * torch.randn(batch, queries, heads, head)).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, heads, keys, head).to(dtype)
    as_exact_as_eager(attention(q, k, v), attention_ref, q, k, v)
    assert served == [True]


@DTYPES
@pytest.mark.parametrize("prompts", [0, 1, 3])
@pytest.mark.parametrize(("batch", "text", "rows", "head"), [(1, 2, 226, 64), (2, 16, 5, 32), (1, 1, 33, 128)])
def test_prompt_attention_is_the_reference(level, served, dtype, prompts, batch, text, rows, head):
    q = torch.randn(batch, 50, 3, head).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, 3, text, head).to(dtype)
    prompt = torch.randn(2, prompts, 3, rows, head).to(dtype).unbind()
    given = q, key, value, torch.rand(text) * 5, *prompt, torch.randn(prompts)
    as_exact_as_eager(prompt_attention(*given), prompt_attention_ref, *given)
    assert served == [True]


@DTYPES
@pytest.mark.parametrize("size", [0, 1, 15, 1000, 40_001])
def test_gelu_is_the_formula(level, dtype, size):
    x = (4 * torch.randn(size)).to(dtype)
    if size == 0:
        assert cpu.gelu(x) is None
        return
    wide = x.double()
    exact = wide * torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))  # exact where 1 + tanh cancels
    allowed = (1e-6 if dtype == torch.float32 else 2**-8) * wide.abs() + 1e-30
    assert ((cpu.gelu(x).double() - exact).abs() <= allowed).all()
    assert distance(cpu.gelu(x), exact) <= 2 * distance(F.gelu(x, approximate="tanh"), exact) + FLOOR[dtype]
    assert cpu.gelu_(x)
    assert ((x.double() - exact).abs() <= allowed).all()


def test_gelu_of_extremes(level):
    x = torch.tensor([-3e38, -1e4, -20.0, -0.0, 0.0, 1e-30, 20.0, 1e4, 3e38, torch.inf])
    torch.testing.assert_close(cpu.gelu(x), F.gelu(x, approximate="tanh"), atol=1e-30, rtol=1e-6)
    assert cpu.gelu(torch.tensor([torch.nan])).isnan().all()


@DTYPES
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(level, dtype, fault):
    """A run that overflowed is made again in float32: it has to be seen."""
    q, k, v = torch.randn(3, 1, 2, 70, 64).to(dtype)
    for broken in (q, k, v):
        before = broken[0, 1, 3, 5].clone()
        broken[0, 1, 3, 5] = fault
        assert not attention(q, k, v)[0, 1, 3].isfinite().all() or not attention(q, k, v)[0, 1].isfinite().all()
        broken[0, 1, 3, 5] = before
    assert attention(q, k, v).isfinite().all()
    x = torch.randn(1, 3, 64).to(dtype)
    x[0, 1, 2] = fault
    out = layer_norm_modulate(x, torch.ones(1, 64), torch.zeros(1, 64))
    assert out[0, [0, 2]].isfinite().all()
    assert not out[0, 1].isfinite().any()


def test_large_scores_do_not_overflow(level):
    q, v = torch.randn(2, 1, 2, 70, 64)
    out = attention(q * 1e3, q * 1e3, v)
    exact = attention_ref(q.double() * 1e3, q.double() * 1e3, v.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)


@DTYPES
def test_threads_make_no_difference(level, dtype):
    q, k, v = torch.randn(3, 2, 3, 150, 64).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(attention(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_what_it_has_no_kernel_for_takes_torchs_way(level, served):
    q, k, v = torch.randn(3, 1, 2, 9, 10)  # a head of ten
    torch.testing.assert_close(attention(q, k, v), attention_ref(q, k, v))
    assert served == []
    for dtype in (torch.float64, torch.float16):
        x = torch.randn(1, 3, 16).to(dtype)
        assert layer_norm_modulate(x, torch.ones(1, 16), torch.zeros(1, 16)).dtype == dtype
    assert layer_norm_modulate(torch.randn(1, 0, 16), torch.ones(1, 16), torch.zeros(1, 16)).shape == (1, 0, 16)
    assert served == []


def test_torch_can_be_asked_for_in_its_place(level, served, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "torch")
    layer_norm_modulate(torch.randn(1, 3, 16), torch.ones(1, 16), torch.zeros(1, 16))
    assert served == []
    told = {one.name: one for one in backend.backends()}["cpu"]
    assert not told.available
    assert told.reason.endswith("not used with EBR_KERNELS=torch")


def test_it_runs_on_torchs_own_threads():
    """No second OpenMP runtime is loaded beside torch's."""
    loaded = "len({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]})"
    code = f"import torch; from ebr_engine import _cpu; print(_cpu.POOLED, {loaded})"
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs Linux")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["True", "1"]
