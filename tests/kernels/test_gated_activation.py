"""The gate of a feed-forward, joined with what goes beside it."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.gated_activation import (
    gated_activation,
    gated_activation_fp8,
    gated_activation_fp8_ref,
    gated_activation_ref,
)

OPS = pytest.mark.parametrize("op", [gated_activation, gated_activation_ref])
FP8_OPS = pytest.mark.parametrize("op", [gated_activation_fp8, gated_activation_fp8_ref])
SHAPES = [((1,), 1, None), ((2, 3), 12, 7), ((3, 1, 2), 33, 16), ((2,), 1536, 40), ((5,), 20, 64)]


def formula(x, beside):
    gate, up = x.unflatten(-1, (2, -1)).unbind(-2)
    hidden = gate / (1 + (-gate).exp()) * up
    return hidden if beside is None else torch.cat((beside, hidden), -1)


def inputs(rows, width, side):
    return {"x": 2 * torch.randn(*rows, 2 * width), "beside": None if side is None else 3 * torch.randn(*rows, side)}


@OPS
@pytest.mark.parametrize(("rows", "width", "side"), SHAPES)
def test_it_is_the_formula(op, rows, width, side, agree):
    agree(op, formula, ["x"] if side is None else ["x", "beside"], **inputs(rows, width, side))


@OPS
@pytest.mark.parametrize(("rows", "width", "side"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(op, rows, width, side, dtype, rounded_once):
    given = [None if one is None else one.to(dtype) for one in inputs(rows, width, side).values()]
    rounded_once(op(*given), formula(*(one if one is None else one.double() for one in given)))


@FP8_OPS
@pytest.mark.parametrize(("rows", "width", "side"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_not_rounded_to_anything_else_before(op, rows, width, side, dtype, quantised_once):
    given = [None if one is None else one.to(dtype) for one in inputs(rows, width, side).values()]
    quantised_once(op(*given), formula(*(one if one is None else one.double() for one in given)))


@FP8_OPS
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_scale_is_that_of_whichever_part_is_larger(op, factor):
    given = inputs((4,), 24, 10)
    given["beside"] *= factor
    y = formula(**given)
    torch.testing.assert_close(op(**given).scale, y.abs().amax(-1, keepdim=True) / 448)
    assert (y[:, :10].abs().amax(-1) > y[:, 10:].abs().amax(-1)).all() == (factor > 1)


@OPS
def test_gates_that_are_far_from_zero_stay_finite_with_their_gradients(op):
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 2.0, 3.0, 4.0, 5.0, 6.0]], requires_grad=True)
    y = op(x, None)
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 0.0, 500.0, 6e4]]))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0.0, 2.0, 5.0, 6.0, 0.0, 0.0, 0.0, 100.0, 1e4]]))


@OPS
def test_views_are_read_where_they_lie(op):
    x, joint = torch.randn(2, 5, 24), torch.randn(2, 5, 3, 8)
    for beside in (joint[:, :, 1], joint.transpose(1, 2)[:, 0], joint[:1, :, 0].expand(2, -1, -1)):
        assert torch.equal(op(x, beside), op(x, beside.clone()))
        assert torch.equal(op(x[:, 1:], beside[:, 1:]), op(x, beside)[:, 1:])


@OPS
@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)])
def test_nothing_gives_nothing(op, shape):
    x = torch.randn(shape, requires_grad=True)
    result = op(x, torch.randn(*shape[:-1], 5))
    assert result.shape == (*shape[:-1], 11)
    result.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("learned", ["x", "beside"])
def test_a_gradient_through_fp8_is_refused(learned):
    given = inputs((2, 3), 12, 5)
    given[learned].requires_grad_()
    with pytest.raises(ValueError, match="gated_activation_fp8 has no gradient"):
        gated_activation_fp8(**given)
    with torch.no_grad():
        gated_activation_fp8(**given)


@pytest.mark.skipif(not backend.INTERPRETED, reason="elsewhere both are the reference")
@pytest.mark.parametrize("side", [None, 40])
def test_the_kernel_and_the_reference_quantise_alike(side):
    """But for what lies within a rounding of float32 of the middle between two values."""
    given = inputs((20,), 250, side)
    (values, scale), (expected, sizes) = gated_activation_fp8(**given), gated_activation_fp8_ref(**given)
    torch.testing.assert_close(scale, sizes, rtol=1e-6, atol=0)
    assert (values.float() != expected.float()).float().mean() < 1e-3
