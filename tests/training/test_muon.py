"""Muon: what torch's does, for matrices of one shape at a time, in float32 where asked."""

import pytest
import torch

from ebr_engine.training.muon import Muon, orthogonalised

SHAPES = [(24, 8), (24, 8), (8, 40), (16, 16), (24, 8)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def stepped(make):
    """Matrices after three steps on fixed gradients, the last of which leaves one matrix out."""
    params, generator = matrices(), torch.Generator().manual_seed(1)
    optimizer = make(params)
    for step in range(3):
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if (step, i) == (2, 1) else gradient
        optimizer.step()
    return params, optimizer


def test_it_steps_as_torchs_does_within_bfloat16():
    theirs = stepped(lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))[0]
    for precision, allowed in ((torch.bfloat16, 0.02), (torch.float32, 0.02)):
        ours = stepped(lambda p, precision=precision: Muon(p, lr=0.1, weight_decay=0.05, precision=precision))[0]
        for before, a, b in zip(matrices(), ours, theirs):
            assert (a - b).norm() / (b - before).norm() < allowed


def test_its_state_serves_torchs_and_back():
    _, ours = stepped(lambda p: Muon(p, lr=0.1))
    theirs = torch.optim.Muon(matrices(), lr=0.1)
    theirs.load_state_dict(ours.state_dict())
    Muon(matrices()).load_state_dict(theirs.state_dict())
    assert all(set(state) == {"momentum_buffer"} for state in ours.state_dict()["state"].values())


@pytest.mark.parametrize("shape", [(3, 20, 8), (1, 8, 20), (2, 9, 9)])
def test_singular_values_come_near_to_one(shape):
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
