"""Gradients of the native code for CPUs: every level of instructions that this CPU has, against the references' in float64."""

import importlib.util

import pytest
import torch
from torch import nn

from ebr_engine.kernels import attention as attention_module
from ebr_engine.kernels import backend
from ebr_engine.kernels.attention import attention, attention_backward_ref, attention_ref, attention_saving_ref
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_ref
from ebr_engine.kernels.gelu import gelu, gelu_op, gelu_ref
from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_ref
from ebr_engine.kernels.packed_linear import PackedWeight, can_pack, packed_linear
from ebr_engine.kernels.prompt_attention import prompt_attention, prompt_attention_ref
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from ebr_engine.kernels.rms_norm import rms_norm, rms_norm_backward_ref, rms_norm_op, rms_norm_ref

if importlib.util.find_spec("ebr_engine._cpu") is None:
    pytest.skip("needs the native code: EBR_BUILD_CPU=1 pip install .", allow_module_level=True)

from ebr_engine import _cpu
from ebr_engine.kernels import cpu
from tests.kernels.native import DTYPES, HEADS, LENGTHS, PER_HEAD, rotated

pytestmark = pytest.mark.usefixtures("poisoned")
FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2**-10}  # what rounding the result adds, and a softmax's logarithm
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 4e-3}  # of what is summed of rows that were rounded in between
FEW = 10  # numbers, whose own errors, not their size, are drawn anew in every way of adding up


@pytest.fixture(params=cpu.levels())
def level(request, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "auto")
    monkeypatch.setattr(backend, "CPU_LEVEL", request.param)
    monkeypatch.setattr(backend, "TUNE", "off")
    return request.param


@pytest.fixture
def served(monkeypatch):
    """Names of the calls that the code served since, in their order."""
    answers = []

    def recorded(name, function):
        def call(*args):
            result = function(*args)
            return answers.append(name) or result if result else result

        return call

    for name in ("attention", "norm", "rope", "gelu", "attention_gradient", "norm_gradient", "rope_gradient"):
        monkeypatch.setattr(_cpu, name, recorded(name, getattr(_cpu, name)))
    return answers


def distance(value, exact):
    assert value.shape == exact.shape
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-3)).item()


def softmax_formula(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v


def gradients_as_exact(op, reference, learned, *inputs, exact=None, rounded=0.0, **others):
    """Results and gradients of the inputs numbered `learned` are at most twice as far from float64 as the reference's.

    `exact`: a formula in float64 in place of the reference; `rounded`: how much farther, for what is made of rounded rows.
    """

    def run(function, dtype):
        def given(i, x):
            x = x.to(dtype) if dtype and isinstance(x, torch.Tensor) else x
            return x.detach().requires_grad_() if i in learned else x

        leaves = [given(i, x) for i, x in enumerate(inputs)]
        results = function(*leaves, **others)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(1)
        pulls = [torch.randn(x.shape).to(y.dtype).to(x.dtype) for x, y in zip(results, plain or results)]
        return results, (*results, *torch.autograd.grad(results, [leaves[i] for i in learned], pulls))

    plain = None
    plain, eager = run(reference, None)
    _, found = run(op, None)
    _, wide = run(exact or reference, torch.float64)
    for value, usual, true in zip(found, eager, wide, strict=True):
        assert value.dtype == usual.dtype
        allowed = rounded + 2 * distance(usual, true) + FLOOR[value.dtype] * (10 if value.numel() < FEW else 1)
        assert distance(value, true) <= allowed, (distance(value, true), allowed)


@DTYPES
@pytest.mark.parametrize(("batch", "width"), [(1, 256), (3, 67), (2, 8), (1, 1)])
def test_layer_norm_modulate(level, served, dtype, batch, width):
    x = (3 * torch.randn(batch, 37, 2 * width) + 1).to(dtype)[..., :width]  # of a larger tensor
    tables = 1 + torch.randn(batch, width), torch.randn(1, width)
    gradients_as_exact(layer_norm_modulate, layer_norm_modulate_ref, [0], x, *tables, 1e-6)
    assert served == ["norm", "norm_gradient"]


@DTYPES
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("batch", "width"), [(1, 256), (2, 40), (3, 67)])
def test_gated_residual_norm(level, served, dtype, gated, batch, width):
    x, y = torch.randn(2, batch, 37, width).to(dtype)
    given = torch.randn(batch, width) if gated else None, torch.randn(1, width).to(dtype), torch.randn(1, width).to(dtype)
    gradients_as_exact(gated_residual_norm, gated_residual_norm_ref, [0, 1], x, y, *given, 1e-6)
    assert served == ["norm", "norm_gradient"]


