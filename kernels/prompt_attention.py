"""Cross-attention to the merged text and to every prompt, one query load and one output.

    out = A(q, K_text, V_text; ln n) + Σ_p w_p · A(q, K_p, V_p)
    A(q, K, V; b) = softmax(q Kᵀ / sqrt(head_dim) + b) V

Equal text rows give equal keys; n of them are one key whose logit gets + ln n (exact).
"""

import torch
from torch import Tensor


def _branch(q: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.matmul(q * q.shape[-1] ** -0.5, key.transpose(-1, -2)).float()
    if bias is not None:
        logits = logits + bias
    return torch.matmul(torch.softmax(logits, dim=-1).to(value.dtype), value)


def prompt_attention_ref(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
) -> Tensor:
    """The formulas, a softmax a branch."""
    out = _branch(q, text_key, text_value, text_log_count)
    for key, value, weight in zip(prompt_key, prompt_value, prompt_weight):
        out = out + weight.to(q.dtype) * _branch(q, key, value, None)
    return out


def prompt_attention(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
) -> Tensor:
    """Attend to the text branch and add the weighted prompt branches.

    Args: `q` [B, H, N, d]; `text_key`, `text_value` [B or 1, H, M, d] (distinct text rows); `text_log_count` [M] float32, the
    log of how many rows each stands for; `prompt_key`, `prompt_value` [P, H, L, d]; `prompt_weight` [P] float32 (mixing
    weight × the block's α); P may be 0.
    Returns: [B, H, N, d] in `q.dtype`. Source: the authors' Wan inference code (dual cross-attention).
    """
    return prompt_attention_ref(q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight)
