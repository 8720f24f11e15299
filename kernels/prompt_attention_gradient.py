"""Gradients of `prompt_attention`, recomputed from the softmaxes' log-sums: nothing of [N, L] is ever in memory.

With g the output's gradient, P the softmax of a branch, w its weight and D = rowsum(P ∘ g Vᵀ):

    dS = w · P ∘ (g Vᵀ − D) / sqrt(head_dim)     dq = Σ dS K     dK = dSᵀ q     dV = w · Pᵀ g     dw = Σ D

Two kernels: one holds a block of queries, streams the keys and leaves D; the other holds a block of keys and streams the
queries. Sums have a fixed order, so that the same inputs give the same gradients.
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.heads import (
    constants,
    launches,
    load_keys,
    logits_ref,
    rows_of_heads,
    text_keys,
    text_stride,
    tile_logits,
)
from ebr_engine.kernels.rows import dense, wide

# Queries and keys of a tile, warps, stages, by a device's major compute capability: the largest that spill no register.
QUERY_TILES = {9: (128, 64, 8, 2), 10: (128, 32, 8, 1)}
OTHER_QUERY_TILE = (32, 32, 8, 2)
KEY_TILE = (64, 64, 8, 2)
# The keys' gradient is a sum over all queries, split among so many programs, of at least so many tiles of queries.
PROGRAMS = 512
TILES_A_SPLIT = 8


def prompt_attention_backward_ref(
    gradient: Tensor,
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formulas in float32 or wider: gradients of the queries, the prompts' keys and values, and their weights."""
    g, wide_q = wide(gradient), wide(q)

    def slopes(key: Tensor, value: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        likely = torch.softmax(logits_ref(wide_q, wide(key), bias), dim=-1)
        pull = g @ wide(value).transpose(-1, -2)
        mean = (likely * pull).sum(-1, keepdim=True)
        return likely, likely * (pull - mean) * q.shape[-1] ** -0.5, mean.sum()

    dq = slopes(text_key, text_value, text_log_count)[1] @ wide(text_key)
    dk, dv, dw = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (prompt_key, prompt_value, prompt_weight))
    for p, weight in enumerate(wide(prompt_weight)):
        likely, slope, dw[p] = slopes(prompt_key[p], prompt_value[p])
        dq = dq + weight * (slope @ wide(prompt_key[p]))
        dk[p] = weight * (slope.transpose(-1, -2) @ wide_q).sum(0)
        dv[p] = weight * (likely.transpose(-1, -2) @ g).sum(0)
    return dq.to(q.dtype), dk, dv, dw


