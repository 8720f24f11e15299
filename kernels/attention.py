"""Self-attention over all tokens.

out = softmax(q kᵀ / sqrt(head_dim)) v
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# On a CPU explicit products are meant to spare the library's slower backward; no committed benchmark measures it yet.
EXPLICIT_TOKENS = 1024


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula with a float32 softmax; all tensors [B, H, N, d]."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, [B, H, N, d] each → [B, H, N, d]; the fastest of what is there for the device."""
    if q.device.type == "cpu" and q.requires_grad and q.shape[-2] <= EXPLICIT_TOKENS:
        return attention_ref(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
