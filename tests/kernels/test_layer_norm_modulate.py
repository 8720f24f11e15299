"""LayerNorm and modulation in one pass."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.layer_norm_modulate import (
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_fp8_ref,
    layer_norm_modulate_ref,
)

OPS = pytest.mark.parametrize("op", [layer_norm_modulate, layer_norm_modulate_ref])
FP8_OPS = pytest.mark.parametrize("op", [layer_norm_modulate_fp8, layer_norm_modulate_fp8_ref])
SHAPES = [(1, 1, 7), (2, 3, 12), (1, 2, 33), (1, 2, 1536)]


def formula(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weight[:, None] + bias[:, None]


def inputs(shape, shared=False):
    weight, bias = torch.randn(2, 1 if shared else shape[0], shape[-1]).unbind()
    return {"x": 3 * torch.randn(shape) + 1, "weight": 1 + weight, "bias": bias}


@OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
def test_it_is_the_formula(op, shape, shared, agree):
    agree(op, formula, ["x"], **inputs(shape, shared), eps=1e-6)


@OPS
def test_eps_is_added_to_the_variance(op, agree):
    agree(op, formula, ["x"], **inputs((2, 2, 8)), eps=0.5)


@OPS
def test_the_modulation_has_gradients_too(op, agree):
    agree(op, formula, ["x", "weight", "bias"], **inputs((2, 2, 12)), eps=1e-6)
    agree(op, formula, ["weight"], **inputs((2, 2, 12), shared=True), eps=1e-6)


@OPS
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 3072)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(op, shape, dtype, rounded_once):
    given = inputs(shape)
    x = given.pop("x").to(dtype)
    wide = {name: value.double() for name, value in given.items()}
    rounded_once(op(x, **given, eps=1e-6), formula(x.double(), **wide, eps=1e-6))


@FP8_OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_not_rounded_to_anything_else_before(op, shape, dtype, quantised_once):
    given = inputs(shape)
    given["x"] = given["x"].to(dtype)
    wide = {name: value.double() for name, value in given.items()}
    quantised_once(op(**given, eps=1e-6), formula(**wide, eps=1e-6))


@pytest.mark.parametrize("learned", ["x", "weight"])
def test_a_gradient_through_fp8_is_refused(learned):
    given = inputs((2, 3, 12))
    given[learned].requires_grad_()
    with pytest.raises(ValueError, match="layer_norm_modulate_fp8 has no gradient"):
        layer_norm_modulate_fp8(**given)
    with torch.no_grad():
        layer_norm_modulate_fp8(**given)


@OPS
def test_views_are_read_where_they_lie(op):
    tables, joint = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    views = [joint[:, 3:], joint[:1, :2].expand(2, -1, -1), torch.randn(2, 12, 2).transpose(1, 2)]
    for x in views:
        weight, bias = tables[:, 1], tables[:, 4]
        assert torch.equal(op(x, weight, bias, 1e-6), op(x.clone(), weight.clone(), bias.clone(), 1e-6))


@OPS
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_nothing_gives_nothing(op, shape):
    x = torch.randn(shape, requires_grad=True)
    result = op(x, torch.randn(1, 12), torch.randn(1, 12), 1e-6)
    assert result.shape == shape
    result.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.skipif(not backend.INTERPRETED, reason="the reference broadcasts what the kernel would read past the end of")
def test_a_table_of_another_batch_is_refused():
    with pytest.raises(ValueError, match=r"weight has shape \(2, 12\)"):
        layer_norm_modulate(torch.randn(3, 5, 12), torch.randn(2, 12), torch.randn(1, 12))


@OPS
def test_a_constant_row_becomes_the_bias(op):
    given = inputs((2, 3, 16))
    given["x"][1, 2] = 3.0
    assert torch.equal(op(**given, eps=1e-6)[1, 2], given["bias"][1])


@OPS
def test_rows_far_from_zero_keep_their_variance(op, relative_rms):
    given = inputs((2, 3, 64))
    given["x"] += 1000
    wide = {name: value.double() for name, value in given.items()}
    error = relative_rms(op(**given, eps=1e-6), formula(**wide, eps=1e-6))
    assert error < 8 * 1000 / 3 * torch.finfo(torch.float32).eps  # the mean's rounding over the deviation