@triton.jit
def branch_slopes(
    dq, weight, b_q, b_g, b_sum, key, value, bias, rows, scale,
    BIASED: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """`dq` and one branch's part of it, but for 1 / sqrt(head_dim); and D, [QUERIES].

    The keys are streamed twice: D is a sum over all of them, and every slope needs it.
    """
    mean = tl.zeros([QUERIES], tl.float32)
    for sweep in tl.static_range(2):
        for start in tl.range(0, rows, KEYS, num_stages=1 if BIASED else None):
            keys = start + tl.arange(0, KEYS)
            b_k, b_v = load_keys(key, keys, rows, HEAD, DIMS), load_keys(value, keys, rows, HEAD, DIMS)
            likely = tl.exp2(tile_logits(b_q, b_k, bias, keys, rows, scale, BIASED) - b_sum[:, None])
            pull = tl.dot(b_g, tl.trans(b_v))
            if sweep == 0:
                mean += tl.sum(likely * pull, 1)
            else:
                slope = weight * likely * (pull - mean[:, None])
                dq = tl.dot(slope.to(b_k.dtype), b_k, dq)
    return dq, mean


@triton.jit
def query_gradient_kernel(
    gradient, q, text_key, text_value, bias, prompt_key, prompt_value, prompt_weight, log_sum, mean, dq,
    g_batch, g_head, g_token, q_batch, q_head, q_token, text_batch,
    batch, heads, tokens, text_rows, prompts, prompt_rows, root, scale,
    HEAD: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr, TEXT_KEYS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, tile = program % heads, program // heads
    tiles = tl.cdiv(tokens, QUERIES)
    b, block = tile // tiles, tile % tiles
    rows, dims = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, DIMS)
    mask = (rows < tokens)[:, None] & (dims < HEAD)[None]
    b_q = tl.load(q + b * q_batch + h * q_head + rows[:, None] * q_token + dims[None], mask=mask, other=0.0)
    b_g = tl.load(gradient + b * g_batch + h * g_head + rows[:, None] * g_token + dims[None], mask=mask, other=0.0)

    text = b * text_batch + h * text_rows * HEAD
    b_sum = tl.load(log_sum + (b * heads + h) * tokens + rows, mask=rows < tokens, other=0.0) * 1.4426950408889634
    b_dq = tl.zeros([QUERIES, DIMS], tl.float32)
    b_dq, _ = branch_slopes(
        b_dq, 1.0, b_q, b_g, b_sum, text_key + text, text_value + text, bias, text_rows, scale,
        True, HEAD, QUERIES, TEXT_KEYS, DIMS,
    )  # fmt: skip
    for p in range(prompts):
        offset = (p * heads + h) * prompt_rows * HEAD
        sums = (((p + 1) * batch + b) * heads + h) * tokens + rows
        b_sum = tl.load(log_sum + sums, mask=rows < tokens, other=0.0) * 1.4426950408889634
        b_dq, b_mean = branch_slopes(
            b_dq, tl.load(prompt_weight + p).to(tl.float32), b_q, b_g, b_sum, prompt_key + offset, prompt_value + offset, bias,
            prompt_rows, scale, False, HEAD, QUERIES, KEYS, DIMS,
        )  # fmt: skip
        tl.store(mean + ((p * batch + b) * heads + h) * tokens + rows, b_mean, mask=rows < tokens)
    offsets = ((b * tokens + rows[:, None]) * heads + h) * HEAD + dims[None]
    tl.store(dq + offsets, (b_dq * root).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def key_gradient_kernel(
    gradient, q, prompt_key, prompt_value, prompt_weight, log_sum, mean, dk, dv,
    g_batch, g_head, g_token, q_batch, q_head, q_token, batch, heads, tokens, prompts, prompt_rows, splits, root, scale,
    HEAD: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(prompt_rows, KEYS)
    block, rest = program % blocks, program // blocks
    h, rest = rest % heads, rest // heads
    p, split = rest % prompts, rest // prompts
    keys, dims = block * KEYS + tl.arange(0, KEYS), tl.arange(0, DIMS)
    offset = (p * heads + h) * prompt_rows * HEAD
    b_k = load_keys(prompt_key + offset, keys, prompt_rows, HEAD, DIMS)
    b_v = load_keys(prompt_value + offset, keys, prompt_rows, HEAD, DIMS)
    b_dk = tl.zeros([KEYS, DIMS], tl.float32)
    b_dv = tl.zeros([KEYS, DIMS], tl.float32)

    tiles = tl.cdiv(tokens, QUERIES)
    for tile in range(split.to(tl.int32), batch * tiles, splits):
        b = (tile // tiles).to(tl.int64)
        rows = (tile % tiles).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
        mask = (rows < tokens)[:, None] & (dims < HEAD)[None]
        b_q = tl.load(q + b * q_batch + h * q_head + rows[:, None] * q_token + dims[None], mask=mask, other=0.0)
        b_g = tl.load(gradient + b * g_batch + h * g_head + rows[:, None] * g_token + dims[None], mask=mask, other=0.0)
        sums = (((p + 1) * batch + b) * heads + h) * tokens + rows
        b_sum = tl.load(log_sum + sums, mask=rows < tokens, other=0.0) * 1.4426950408889634
        b_mean = tl.load(mean + ((p * batch + b) * heads + h) * tokens + rows, mask=rows < tokens, other=0.0)
        # A query past the end is zeros, and so is its gradient: its probabilities are finite and add nothing.
        likely = tl.exp2(tl.dot(b_k, tl.trans(b_q)) * scale - b_sum[None])
        b_dv = tl.dot(likely.to(b_g.dtype), b_g, b_dv)
        slope = likely * (tl.dot(b_v, tl.trans(b_g)) - b_mean[None])
        b_dk = tl.dot(slope.to(b_q.dtype), b_q, b_dk)
    weight = tl.load(prompt_weight + p).to(tl.float32)
    offsets = offset + split * prompts * heads * prompt_rows * HEAD + keys[:, None] * HEAD + dims[None]
    mask = (keys < prompt_rows)[:, None] & (dims < HEAD)[None]
    tl.store(dk + offsets, b_dk * (weight * root), mask=mask)
    tl.store(dv + offsets, b_dv * weight, mask=mask)


def prompt_attention_backward_launch(
    gradient: Tensor,
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the queries' kernel, then the keys'; queries and the gradient of any strides."""
    batch, heads, tokens, head = q.shape
    prompts, _, prompt_rows, _ = prompt_key.shape
    prompt_key, prompt_value, prompt_weight = prompt_key.contiguous(), prompt_value.contiguous(), prompt_weight.contiguous()
    q, gradient, dq = dense(q), dense(gradient), rows_of_heads(q)
    if not q.numel():
        return dq, torch.zeros_like(prompt_key), torch.zeros_like(prompt_value), torch.zeros_like(prompt_weight)
    mean = log_sum.new_empty(prompts, batch, heads, tokens)
    strides, root, scale = (*gradient.stride()[:3], *q.stride()[:3]), head**-0.5, head**-0.5 * 1.4426950408889634

    queries, keys, warps, stages = QUERY_TILES.get(backend.capability(q), OTHER_QUERY_TILE)
    with backend.on(q):
        query_gradient_kernel[(batch * heads * triton.cdiv(tokens, queries),)](
            gradient, q, text_key.contiguous(), text_value.contiguous(), text_log_count.contiguous(),
            prompt_key, prompt_value, prompt_weight, log_sum, mean, dq, *strides, text_stride(text_key),
            batch, heads, tokens, text_key.shape[2], prompts, prompt_rows, root, scale,
            QUERIES=queries, TEXT_KEYS=text_keys(text_key.shape[2], keys), KEYS=keys,
            num_warps=warps, num_stages=stages, **constants(q),
        )  # fmt: skip

    queries, keys, warps, stages = KEY_TILE
    programs = prompts * heads * triton.cdiv(prompt_rows, keys)
    longest = triton.cdiv(batch * triton.cdiv(tokens, queries), TILES_A_SPLIT)
    splits = min(triton.cdiv(PROGRAMS, programs), longest) if programs else 1
    dk, dv = log_sum.new_empty(2, splits, *prompt_key.shape).unbind()
    if programs:
        with backend.on(q):
            key_gradient_kernel[(programs * splits,)](
                gradient, q, prompt_key, prompt_value, prompt_weight, log_sum, mean, dk, dv, *strides,
                batch, heads, tokens, prompts, prompt_rows, splits, root, scale,
                QUERIES=queries, KEYS=keys, num_warps=warps, num_stages=stages, **constants(q),
            )  # fmt: skip
    dw = mean.sum(dim=(1, 2, 3)).to(prompt_weight.dtype)
    return dq, dk.sum(0).to(prompt_key.dtype), dv.sum(0).to(prompt_value.dtype), dw


@torch.library.custom_op("ebr::prompt_attention_backward", mutates_args=())
@gated({"gradient": 2, "q": 2, "log_sum": 3}, None)
def prompt_attention_backward_op(
    gradient: Tensor,
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (gradient, q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight)
    if launches(q):
        return prompt_attention_backward_launch(*inputs, log_sum)
    if (cpu := backend.native(*inputs)) and (found := cpu.prompt_attention_gradient(*inputs, log_sum)):
        return found
    dq, *others = prompt_attention_backward_ref(*inputs)
    return rows_of_heads(q).copy_(dq), *others


@prompt_attention_backward_op.register_fake
def _(gradient, q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight, log_sum):
    prompts = (prompt_key, prompt_value, prompt_weight)
    return rows_of_heads(q), *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in prompts)
