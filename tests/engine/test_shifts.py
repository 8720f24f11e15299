"""The grid of tokens, which `mini` moves from step to step, does not show in what it restores."""

import pytest
import torch
from torch import Tensor

from ebr_engine import Restorer
from ebr_engine.evaluation.photos import make_case

TOKEN = 8  # pixels
SEEN = 0.5  # of 255: over the block codec the excess was 1.0 (rain) and 3.3 (low light)


@pytest.fixture(scope="module")
def restorer():
    return Restorer("mini", device="cpu", precision="fp32")


def excess(picture: Tensor) -> float:
    """Mean step of luminance across borders of 8 × 8 pixels over that elsewhere, of 255; `picture` [1, 3, H, W]."""
    luma = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), picture) * 255
    total = 0.0
    for axis, other in ((-1, -2), (-2, -1)):
        steps = luma.diff(dim=axis).abs().mean((0, other))
        at_border = torch.arange(len(steps)) % TOKEN == TOKEN - 1
        total += float(steps[at_border].mean() - steps[~at_border].mean()) / 2
    return total


@pytest.mark.parametrize("task", ["rain", "snow", "blur", "haze", "lowlight"])
def test_mini_leaves_no_grid(restorer, task):
    case = make_case("chelsea", task, 256)
    assert excess(restorer.restore(case.degraded, task=task)) - excess(case.clean) < SEEN
