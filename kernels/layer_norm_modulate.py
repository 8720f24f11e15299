"""LayerNorm and AdaLN modulation in one pass.

y = (x − mean(x)) / sqrt(var(x) + eps) · weight + bias          weight = 1 + scale, bias = shift
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_modulate_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula with float32 statistics; see `layer_norm_modulate`."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(bias.unsqueeze(-2), normed, weight.unsqueeze(-2)).to(x.dtype)


def layer_norm_modulate(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise rows without affine weights and modulate them (DiT's AdaLN).

    Args: `x` [B, N, D]; `weight` (1 + scale) and `bias` (shift) [B or 1, D] float32; `eps` is added to the variance.
    Returns: [B, N, D] in `x.dtype`.
    """
    return layer_norm_modulate_ref(x, weight, bias, eps)
