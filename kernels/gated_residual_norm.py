"""A gated residual and the norm that follows it, in one pass.

x' = x + gate · y
n  = LayerNorm(x') · weight + bias          affine weights, or a modulation with weight = 1 + scale, bias = shift
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_residual_norm_ref(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The formulas in float32; see `gated_residual_norm`."""
    wide = x.float() + y.float() if gate is None else torch.addcmul(x.float(), y.float(), gate.unsqueeze(-2))
    normed = F.layer_norm(wide, x.shape[-1:], eps=eps)
    normed = torch.addcmul(bias.float().unsqueeze(-2), normed, weight.float().unsqueeze(-2))
    return wide.to(x.dtype), normed.to(x.dtype)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and normalise the sum for the next branch.

    Args: `x`, `y` [B, N, D]; `gate` [B or 1, D] float32, or None for 1; `weight`, `bias` [B or 1, D]; `eps` is added to
    the variance.
    Returns: the new residual stream and its norm, both [B, N, D] in `x.dtype`; statistics are float32, taken before the
    residual stream is rounded.
    """
    return gated_residual_norm_ref(x, y, gate, weight, bias, eps)
