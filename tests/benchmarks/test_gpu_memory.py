"""Every section of the GPU check fits a card of 80 GB on paper."""

import pytest
import torch

from benchmarks import gpu_memory

SECTIONS = [name for name in gpu_memory.SECTIONS if name not in gpu_memory.NOT_COUNTED]
QUICK = ["train-wan", "attention", "vae-flux"]  # a few seconds each


def test_bytes_are_followed_until_they_go():
    with gpu_memory.on_paper() as alive:
        x = torch.empty(1000, 1000)
        y = x + 1
        assert alive.now == 8_000_000
        del y
        z = x.view(-1)  # the same storage
        (z * 2).sum()
        assert alive.now < 4_100_000
        del x, z
        assert alive.now < 100
    assert alive.peak == pytest.approx(8e6, abs=100)


def test_a_graph_keeps_what_its_run_needed():
    with gpu_memory.on_paper() as alive:
        x = torch.empty(1000)
        kept = gpu_memory.gpu_models.captured(lambda: (x + 1) * 2, torch.device("cpu"))
        assert alive.now == 4000 * 3  # x, the result, and the sum in the graph's pool
        assert kept().shape == x.shape


HEAVY = [pytest.param(name, marks=pytest.mark.slow) for name in SECTIONS if name not in QUICK]


@pytest.mark.parametrize("section", QUICK + HEAVY)
def test_a_section_fits_a_card_of_80_gb(section):
    assert 0.1e9 < gpu_memory.peak(section) <= gpu_memory.CARD - gpu_memory.MARGIN