@DTYPES
@pytest.mark.parametrize(("batch", "width"), [(1, 256), (3, 67)])
def test_rms_norm(level, served, dtype, batch, width):
    x, weight = torch.randn(batch, 37, width).to(dtype), 1 + torch.randn(width).to(dtype) / 2
    gradients_as_exact(rms_norm, rms_norm_ref, [0], x, weight, 1e-6)
    assert served == ["norm", "norm_gradient"]


def test_a_weight_that_is_learned_has_its_gradient_too(level):
    x, weight = torch.randn(2, 37, 64), 1 + torch.randn(64) / 2
    gradients_as_exact(rms_norm, rms_norm_ref, [0, 1], x, weight, 1e-6)
    gradients_as_exact(layer_norm_modulate, layer_norm_modulate_ref, [0, 1, 2], x, weight[None], torch.randn(1, 64), 1e-6)


@DTYPES
@PER_HEAD
@LENGTHS
@HEADS
def test_qk_norm_rope(level, served, dtype, per_head, length, heads, head):
    qkv, *given, rows = rotated(dtype, per_head, length, heads, head)
    learned = [0, 7] if length else [0]
    gradients_as_exact(qk_norm_rope, qk_norm_rope_ref, learned, qkv, *given, 1e-6, rows)
    assert served == ["rope", "rope_gradient"]


@DTYPES
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 300, 256), (3, 37, 67), (2, 1, 1)])
def test_gradients_of_what_norms_and_gates_multiply_by(level, served, dtype, batch, tokens, width):
    x, y = torch.randn(2, batch, tokens, 2 * width).to(dtype)[..., :width]
    own, shared = 1 + torch.randn(batch, width) / 2, torch.randn(1, width)
    more = {"rounded": ROUNDED[dtype]}
    gradients_as_exact(layer_norm_modulate, layer_norm_modulate_ref, [0, 1, 2], x, own, shared, 1e-6)
    gradients_as_exact(gated_residual_norm, gated_residual_norm_ref, [0, 1, 2, 3, 4], x, y, own, shared, own + 1, 1e-6, **more)
    gradients_as_exact(gated_residual_norm, gated_residual_norm_ref, [0, 1, 4], x, y, None, shared, own, 1e-6, **more)
    gradients_as_exact(rms_norm, rms_norm_ref, [0, 1], x, own[0], 1e-6)
    assert served == ["norm", "norm_gradient"] * 4


@DTYPES
@PER_HEAD
@LENGTHS
def test_gradients_of_the_weights_of_queries_and_keys(level, served, dtype, per_head, length):
    qkv, *given, rows = rotated(dtype, per_head, length, 2, 32)
    gradients_as_exact(qk_norm_rope, qk_norm_rope_ref, [0, 1, 2], qkv, *given, 1e-6, rows, rounded=ROUNDED[dtype])
    gradients_as_exact(qk_norm_rope, qk_norm_rope_ref, [0, 2], qkv, *given, 1e-6, rows, rounded=ROUNDED[dtype])
    assert served == ["rope", "rope_gradient"] * 2


def test_sums_over_tokens_do_not_depend_on_the_threads(level):
    x, gradient = torch.randn(2, 1, 1000, 64)
    needed = True, True, False
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(cpu.norm_gradient(None, gradient, x, None, None, 1e-6, True, None, needed)[2])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found))


@DTYPES
@pytest.mark.parametrize("size", [1, 15, 1000, 40_001])
def test_gelu(level, served, dtype, size):
    gradients_as_exact(gelu, gelu_ref, [0], (4 * torch.randn(size)).to(dtype))
    assert served == ["gelu", "gelu"]


