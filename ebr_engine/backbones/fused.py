"""Norms for the layers that read them: quantised in the same pass where those are fp8."""

from typing import Any

from torch import Tensor, nn

from ebr_engine.backbones.quantized import takes_fp8
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_fp8
from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_fp8
from ebr_engine.kernels.quantize_fp8 import Quantized


def normed_for(linears: tuple[nn.Module, ...], x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | Quantized:
    """`layer_norm_modulate` for the layers that read it: quantised in the same pass where they are fp8."""
    norm = layer_norm_modulate_fp8 if takes_fp8(*linears) else layer_norm_modulate
    return norm(x, weight, bias, eps)


def residual_normed_for(
    linears: tuple[nn.Module, ...], x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Any]:
    """`gated_residual_norm` for the layers that read the norm: quantised in the same pass where they are fp8."""
    norm = gated_residual_norm_fp8 if takes_fp8(*linears) else gated_residual_norm
    return norm(x, y, gate, weight, bias, eps)
