"""A gated residual and the norm after it."""

import pytest
import torch

from ebr_engine.kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_ref

OPS = pytest.mark.parametrize("op", [gated_residual_norm, gated_residual_norm_ref])
SHAPES = [(1, 1, 7), (2, 5, 12), (3, 17, 33), (1, 2, 1536)]


def formula(x, y, gate, weight, bias, eps):
    total = x + (y if gate is None else gate[:, None] * y)
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return total, normed * weight[:, None] + bias[:, None]


def inputs(shape, gated=True, shared=False):
    x, y = torch.randn(2, *shape).unbind()
    gate, weight, bias = torch.randn(3, 1 if shared else shape[0], shape[-1]).unbind()
    return {"x": 3 * x, "y": y, "gate": gate if gated else None, "weight": weight, "bias": bias}


@OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [False, True])
def test_it_is_the_formula(op, shape, gated, shared, agree):
    agree(op, formula, ["x", "y"], **inputs(shape, gated, shared), eps=1e-6)


@OPS
def test_eps_is_added_to_the_variance(op, agree):
    agree(op, formula, ["x", "y"], **inputs((2, 3, 8)), eps=0.5)


@OPS
def test_the_gate_and_the_affine_may_have_different_batches(op, agree):
    given = inputs((3, 5, 12)) | {"weight": torch.randn(1, 12), "bias": torch.randn(1, 12)}
    agree(op, formula, ["x", "y"], **given, eps=1e-6)


@OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_bf16_outputs_are_rounded_once_and_the_norm_is_of_the_unrounded_sum(op, shape, gated, rounded_once):
    given = inputs(shape, gated)
    given |= {name: given[name].bfloat16() for name in "xy"}
    wide = {name: None if value is None else value.double() for name, value in given.items()}
    for value, reference in zip(op(**given, eps=1e-6), formula(**wide, eps=1e-6)):
        rounded_once(value, reference)


@OPS
def test_inputs_are_left_alone(op):
    given = inputs((2, 3, 8))
    copies = {name: value.clone() for name, value in given.items()}
    op(**given, eps=1e-6)
    assert all(torch.equal(value, copies[name]) for name, value in given.items())