def test_gelus_slope_of_extremes(level):
    x = torch.tensor([-3e38, -1e4, -20.0, -10.0, -0.0, 0.0, 1e-30, 10.0, 20.0, 1e4, 3e38], requires_grad=True)
    gelu(x).sum().backward()
    exact = torch.tensor([0, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1.0])
    torch.testing.assert_close(x.grad, exact, atol=1e-7, rtol=1e-6)
    broken = torch.tensor([torch.nan], requires_grad=True)
    gelu(broken).sum().backward()
    assert broken.grad.isnan().all()


SHAPES = [
    (8, 4, 256, 256, 64),
    (2, 3, 70, 70, 32),
    (1, 2, 33, 300, 128),
    (2, 1, 100, 7, 16),
    (1, 1, 449, 577, 24),  # more queries than a part has
    (1, 2, 5, 3, 40),
]


@DTYPES
@pytest.mark.parametrize("size", [0.05, 1, 6])
@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "head"), SHAPES[1:])
def test_attention(level, served, dtype, size, batch, heads, queries, keys, head):
    q = (size * torch.randn(batch, queries, heads, head)).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, heads, keys, head).to(dtype)
    gradients_as_exact(attention, attention_ref, [0, 1, 2], q, k, v, exact=softmax_formula)
    assert served == ["attention", "attention_gradient"]


@DTYPES
@pytest.mark.parametrize("prompts", [0, 1, 3])
@pytest.mark.parametrize(("batch", "text", "rows", "head"), [(1, 2, 66, 64), (2, 16, 5, 32), (1, 4, 130, 128), (2, 3, 4, 24)])
def test_prompt_attention(level, served, dtype, prompts, batch, text, rows, head):
    q = torch.randn(batch, 50, 3, head).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, 3, text, head).to(dtype)
    prompt = torch.randn(2, prompts, 3, rows, head).to(dtype).unbind()
    given = q, key, value, torch.rand(text) * 5, *prompt, 0.5 + torch.rand(prompts)
    gradients_as_exact(prompt_attention, prompt_attention_ref, [0, 4, 5, 6] if prompts else [0], *given)
    assert served == ["attention", "attention_gradient"]


def test_attention_by_products_is_the_formula():
    q, k, v, g = torch.randn(4, 2, 3, 17, 10).double()
    out, log_sum = attention_saving_ref(q, k, v)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(out, softmax_formula(*given).detach())
    found = attention_backward_ref(g, q, k, v, out, log_sum)
    for one, exact in zip(found, torch.autograd.grad(softmax_formula(*given), given, g)):
        torch.testing.assert_close(one, exact)


@pytest.mark.parametrize("way", ["native", "library", "products"])
def test_the_way_that_was_chosen_serves(way, monkeypatch, served):
    monkeypatch.setattr(backend, "ASKED", "auto")
    offered = []
    monkeypatch.setattr(attention_module.tune, "chosen", lambda *given: offered.append(list(given[3])) or way)
    q, k, v = torch.randn(3, 1, 2, 40, 64)
    gradients_as_exact(attention, attention_ref, [0, 1, 2], q, k, v)
    assert offered == [["native", "library", "products"]] * 2
    assert served == (["attention", "attention_gradient"] if way == "native" else [])


