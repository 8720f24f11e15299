"""A gated residual and the norm after it."""

import pytest
import torch

from ebr_engine.kernels.gated_residual_norm import (
    gated_residual_norm,
    gated_residual_norm_fp8,
    gated_residual_norm_fp8_ref,
    gated_residual_norm_ref,
)

OPS = pytest.mark.parametrize("op", [gated_residual_norm, gated_residual_norm_ref])
FP8_OPS = pytest.mark.parametrize("op", [gated_residual_norm_fp8, gated_residual_norm_fp8_ref])
SHAPES = [(1, 1, 7), (2, 3, 12), (1, 2, 33), (1, 2, 1536)]


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
    given = inputs((2, 2, 12)) | {"weight": torch.randn(1, 12), "bias": torch.randn(1, 12)}
    agree(op, formula, ["x", "y"], **given, eps=1e-6)


@OPS
@pytest.mark.parametrize("shared", [False, True])
def test_the_gate_and_the_affine_have_gradients_too(op, shared, agree):
    agree(op, formula, ["x", "y", "gate", "weight", "bias"], **inputs((2, 2, 12), True, shared), eps=1e-6)
    agree(op, formula, ["gate"], **inputs((2, 2, 12), True, shared), eps=1e-6)


@OPS
@pytest.mark.parametrize("i", [0, 1])
def test_either_output_alone_has_gradients(op, i, agree):
    agree(lambda **given: op(**given)[i], lambda **given: formula(**given)[i], ["x", "y"], **inputs((2, 2, 8)), eps=1e-6)


@OPS
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 3072)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_rounded_once_and_the_norm_is_of_the_unrounded_sum(op, shape, gated, dtype, rounded_once):
    given = inputs(shape, gated)
    given |= {name: given[name].to(dtype) for name in "xy"}
    wide = {name: None if value is None else value.double() for name, value in given.items()}
    for value, reference in zip(op(**given, eps=1e-6), formula(**wide, eps=1e-6)):
        rounded_once(value, reference)


@OPS
def test_inputs_are_left_alone(op):
    given = inputs((2, 3, 8))
    copies = {name: value.clone() for name, value in given.items()}
    op(**given, eps=1e-6)
    assert all(torch.equal(value, copies[name]) for name, value in given.items())


@OPS
def test_affine_weights_may_be_in_the_dtype_of_the_trunk(op, rounded_once):
    given = inputs((2, 3, 12), gated=False, shared=True)
    given |= {name: given[name].bfloat16() for name in ("x", "y", "weight", "bias")}
    wide = {name: None if value is None else value.double() for name, value in given.items()}
    for value, reference in zip(op(**given, eps=1e-6), formula(**wide, eps=1e-6)):
        rounded_once(value, reference)


@OPS
def test_gradients_in_bf16_are_as_exact_as_two_roundings(op, relative_rms):
    given = inputs((2, 3, 48))
    leaves = {name: given[name].bfloat16() for name in "xy"}
    pulls = [torch.randn(2, 3, 48).bfloat16() for _ in range(2)]

    def gradients(function, dtype):
        own = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
        tables = {name: given[name].double() if dtype == torch.float64 else given[name] for name in ("gate", "weight", "bias")}
        return torch.autograd.grad(function(**own, **tables, eps=1e-6), list(own.values()), [pull.to(dtype) for pull in pulls])

    for value, reference in zip(gradients(op, torch.bfloat16), gradients(formula, torch.float64)):
        assert value.dtype == torch.bfloat16
        assert relative_rms(value, reference) < 2 * 2**-9


@FP8_OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_of_the_unrounded_norm_of_the_unrounded_sum(op, shape, gated, dtype, rounded_once, quantised_once, relative_rms):
    given = inputs(shape, gated)
    given |= {name: given[name].to(dtype) for name in "xy"}
    wide = {name: None if value is None else value.double() for name, value in given.items()}
    (total, quantized), (expected_total, expected) = op(**given, eps=1e-6), formula(**wide, eps=1e-6)
    quantised_once(quantized, expected)
    assert total.dtype == dtype
    if dtype == torch.float32:
        assert relative_rms(total, expected_total) < 1e-6
    else:
        rounded_once(total, expected_total)


@pytest.mark.parametrize("learned", ["x", "y", "gate", "bias"])
def test_a_gradient_through_fp8_is_refused(learned):
    given = inputs((2, 3, 12))
    given[learned].requires_grad_()
    with pytest.raises(ValueError, match="gated_residual_norm_fp8 has no gradient"):
        gated_residual_norm_fp8(**given)
    with torch.no_grad():
        gated_residual_norm_fp8(**given)


@OPS
def test_views_are_read_where_they_lie(op):
    tables, joint = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    views = joint[:, 2:], torch.randn(2, 12, 3).transpose(1, 2), *tables.unbind(1)[:3]
    copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
    for value, reference in zip(op(*views, 1e-6), op(*copies, 1e-6)):
        assert torch.equal(value, reference)


@OPS
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_nothing_gives_nothing(op, shape):
    x, y = torch.randn(2, *shape).unbind()
    x.requires_grad_()
    results = op(x, y, *torch.randn(3, 1, 12).unbind(), 1e-6)
    assert [result.shape for result in results] == [shape, shape]
    sum(result.sum() for result in results).backward()
    assert x.grad.shape == shape
