"""Query and key RMSNorm, rotary position embedding, and the layout attention wants, in one pass over the fused projection.

    q, k ← x / sqrt(mean(x²) + eps) · weight            over all heads of a token (Wan)
    (a, b) ← (a·cos − b·sin, a·sin + b·cos)             for each rotary pair

Pairs lie in halves: element i of a head pairs with element i + head_dim/2. A checkpoint whose pairs are interleaved is
permuted once when it is loaded; query and key are permuted alike, so attention does not change.
"""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in float32, returned in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def qk_norm_rope_ref(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas with float32 statistics; `qkv` [B, N, 3D]; `cos`, `sin` [N, head_dim/2] → three [B, heads, N, head_dim]."""
    batch, tokens, width = qkv.shape

    def to_heads(x: Tensor) -> Tensor:
        return x.view(batch, tokens, heads, width // 3 // heads).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(qkv.dtype)

    q, k, v = qkv.chunk(3, dim=-1)
    q, k = to_heads(rms_norm_ref(q, q_weight, eps)), to_heads(rms_norm_ref(k, k_weight, eps))
    return rotate(q), rotate(k), to_heads(v)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused projection into normed and rotated query and key, and value.

    Args: `qkv` [B, N, 3D]; `q_weight`, `k_weight` [D] RMSNorm weights across heads; `cos`, `sin` [N, head_dim/2] float32.
    Returns: q, k, v, each [B, heads, N, head_dim] in `qkv.dtype`.
    """
    return qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, heads, eps)
