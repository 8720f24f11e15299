"""Windows cover the grid, read beyond what they keep, and give what the whole gives where the margin is wide enough."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.media.windows import plan_windows

CASES = [(17, 29, 12, 6, 2), (40, 9, 16, 8, 3), (23, 23, 10, 8, 4), (5, 7, 16, 4, 1), (31, 64, 20, 10, 5)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [(8, 1), (1, 8), (2, 3)])
def test_the_windows_of_an_untouched_picture_add_up_to_it(case, scale):
    read, write = scale
    cells = torch.rand(1, 2, *case[:2])
    before = cells.repeat_interleave(read, -1).repeat_interleave(read, -2)
    total = torch.zeros(1, 2, case[0] * write, case[1] * write)
    for window in plan_windows(*case, read, write):
        part = window.cut(before)
        assert max(part.shape[-2:]) <= case[2] * read
        window.add(part[..., ::read, ::read].repeat_interleave(write, -1).repeat_interleave(write, -2), total)
    expected = cells.repeat_interleave(write, -1).repeat_interleave(write, -2)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_margin_as_wide_as_a_network_sees_makes_the_tiles_exact(case):
    x, kernel = torch.rand(1, 1, *case[:2]), torch.rand(1, 1, 2 * case[4] + 1, 2 * case[4] + 1)

    def network(x):
        return F.conv2d(x, kernel / kernel.sum(), padding=case[4])  # zero padding, which a tile's own border must not show

    total = torch.zeros_like(x)
    for window in plan_windows(*case, 1, 1):
        window.add(network(window.cut(x)), total)
    torch.testing.assert_close(total, network(x), rtol=0, atol=1e-6)


def test_a_grid_that_fits_is_one_window():
    (window,) = plan_windows(8, 12, 12, 0, 0, 4, 2)
    assert window.source == (slice(0, 32), slice(0, 48))
    assert window.target == window.kept == (slice(0, 16), slice(0, 24))
