"""LayerNorm and modulation in one pass."""

import pytest
import torch

from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_ref

OPS = pytest.mark.parametrize("op", [layer_norm_modulate, layer_norm_modulate_ref])
SHAPES = [(1, 1, 7), (2, 5, 12), (3, 17, 33), (1, 2, 1536)]


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
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_it_is_the_formula(op, shape, shared, eps, agree):
    agree(op, formula, ["x"], **inputs(shape, shared), eps=eps)


@OPS
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_rounded_once(op, shape, rounded_once):
    given = inputs(shape)
    x = given.pop("x").bfloat16()
    wide = {name: value.double() for name, value in given.items()}
    rounded_once(op(x, **given, eps=1e-6), formula(x.double(), **wide, eps=1e-6))


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
