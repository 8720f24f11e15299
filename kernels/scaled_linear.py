"""A linear layer of fp8 e4m3 activations and weights with row scales.

y = (q_x · s_x) (q_w · s_w)ᵀ + b
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels.quantize_fp8 import quantize_fp8


def scaled_linear_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """Dequantise and multiply, in `dtype`; see `scaled_linear`."""
    wide_x, wide_weight = (x.float() * x_scale).to(dtype), (weight.float() * weight_scale).to(dtype)
    return F.linear(wide_x, wide_weight, bias.to(dtype))


class _ScaledLinear(torch.autograd.Function):
    """Gradient to the input only, as if it had not been rounded: the weight is frozen, and e4m3 has no room for gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        return scaled_linear_ref(*quantize_fp8(x), weight, weight_scale, bias, x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, weight_scale = ctx.saved_tensors
        return gradient @ (weight.float() * weight_scale).to(gradient.dtype), None, None, None


def scaled_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """Quantise the activations by token and multiply with an fp8 weight.

    Args: `x` [..., K]; `weight` [N, K] float8_e4m3fn with `weight_scale` [N, 1] float32; `bias` [N].
    Returns: [..., N] in `x.dtype`. Runs as dequantise + matmul: the numbers of fp8, not its speed.
    """
    return _ScaledLinear.apply(x, weight, weight_scale, bias)
