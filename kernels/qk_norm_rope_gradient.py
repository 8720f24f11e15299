"""The gradient of `qk_norm_rope`: of the fused projection, from those of query, key and value; its formula stands there."""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.norm_gradients import table_gradients
from ebr_engine.kernels.rms_norm import rms_norm_backward_ref
from ebr_engine.kernels.rotary import (
    add_rows_ref,
    dense_rows,
    head_tile,
    load_pairs,
    load_projection,
    mean_of_group,
    row_strides,
    store_pairs,
)
from ebr_engine.kernels.rows import dense, launches, wide


def rotate_back_ref(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of what was rotated, from [B, heads, N, head_dim] to [B, N, D], in float32 (or float64)."""
    a, b = wide(gradient).chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).transpose(1, 2).flatten(2)


def qk_norm_rope_backward_ref(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    """The gradient's formula in float32: of the projection, [B, N, 3D]; that of `rows` is its sum."""

    def of_norm(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        groups = (-1, weight.shape[0])
        g = rotate_back_ref(gradient, cos, sin).unflatten(-1, groups)
        return rms_norm_backward_ref(g, wide(x).unflatten(-1, groups), weight, eps).flatten(2)

    q, k, _ = add_rows_ref(qkv, rows).chunk(3, dim=-1)
    parts = of_norm(dq, q, q_weight), of_norm(dk, k, k_weight), wide(dv).transpose(1, 2).flatten(2)
    return torch.cat(parts, dim=-1).to(qkv.dtype)


@triton.jit
def norm_rotate_gradient(
    b_da, b_db, b_a, b_b, weight, weights, mask, b_cos, b_sin, eps,
    PER_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    inverse = tl.rsqrt(mean_of_group(b_a * b_a + b_b * b_b, PER_HEAD, HEADS, HALF) + eps)
    b_a, b_b = b_a * inverse, b_b * inverse
    b_weight_a, b_weight_b = load_pairs(weight, weights, mask, HALF)
    g_a, g_b = (b_da * b_cos + b_db * b_sin) * b_weight_a, (b_db * b_cos - b_da * b_sin) * b_weight_b
    mean = mean_of_group(g_a * b_a + g_b * b_b, PER_HEAD, HEADS, HALF)
    return inverse * (g_a - b_a * mean), inverse * (g_b - b_b * mean)


@triton.jit
def qk_norm_rope_backward_kernel(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, rows, dqkv,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    qkv_batch, qkv_token, rows_batch, rows_token, length, tokens, eps,
    PER_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, n = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    h, pair = tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None]
    here = pair < HALF
    mask = (h < HEADS) & here
    offsets = h * 2 * HALF + pair
    weights = pair if PER_HEAD else offsets
    covered = here if PER_HEAD else mask
    wide_h = h.to(tl.int64)
    qkv += b * qkv_batch + n * qkv_token
    dqkv += row.to(tl.int64) * HEADS * 6 * HALF
    if rows is not None:
        rows += b * rows_batch + n * rows_token
    prompted = (n + 0 * pair) < length  # [1, pairs]: a scalar mask is no mask to the interpreter
    b_cos = tl.load(cos + n * HALF + pair, mask=here, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + n * HALF + pair, mask=here, other=0.0).to(tl.float32)

    b_da, b_db = load_pairs(dq, b * q_batch + wide_h * q_head + n * q_token + pair, mask, HALF)
    b_a, b_b = load_projection(qkv, rows, offsets, mask, prompted, HALF)
    b_da, b_db = norm_rotate_gradient(b_da, b_db, b_a, b_b, q_weight, weights, covered, b_cos, b_sin, eps, PER_HEAD, HEADS, HALF)
    store_pairs(dqkv, offsets, mask, b_da, b_db, HALF)
    offsets += HEADS * 2 * HALF
    b_da, b_db = load_pairs(dk, b * k_batch + wide_h * k_head + n * k_token + pair, mask, HALF)
    b_a, b_b = load_projection(qkv, rows, offsets, mask, prompted, HALF)
    b_da, b_db = norm_rotate_gradient(b_da, b_db, b_a, b_b, k_weight, weights, covered, b_cos, b_sin, eps, PER_HEAD, HEADS, HALF)
    store_pairs(dqkv, offsets, mask, b_da, b_db, HALF)
    offsets += HEADS * 2 * HALF
    b_da, b_db = load_pairs(dv, b * v_batch + wide_h * v_head + n * v_token + pair, mask, HALF)
    store_pairs(dqkv, offsets, mask, b_da, b_db, HALF)


def qk_norm_rope_backward_launch(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    """Run the gradient's kernel; gradients of any strides."""
    batch, heads, tokens, head = dq.shape
    dq, dk, dv, qkv, rows = dense(dq), dense(dk), dense(dv), dense(qkv), dense_rows(rows)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel():
        with backend.on(qkv):
            qk_norm_rope_backward_kernel[(batch * tokens,)](
                dq, dk, dv, qkv, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), rows, dqkv,
                *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *qkv.stride()[:2], *row_strides(rows), tokens, eps,
                **head_tile(head, heads, q_weight),
            )  # fmt: skip
    return dqkv


@torch.library.custom_op("ebr::qk_norm_rope_backward", mutates_args=())
@gated({"dq": 2, "dk": 2, "dv": 2, "qkv": 1, "cos": 0, "sin": 0, "rows": -2}, (1,))
def qk_norm_rope_backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    cpu = backend.native(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, rows)
    if cpu and (found := cpu.qk_norm_rope_gradient(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, eps, rows)):
        return found[0]
    backward = qk_norm_rope_backward_launch if launches(qkv) else qk_norm_rope_backward_ref
    return backward(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, eps, rows)


@qk_norm_rope_backward_op.register_fake
def _(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, eps, rows):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def norm_weight_gradients(
    dq: Tensor,
    dk: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the norms' weights in float32 (or float64), in the weights' shapes; arguments as of the projection's."""

    def of_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        g = rotate_back_ref(gradient, cos, sin).to(qkv.dtype)
        if weight.shape[0] < x.shape[-1]:  # of each head
            x, g = (one.unflatten(-1, (-1, weight.shape[0])).flatten(1, 2) for one in (x, g))
        return table_gradients(g, x, eps, (True, False, False), centred=False).weight.sum(0)

    q, k, _ = add_rows_ref(qkv, rows).chunk(3, dim=-1)
    return of_weight(dq, q, q_weight), of_weight(dk, k, k_weight)


torch.library.define(
    "ebr::qk_norm_rope_backward_learned",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, "
    "Tensor? rows) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("ebr::qk_norm_rope_backward_learned", "CPU")
def _(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, eps, rows):
    """The gradients of the projection and of both norms' weights, in one pass where native code serves."""
    given = qkv, q_weight, k_weight, cos, sin, eps, rows
    cpu = backend.native(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, rows)
    found = cpu.qk_norm_rope_gradient(dq, dk, dv, *given, (True, True)) if cpu else None
    return found or (qk_norm_rope_backward_ref(dq, dk, dv, *given), *norm_weight_gradients(dq, dk, *given))


@torch.library.register_fake("ebr::qk_norm_rope_backward_learned")
def _(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, eps, rows):
    sums = torch.promote_types(qkv.dtype, torch.float32)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return dqkv, q_weight.new_empty(q_weight.shape, dtype=sums), k_weight.new_empty(k_weight.shape, dtype=sums)
