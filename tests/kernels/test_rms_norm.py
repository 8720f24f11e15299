"""RMSNorm of rows against its formula in float64; native code is compared in `test_cpu.py`."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.rms_norm import rms_norm


def formula(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("asked", ["auto", "torch"])
@pytest.mark.parametrize("width", [3, 67, 256])
def test_it_is_the_formula(asked, width, agree, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", asked)
    agree(rms_norm, formula, ["x"], x=torch.randn(2, 5, width), weight=torch.rand(width) + 0.5, eps=1e-6)


def test_bf16_is_rounded_once(rounded_once):
    x, weight = torch.randn(2, 5, 64).bfloat16(), (torch.rand(64) + 0.5).bfloat16()
    rounded_once(rms_norm(x, weight, 1e-6), formula(x.double(), weight.double(), 1e-6))
