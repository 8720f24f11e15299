"""RMSNorm of rows with a weight, in float32: cross-attention's queries.

y = x / sqrt(mean(x²) + eps) · weight
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.rows import wide


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula with float32 statistics, rounded once."""
    return torch.nn.functional.rms_norm(wide(x), x.shape[-1:], wide(weight), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Args: `x` [B, N, D]; `weight` [D]; `eps` is added to the mean square. Returns: [B, N, D] in `x.dtype`."""
    cpu = backend.native(x, weight)
    if cpu and (out := cpu.rms_norm(x, weight, eps)) is not None:
        return out
    return rms_norm_ref(x, weight, eps)
