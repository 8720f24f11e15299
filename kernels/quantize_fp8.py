"""Quantisation to fp8 by row.

scale_r = max(|x_r|) / 448,   q_r = round_e4m3(x_r / scale_r)
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-12  # a row of zeros keeps a scale that can be divided by


def quantize_fp8_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float32; see `quantize_fp8`."""
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows: `x` [..., K] → values [..., K] float8_e4m3fn and scales [..., 1] float32, with x ≈ values · scales."""
    return quantize_fp8_ref(x)
