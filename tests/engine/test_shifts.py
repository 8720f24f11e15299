"""What of a run does not depend on a pixel: shifts of the grid of patches."""

from types import SimpleNamespace

import pytest
import torch

from ebr_engine.backbones.registry import spec
from ebr_engine.engine.plan import alternating, shifted
from ebr_engine.engine.restorer import Restorer

MINI = SimpleNamespace(spec=spec("mini"), patch=2)


def test_grids_alternate_and_the_last_is_in_place():
    assert alternating(MINI, 1) == ((0, 0),)
    assert alternating(MINI, 5) == ((0, 0), (1, 1), (0, 1), (1, 0), (0, 0))
    assert all(alternating(MINI, 8).count(way) == 2 for way in alternating(MINI, 4))
    assert alternating(SimpleNamespace(spec=spec("wan"), patch=2), 5) == ()


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("size", [(4, 6), (2, 2)])
def test_a_shift_moves_the_patches_not_the_picture(shift, size):
    state = torch.randn(2, 3, 1, *size)
    # Pointwise velocities know no patches.
    assert torch.equal(shifted(lambda x, step: x * step)(state, (3.0, shift)), state * 3)

    def mean_of_patches(x, step):
        patches = x.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))
        return patches.mean((-3, -1), keepdim=True).expand_as(patches).flatten(-2).flatten(-3, -2)

    moved = shifted(mean_of_patches)(state, (None, shift))
    assert torch.equal(moved, mean_of_patches(state, None)) == (shift == (0, 0) or size == (2, 2))  # one patch stays whole
    torch.testing.assert_close(moved.mean((-2, -1)), state.mean((-2, -1)))


def test_mini_leaves_less_of_its_grid():
    restorer = Restorer("mini", device="cpu")
    dark = torch.linspace(0.02, 0.2, 128).expand(3, 128, 128).contiguous()
    plan = restorer.plan("lowlight")

    def grid(picture):
        """Steps between rows and columns, at borders of 8 × 8 pixels over those within."""
        steps = [picture.diff(dim=axis).abs().mean((0, -1 if axis == -2 else -2)) for axis in (-1, -2)]
        return sum(float(s[7::8].mean() / s[torch.arange(len(s)) % 8 != 7].mean()) for s in steps)

    plain = type(plan)(plan.table, plan.tables)
    assert grid(restorer.restore(dark, plan=plan)) < 0.9 * grid(restorer.restore(dark, plan=plain))