@pytest.mark.parametrize("way", ["native", "library", "products"])
def test_every_way_gives_what_compiled_graphs_are_told_to_expect(way, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "auto")
    monkeypatch.setattr(attention_module.tune, "chosen", lambda *given: way)
    q, k, v, g = torch.randn(4, 3, 50, 2, 64).transpose(2, 3)
    for operation, given in (("attention_learned", (q, k, v)), ("attention_learned_backward", None)):
        given = given or (g, q, k, v, *torch.ops.ebr.attention_learned(q, k, v))
        found = getattr(torch.ops.ebr, operation)(*given)
        shapes = (torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta") for one in given)
        told = getattr(torch.ops.ebr, operation)(*shapes)
        assert [one.stride() for one in found] == [one.stride() for one in told]


def test_products_that_fill_the_memory_are_not_tried(monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "auto")
    monkeypatch.setattr(attention_module, "LARGEST_SCORES", 40 * 40)
    offered = []
    monkeypatch.setattr(attention_module.tune, "chosen", lambda *given: offered.append(list(given[3])) or "native")
    q, k, v = torch.randn(3, 1, 2, 40, 64)
    attention(q.requires_grad_(), k, v).sum().backward()
    assert offered == [["native", "library"]] * 2


@DTYPES
def test_threads_make_no_difference(level, dtype):
    q, k, v, g = torch.randn(4, 1, 3, 450, 64).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            given = [x.clone().requires_grad_() for x in (q, k, v)]
            results.append(torch.autograd.grad(attention(*given), given, g))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@DTYPES
def test_what_is_not_finite_is_not_hidden(level, dtype):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 70, 64).to(dtype))
    g = torch.ones(1, 2, 70, 64, dtype=dtype)
    g[0, 1, 69, 3] = torch.nan
    dq, dk, dv = torch.autograd.grad(attention(q, k, v), (q, k, v), g)
    assert dq[0, 1, 69].isnan().all()
    assert dv[0, 1, :, 3].isnan().all()
    assert all(x[0, 0].isfinite().all() for x in (dq, dk, dv))


def test_what_it_has_no_kernel_for_takes_torchs_way(level, served):
    q, k, v = torch.randn(3, 1, 2, 9, 10)  # a head of ten
    gradients_as_exact(attention, attention_ref, [0, 1, 2], q, k, v)
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    layer_norm_modulate(x, torch.ones(1, 16), torch.zeros(1, 16)).sum().backward()
    qkv, angle = torch.randn(1, 3, 3 * 24), torch.rand(3, 6)  # a half of six
    gradients_as_exact(qk_norm_rope, qk_norm_rope_ref, [0], qkv, *torch.ones(2, 24), angle.cos(), angle.sin(), 2, 1e-6)
    assert served == []


def test_operations_are_registered_as_torch_wants_them(monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "auto")
    x, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16)
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-6))
    torch.library.opcheck(rms_norm_op, (x, weight.requires_grad_(), 1e-6))
    torch.library.opcheck(gelu_op, (x,))
    q, k, v = (torch.randn(2, 5, 3, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    torch.library.opcheck(attention_module.attention_learned_op, (q, k, v))


def test_rms_norms_gradient_is_the_references():
    x, weight, g = torch.randn(2, 5, 16).double().requires_grad_(), torch.randn(16).double(), torch.randn(2, 5, 16).double()
    (exact,) = torch.autograd.grad(rms_norm_ref(x, weight, 1e-6), x, g)
    torch.testing.assert_close(rms_norm_backward_ref(g, x, weight, 1e-6), exact)


def test_compiled_code_calls_it(level, served):
    torch.compiler.reset()
    weight, tables = torch.ones(64), (torch.ones(1, 64), torch.zeros(1, 64))

    def block(x):
        q = rms_norm(layer_norm_modulate(gelu(x), *tables), weight).unflatten(-1, (1, 64)).transpose(1, 2)
        return attention(q, q, q)

    x = torch.randn(2, 20, 64, requires_grad=True)
    (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    names = list(served)
    assert names == ["gelu", "norm", "norm", "attention", "attention_gradient", "norm_gradient", "norm_gradient", "gelu"]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(found, plain)
    assert served == names * 2


@pytest.mark.parametrize("learned", [False, True])
def test_a_packed_layers_bias_is_added_by_the_product_unless_it_is_learned(level, served, learned):
    if not can_pack(torch.float32):
        pytest.skip("no packed products here")
    weight, bias = torch.randn(24, 16), torch.randn(24)
    packed = PackedWeight(weight, learns=True)

    def reference(x, bias):
        return gelu_ref(nn.functional.linear(x, weight.to(x.dtype), bias))

    def ours(x, bias):
        return packed_linear(x, packed, bias, gelu=True)

    gradients_as_exact(ours, reference, [0, 1] if learned else [0], torch.randn(3, 7, 16), bias)
    assert served == ["gelu", "gelu"]
