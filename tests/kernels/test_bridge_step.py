"""One step of the sampler."""

import pytest
import torch

from ebr_engine.kernels.bridge_step import bridge_step, bridge_step_ref

OPS = pytest.mark.parametrize("op", [bridge_step, bridge_step_ref])


@OPS
@pytest.mark.parametrize("shape", [(1,), (2, 3, 1, 5, 7), (1, 16, 2, 6, 10), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_three_scalars_in_float32(op, shape, dtype):
    x, velocity, degraded = torch.randn(3, *shape).unbind()
    coefficients = torch.tensor([0.9, -0.3, 0.25])
    velocity = velocity.to(dtype)
    c0, c1, c2 = coefficients.double().tolist()
    expected = c0 * x.double() + c1 * velocity.double() + c2 * degraded.double()
    result = op(x.clone(), velocity, degraded, coefficients)
    assert result.dtype == torch.float32
    # Three products and two sums of numbers below 5, each rounded to float32.
    assert ((result.double() - expected).abs() < 5 * 5 * torch.finfo(torch.float32).eps).all()
    assert result.shape == shape


@OPS
def test_only_the_state_may_be_written_to(op):
    x, velocity, degraded = torch.randn(3, 2, 5).unbind()
    copies = velocity.clone(), degraded.clone()
    op(x, velocity, degraded, torch.tensor([0.5, 0.5, 0.5]))
    assert torch.equal(velocity, copies[0])
    assert torch.equal(degraded, copies[1])


@OPS
def test_views_are_read_where_they_lie(op):
    x, velocity, degraded = torch.randn(3, 4, 5, 2).transpose(1, 3).unbind()
    coefficients = torch.randn(3, 2)[:, 0]
    expected = op(x.clone(), velocity.contiguous(), degraded.contiguous(), coefficients.clone())
    assert torch.equal(op(x, velocity, degraded, coefficients), expected)
