"""Damage as heavy public sets of pairs have it."""

import torch

from ebr_engine.media.degradations import degrade
from ebr_engine.media.heavy import REACH, _path, downpour, shake


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_downpour_only_adds_light_and_is_heavier_than_the_heaviest_rain():
    clean = torch.rand(4, 3, 48, 64, generator=seeded(0)) * 0.6
    wet = downpour(clean, seeded(1))
    assert wet.shape == clean.shape
    assert (wet >= clean - 1e-6).all()
    assert wet.max() <= 1
    assert torch.equal(wet, downpour(clean, seeded(1)))
    rain = degrade(clean, "rain", seeded(1), strength=1.0)
    assert (wet - clean).square().mean() > (rain - clean).square().mean()


def test_a_path_is_a_kernel_with_its_mass_in_the_middle():
    side = torch.arange(-REACH, REACH + 1.0)
    for seed in range(8):
        kernel = _path(seeded(seed))
        assert torch.isclose(kernel.sum(), torch.tensor(1.0))
        assert (kernel >= 0).all()
        assert abs(float((kernel.sum(1) * side).sum())) < 0.5
        assert abs(float((kernel.sum(0) * side).sum())) < 0.5
        assert float((kernel * (side[:, None] ** 2 + side**2)).sum()) > 0.5  # it has moved


def test_a_shaken_picture_keeps_its_light_and_loses_its_detail():
    clean = torch.rand(2, 3, 40, 12, generator=seeded(0))  # narrower than a path is long
    shaken = shake(clean, seeded(1))
    assert shaken.shape == clean.shape
    assert torch.equal(shaken, shake(clean, seeded(1)))
    assert (shaken.mean((2, 3)) - clean.mean((2, 3))).abs().max() < 0.05
    assert shaken.std((2, 3)).max() < 0.7 * clean.std((2, 3)).min()
    assert not torch.allclose(shaken[0] - clean[0], shaken[1] - clean[1])
