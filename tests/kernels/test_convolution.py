"""3 × 3 convolutions of frames, and the sum over them."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels.convolution import convolution, convolution_ref, packed

WINOGRAD = 1e-5  # relative: transforms of 6 × 6 pixels grow float32's rounding some thirty times


def inputs(channels, outputs, taps, height, width):
    frames = [torch.randn(1, channels, height, width).contiguous(memory_format=torch.channels_last) for _ in range(taps)]
    weight = packed(torch.randn(outputs, channels, taps, 3, 3) / (9 * channels * taps) ** 0.5)
    return frames, weight, torch.randn(outputs)


def formula(frames, weight, bias, added=None, doubled=False):
    """A convolution over time of all frames in float64."""
    shape = frames[-1].shape
    x = torch.stack([torch.zeros(shape) if frame is None else frame for frame in frames], 2).double()
    x = x.repeat_interleave(2, 3).repeat_interleave(2, 4) if doubled else x
    y = F.conv3d(F.pad(x, (1, 1, 1, 1)), weight.double(), bias.double())[:, :, 0]
    return y if added is None else y + added


SIZES = [(96, 32, 3, 25, 31), (16, 40, 1, 32, 32), (3, 96, 3, 30, 20), (64, 3, 3, 24, 23), (5, 7, 2, 40, 41)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("doubled", [False, True])
def test_it_is_the_sum_over_frames(size, doubled, relative_rms):
    given = inputs(*size)
    assert relative_rms(convolution(*given, doubled=doubled), formula(*given, doubled=doubled)) < WINOGRAD


@pytest.mark.parametrize("known", [1, 2])
def test_what_was_not_is_zeros(known, relative_rms):
    frames, *tables = inputs(32, 64, 3, 20, 30)
    frames = [None] * (3 - known) + frames[-known:]
    assert relative_rms(convolution(frames, *tables), formula(frames, *tables)) < WINOGRAD


@pytest.mark.parametrize("over", [False, True])
def test_what_is_added_is_added(over, relative_rms):
    given = inputs(32, 48, 3, 21, 30)
    added = torch.randn(1, 48, 21, 30).contiguous(memory_format=torch.channels_last)
    expected = formula(*given, added)
    kept = added.clone()
    assert relative_rms(convolution(*given, added, over_added=over), expected) < WINOGRAD
    assert over or torch.equal(added, kept)


def test_inputs_are_left_as_they_are():
    frames, weight, bias = inputs(32, 32, 2, 24, 24)
    before = [t.clone() for t in (*frames, weight, bias)]
    convolution(frames, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip((*frames, weight, bias), before))


def test_a_value_that_is_not_finite_is_seen():
    frames, weight, bias = inputs(16, 32, 1, 24, 24)
    frames[0][0, 3, 10, 10] = torch.inf
    assert not convolution(frames, weight, bias).isfinite().all()


def test_small_frames_other_layouts_and_batches_are_served(relative_rms):
    for size in ((4, 4, 3, 2, 2), (8, 4, 3, 1, 5)):
        given = inputs(*size)
        assert relative_rms(convolution(*given), formula(*given)) < WINOGRAD
    frames, weight, bias = inputs(8, 12, 2, 24, 24)
    plain = [frame.contiguous() for frame in frames]
    assert relative_rms(convolution(plain, weight.contiguous(), bias), formula(frames, weight, bias)) < WINOGRAD
    twice = [frame.expand(2, -1, -1, -1) for frame in frames]
    assert convolution(twice, weight, bias).shape == (2, 12, 24, 24)


def test_bf16_is_the_librarys(relative_rms):
    frames, weight, bias = inputs(16, 32, 3, 24, 24)
    half = [frame.bfloat16() for frame in frames], weight.bfloat16(), bias.bfloat16()
    assert torch.equal(convolution(*half), convolution_ref(*half, None, False))
    assert relative_rms(convolution(*half), formula(frames, weight, bias)) < 2**-6
