"""Keys and values of a context for every block at once.

K_b = RMSNorm(W_k,b c + b_k,b) · weight_b        across heads
V_b = W_v,b c + b_v,b
"""

import torch
from torch import Tensor

from ebr_engine.kernels.qk_norm_rope import rms_norm_ref


def context_kv_ref(context: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """The formulas; see `context_kv`."""
    kv = torch.einsum("cld,bed->bcle", context, weight.to(context.dtype)) + bias.to(context.dtype)[:, None, None]
    key, value = kv.chunk(2, dim=-1)
    key = rms_norm_ref(key, norm[:, None, None], eps).to(context.dtype)
    return key.unflatten(-1, (heads, -1)).transpose(2, 3), value.unflatten(-1, (heads, -1)).transpose(2, 3)


def context_kv(
    context: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Project contexts to the cross-attention keys and values of all blocks.

    Args: `context` [C, L, D]; `weight` [blocks, 2D, D] (key rows, then value rows); `bias` [blocks, 2D]; `norm` [blocks, D].
    Returns: key and value, each [blocks, C, heads, L, D/heads] in `context.dtype`.
    """
    return context_kv_ref(context, weight, bias, norm, heads, eps)
