"""What the kernels of cross-attention share: references, memory layouts, and the logits of a tile."""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.rows import wide

LARGEST_HEAD = 128  # accumulators of a wider head do not fit into registers


def logits_ref(q: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """q Kᵀ / sqrt(head_dim) + bias, in float32 or wider."""
    logits = wide(torch.matmul(q * q.shape[-1] ** -0.5, key.transpose(-1, -2)))
    return logits if bias is None else logits + bias


def launches(q: Tensor) -> bool:
    """Whether the kernels serve these queries; the reference serves the rest.

    That is float32 on a device (its products, kept from TF32, spill), bf16 in the interpreter (it multiplies the bits as
    integers), float64, and heads wider than 128.
    """
    served = (torch.float16, torch.bfloat16) if q.is_cuda else (torch.float16, torch.float32)
    return backend.launches(q) and q.dtype in served and q.shape[-1] <= LARGEST_HEAD


def rows_of_heads(q: Tensor) -> Tensor:
    """Empty [B, H, N, d] over memory [B, N, H, d], so that joining the heads of a token is free."""
    batch, heads, tokens, head = q.shape
    return q.new_empty(batch, tokens, heads, head).transpose(1, 2)


def constants(q: Tensor) -> dict:
    """What all kernels are compiled for."""
    return {"HEAD": q.shape[-1], "DIMS": max(16, triton.next_power_of_2(q.shape[-1])), "enable_fp_fusion": True}


def text_keys(rows: int, keys: int) -> int:
    """Text keys in a tile, at most `keys`: the few merged rows need a small one."""
    return min(keys, max(16, triton.next_power_of_2(rows)))


def text_stride(text: Tensor) -> int:
    """Elements from one sample's text keys to the next one's, 0 if they share them."""
    return text[0].numel() if text.shape[0] > 1 else 0


@triton.jit
def load_keys(key, keys, rows, HEAD: tl.constexpr, DIMS: tl.constexpr):
    """The keys or values numbered `keys`, [KEYS, DIMS]; zeros past the last of `rows` and past the head's width."""
    dims = tl.arange(0, DIMS)
    mask = (keys < rows)[:, None] & (dims < HEAD)[None]
    return tl.load(key + keys[:, None] * HEAD + dims[None], mask=mask, other=0.0)


@triton.jit
def tile_logits(b_q, b_k, bias, keys, rows, scale, BIASED: tl.constexpr):
    """Logits to base 2 of queries [QUERIES, DIMS] with the keys numbered `keys`; -inf past the last of `rows`."""
    logits = tl.dot(b_q, tl.trans(b_k)) * scale
    if BIASED:
        logits += tl.load(bias + keys, mask=keys < rows, other=0.0)[None] * 1.4426950408889634
    return tl.where((keys < rows)[None], logits, float("-inf"))


@triton.jit
def add_branch(
    out, weight, b_q, key, value, bias, rows, scale,
    BIASED: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """`out` and a weighted branch; and the logarithm of its denominator, to base 2.

    The denominator comes first, so that products are added to `out` itself: a second accumulator does not fit beside it.
    """
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in tl.range(0, rows, KEYS, num_stages=1):
        keys = start + tl.arange(0, KEYS)
        logits = tile_logits(b_q, load_keys(key, keys, rows, HEAD, DIMS), bias, keys, rows, scale, BIASED)
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
        largest = larger
    b_sum = largest + tl.log2(total)
    for start in tl.range(0, rows, KEYS, num_stages=1):
        keys = start + tl.arange(0, KEYS)
        logits = tile_logits(b_q, load_keys(key, keys, rows, HEAD, DIMS), bias, keys, rows, scale, BIASED)
        b_v = load_keys(value, keys, rows, HEAD, DIMS)
        out = tl.dot((tl.exp2(logits - b_sum[:, None]) * weight).to(b_v.dtype), b_v, out)
    return out, b_sum
