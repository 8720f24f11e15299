"""Classical methods undo the degradation that they are made for, and keep what needs nothing."""

import pytest
import torch

from benchmarks.claims import classical
from benchmarks.claims.common import make_case
from ebr_engine.evaluation.metrics import psnr


@pytest.mark.parametrize("task", ["haze", "lowlight"])
def test_tones_are_repaired(task):
    gains = []
    for photo in ("astronaut", "motorcycle"):
        case = make_case(photo, task, 96, 0)
        restored = classical.METHODS[task](case.degraded)
        assert restored.shape == case.clean.shape
        gains.append(psnr(restored, case.clean) - psnr(case.degraded, case.clean))
    assert min(gains) > 1


@pytest.mark.parametrize("shape", [(40, 51), (9, 7)])
def test_every_method_takes_odd_sizes_and_stays_in_range(shape):
    picture = torch.rand(1, 3, *shape)
    for method in classical.METHODS.values():
        restored = method(picture)
        assert restored.shape == picture.shape
        assert restored.dtype == torch.float32
        assert 0 <= restored.min() <= restored.max() <= 1


def test_wiener_sharpens_what_its_gaussian_blurred():
    clean = make_case("coffee", "blur", 96, 0).clean
    position = torch.arange(-8, 9.0)
    kernel = torch.exp(-0.5 * (position / classical.WIENER_SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = torch.nn.functional.pad(clean, [8] * 4, mode="reflect")
    blurred = torch.nn.functional.conv2d(torch.nn.functional.conv2d(padded, kernel, groups=3), kernel.mT, groups=3)
    assert psnr(classical.deblur(blurred), clean) > psnr(blurred, clean) + 1


def test_medians_take_out_what_is_thin():
    picture = torch.full((1, 3, 20, 20), 0.4)
    streak = picture.clone()
    streak[..., :, 7] = 1.0
    assert torch.equal(classical.derain(streak), picture)
    assert torch.equal(classical.desnow(streak), picture)
