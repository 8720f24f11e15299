"""Linear layers whose weights lie in the layout of a CPU's products."""

import gc

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import packed_linear as module
from ebr_engine.kernels.packed_linear import (
    KEPT,
    PackedWeight,
    can_pack,
    packed_feed_forward,
    packed_linear,
    packed_linear_op,
    packed_linear_ref,
)

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this CPU or this torch has no such products")
DTYPES = [torch.float32, *([torch.bfloat16] if can_pack(torch.bfloat16) else [])]


def layer(out=7, inside=5, dtype=torch.float32):
    return torch.randn(out, inside, dtype=dtype), torch.randn(out, dtype=dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_it_is_the_ordinary_layer_rounded_once(shape, dtype, gelu):
    weight, bias = layer(dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = packed_linear_ref(x.double(), weight.double(), bias.double(), gelu)
    result = packed_linear(x, PackedWeight(weight), bias, gelu)
    assert result.dtype == dtype
    assert result.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * max(1.0, expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


def test_views_are_read_where_they_lie():
    weight, bias = layer()
    x = torch.randn(4, 5, 3).transpose(1, 2)
    torch.testing.assert_close(packed_linear(x, PackedWeight(weight.t().contiguous().t()), bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_comes_back_as_it_was(dtype):
    weight, _ = layer(100, 70, dtype)
    assert torch.equal(PackedWeight(weight).dense(), weight)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_pass_through(gelu, learns):
    weight, bias = layer()
    packed, x = PackedWeight(weight, learns), torch.randn(2, 5, requires_grad=True)
    for wanted in ([x], [bias.requires_grad_()], [x, bias]):
        expected = torch.autograd.grad(packed_linear_ref(x, weight, bias, gelu).square().sum(), wanted)
        gradients = torch.autograd.grad(packed_linear(x, packed, bias, gelu).square().sum(), wanted)
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("gelu", [False, True])
def test_torch_knows_the_operation(gelu):
    weight, bias = layer()
    packed = PackedWeight(weight)
    torch.library.opcheck(packed_linear_op, (torch.randn(2, 3, 5), packed.number, bias, gelu))
    graph = torch.compile(lambda x: packed_linear(x * 2, packed, bias, gelu) + 1, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(graph(x), packed_linear_ref(x * 2, weight, bias, gelu) + 1)


def test_torch_knows_the_gradient():
    weight, bias = layer()
    packed, x = PackedWeight(weight, learns=True), torch.randn(2, 3, 5, requires_grad=True)
    torch.library.opcheck(packed_linear_op, (x, packed.number, bias, False))
    graph = torch.compile(lambda x: packed_linear(x * 2, packed, bias, gelu=True), backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(packed_linear_ref(x * 2, weight, bias, True).square().sum(), x)
    (gradient,) = torch.autograd.grad(graph(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_layers_of_one_shape_share_a_graph():
    layers = [(weight, bias, PackedWeight(weight, learns=True)) for weight, bias in (layer(), layer())]
    graph = torch.compile(lambda x, packed, bias: packed_linear(x, packed, bias, gelu=True), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 5, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weight, bias, packed in layers:
            expected = packed_linear_ref(x, weight, bias, True)
            y = graph(x, packed, bias)
            torch.testing.assert_close(y, expected)
            (wanted,) = torch.autograd.grad(expected.square().sum(), x)
            torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted)


def test_what_has_no_gradient_is_refused():
    weight, bias = layer()
    packed, x = PackedWeight(weight, learns=True), torch.randn(2, 5, requires_grad=True)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        packed_linear_op(x, packed.number, bias, True)


@pytest.mark.parametrize("moved", [False, True])
def test_a_bias_has_its_gradient(moved):
    weight, bias = layer()
    packed, x = PackedWeight(weight, learns=True), torch.randn(2, 3, 5, requires_grad=moved)
    given = [bias.requires_grad_()] + [x] * moved
    wanted = torch.autograd.grad(packed_linear_ref(x, weight, bias, False).square().sum(), given)
    for found, exact in zip(torch.autograd.grad(packed_linear(x, packed, bias).square().sum(), given), wanted):
        torch.testing.assert_close(found, exact)


def test_a_weight_is_kept_by_its_layer_alone():
    packed = PackedWeight(layer()[0])
    number = int(packed.number)
    assert KEPT[number] is packed
    del packed
    gc.collect()
    assert number not in KEPT


def test_only_float32_and_bf16_are_packed():
    assert not can_pack(torch.float16)
    assert not can_pack(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 50), (151,), (1, 7), (2, 0)])
def test_a_feed_forward_in_pieces_is_the_layers(dtype, shape, monkeypatch):
    up, down = (torch.randn(size).div(size[1] ** 0.5).to(dtype) for size in ((64, 24), (24, 64)))
    given = PackedWeight(up), torch.randn(64).to(dtype), PackedWeight(down), torch.randn(24).to(dtype)
    x = torch.randn(*shape, 24).to(dtype)
    whole = packed_feed_forward(x, *given)
    monkeypatch.setattr(module, "LARGE_HIDDEN", 64)
    monkeypatch.setattr(module, "HIDDEN_PIECE", 64 * x.element_size() * 10)
    rounding = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(packed_feed_forward(x, *given), whole, **rounding)
    exact = packed_linear_ref(packed_linear_ref(x, up, given[1], True), down, given[3], False)
    torch.testing.assert_close(whole, exact, **rounding)
