"""What `qk_norm_rope` and its gradient share: RMSNorm, rotary pairs, a projection with a prompt's rows on its first tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.rows import dense, warps, wide


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in float32 (or float64), returned in it."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * wide(weight)


def add_rows_ref(qkv: Tensor, rows: Tensor | None) -> Tensor:
    """The projection with `rows` added to its first tokens in float32 (or float64); without rows, as it is."""
    if rows is None or not rows.shape[-2]:
        return qkv
    return wide(qkv) + F.pad(wide(rows), (0, 0, 0, qkv.shape[1] - rows.shape[-2]))


@triton.jit
def load_pairs(x, offsets, mask, HALF: tl.constexpr):
    """Both elements of the rotary pairs whose first ones lie at `offsets`."""
    b_a = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    return b_a, tl.load(x + offsets + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(x, offsets, mask, b_a, b_b, HALF: tl.constexpr):
    tl.store(x + offsets, b_a.to(x.dtype.element_ty), mask=mask)
    tl.store(x + offsets + HALF, b_b.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_projection(qkv, rows, offsets, mask, prompted, HALF: tl.constexpr):
    """A token's q, k or v, with its prompt row added if it has one."""
    b_a, b_b = load_pairs(qkv, offsets, mask, HALF)
    if rows is not None:
        b_row_a, b_row_b = load_pairs(rows, offsets, mask & prompted, HALF)
        b_a += b_row_a
        b_b += b_row_b
    return b_a, b_b


@triton.jit
def mean_of_group(b_x, PER_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Mean over what is normed together, given sums of pairs [heads, half]: every head's [heads, 1], or [1, 1] over all."""
    if PER_HEAD:
        return tl.sum(b_x, 1, keep_dims=True) / (2 * HALF)
    else:  # a return after an `if` has to be of its type, even if one of them is never compiled
        return tl.sum(tl.sum(b_x, 1, keep_dims=True), 0, keep_dims=True) / (2 * HALF * HEADS)


def head_tile(head: int, heads: int, weight: Tensor) -> dict:
    """Compile-time values of the kernels, whose program holds q, then k, then v of one token as [heads, pairs]."""
    half = head // 2
    heads_block, half_block = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    sizes = {"HEADS": heads, "HALF": half, "HEADS_BLOCK": heads_block, "HALF_BLOCK": half_block}
    per_head = weight.shape[0] == head
    return {"PER_HEAD": per_head, **sizes, "num_warps": warps(2 * heads_block * half_block), "enable_fp_fusion": True}


def dense_rows(rows: Tensor | None) -> Tensor | None:
    """The rows as a kernel reads them; None if there are none."""
    return dense(rows) if rows is not None and rows.shape[-2] else None


def row_strides(rows: Tensor | None) -> tuple[int, int, int]:
    """From sample to sample and token to token of the prompt's rows [L, 3D] or [B or 1, L, 3D], and L."""
    if rows is None:
        return 0, 0, 0
    shared = rows.dim() == 2 or rows.shape[0] == 1
    return 0 if shared else rows.stride(0), rows.stride(-2), rows.shape[-2]
