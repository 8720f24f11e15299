"""A norm over channels and SiLU, in one pass."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.channel_norm_silu import channel_norm_silu, channel_norm_silu_op

SHAPES = [(1, 32, 3, 5), (2, 96, 7, 9), (3, 20, 1, 1), (1, 8, 33, 40)]  # frames, channels, height, width


def formula(x, weight, bias, groups, eps, silu, before=None):
    """[frames, D, H, W], as the papers have it."""
    if groups:
        parts = x.unflatten(1, (groups, -1)).flatten(2)
        mean, variance = parts.mean(-1, keepdim=True), parts.var(-1, correction=0, keepdim=True)
        n = ((parts - mean) / (variance + eps).sqrt()).view(x.shape)
    else:
        n = x * x.shape[1] ** 0.5 / x.square().sum(1, keepdim=True).sqrt().clamp(min=eps)
    y = n * weight[:, None, None] + (0 if bias is None else bias[:, None, None])
    y = y / (1 + (-y).exp()) if silu else y
    return y if before is None else torch.cat((before, y))


def inputs(shape, grouped, side_by_side=True):
    x = 2 * torch.randn(shape) + 3  # a mean that is not small beside the deviation
    x = x.contiguous(memory_format=torch.channels_last) if side_by_side else x
    weight, bias = 1 + torch.randn(shape[1]) / 2, torch.randn(shape[1]) if grouped else None
    return {"x": x, "weight": weight, "bias": bias, "groups": 4 if grouped else 0, "eps": 1e-6 if grouped else 1e-12}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("silu", [True, False])
def test_it_is_the_formula(shape, grouped, silu, agree):
    agree(channel_norm_silu, formula, **inputs(shape, grouped), silu=silu)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_memory_does_not_matter(grouped, agree):
    agree(channel_norm_silu, formula, **inputs((2, 12, 5, 7), grouped, side_by_side=False), silu=True)


@pytest.mark.parametrize("grouped", [False, True])
def test_half_precision_is_rounded_once(grouped, rounded_once):
    given = inputs((2, 96, 7, 9), grouped)
    given["x"] = given["x"].bfloat16()
    expected = formula(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}, silu=True)
    rounded_once(channel_norm_silu(**given), expected, slack=1e-4)


def test_frames_before_are_put_in_front(agree):
    before = torch.randn(2, 32, 3, 5).contiguous(memory_format=torch.channels_last)
    agree(channel_norm_silu, formula, **inputs((1, 32, 3, 5), False), silu=True, before=before)


def test_a_pixel_of_zeros_stays_zero():
    assert channel_norm_silu(torch.zeros(1, 16, 2, 2), torch.ones(16)).eq(0).all()


def test_a_frame_that_is_far_from_zero_keeps_its_digits():
    x = (1000 + torch.randn(1, 32, 40, 40)).contiguous(memory_format=torch.channels_last)
    tables = torch.ones(32), torch.zeros(32)
    exact = F.group_norm(x.double(), 8, eps=1e-6)
    assert (channel_norm_silu(x, *tables, 8, 1e-6, silu=False) - exact).abs().max() < 1e-3


def test_the_result_lies_with_channels_side_by_side():
    given = inputs((2, 32, 3, 5), False)
    for before in (None, given["x"][:1]):
        assert channel_norm_silu(**given, before=before).permute(0, 2, 3, 1).is_contiguous()


def test_a_gradient_is_refused():
    with pytest.raises(ValueError, match="no gradient"):
        channel_norm_silu(torch.randn(1, 4, 2, 2, requires_grad=True), torch.ones(4))


@pytest.mark.skipif(backend.INTERPRETED, reason="traces through fake tensors")
@pytest.mark.parametrize("grouped", [False, True])
def test_it_is_known_to_torch(grouped):
    given = inputs((2, 32, 3, 5), grouped)
    x = given.pop("x").permute(0, 2, 3, 1).flatten(1, 2)
    torch.library.opcheck(channel_norm_silu_op, (x, *given.values(), True, None))
    torch.library.opcheck(channel_norm_silu_op, (x, *given.values(), True, x[:1].clone()))
