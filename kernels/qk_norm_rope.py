"""Query and key RMSNorm, rotary position embedding, and the layout attention wants, in one pass over the fused projection.

    q, k, v ← q, k, v + rows                            on the first tokens: a prompt's constant residual (FLUX)
    q, k ← x / sqrt(mean(x²) + eps) · weight            over all heads of a token (Wan) or each head alone (FLUX)
    (a, b) ← (a·cos − b·sin, a·sin + b·cos)             for each rotary pair

Pairs lie in halves: element i of a head pairs with element i + head_dim/2. A checkpoint whose pairs are interleaved is
permuted once when it is loaded; query and key are permuted alike, so attention does not change.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in float32, returned in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas with float32 statistics, rounded once at the end; see `qk_norm_rope`."""
    batch, tokens, width = qkv.shape
    dtype = qkv.dtype
    if rows is not None and rows.shape[-2]:
        qkv = qkv + F.pad(rows.float(), (0, 0, 0, tokens - rows.shape[-2]))

    def to_heads(x: Tensor) -> Tensor:
        return x.view(batch, tokens, heads, width // 3 // heads).transpose(1, 2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_ref(x.unflatten(-1, (-1, weight.shape[0])), weight, eps).flatten(2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(dtype)

    q, k, v = qkv.chunk(3, dim=-1)
    q, k = to_heads(norm(q, q_weight)), to_heads(norm(k, k_weight))
    return rotate(q), rotate(k), to_heads(v.to(dtype))


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused projection into normed and rotated query and key, and value.

    Args: `qkv` [B, N, 3D]; `q_weight`, `k_weight` RMSNorm weights, [D] for a norm across heads, [head_dim] for one of each
    head; `cos`, `sin` [N, head_dim/2] float32; `rows` [L, 3D] or [B, L, 3D], L ≤ N, added to the first L tokens before the norm.
    Returns: q, k, v, each [B, heads, N, head_dim] in `qkv.dtype`.
    """
    return qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)
