"""Cross-attention to the merged text and to every prompt, one query load and one output.

    out = A(q, K_text, V_text; ln n) + Σ_p w_p · A(q, K_p, V_p)
    A(q, K, V; b) = softmax(q Kᵀ / sqrt(head_dim) + b) V

Equal text rows give equal keys; n of them are one key whose logit gets + ln n (exact).
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.heads import (
    add_branch,
    constants,
    launches,
    load_keys,
    logits_ref,
    rows_of_heads,
    text_keys,
    text_stride,
    tile_logits,
)
from ebr_engine.kernels.prompt_attention_gradient import prompt_attention_backward_op
from ebr_engine.kernels.prompt_attention_persistent import described, prompt_attention_persistent_launch
from ebr_engine.kernels.rows import dense

# Queries and keys of a tile, warps, stages, by a device's major compute capability: the largest that spill no register. On
# Hopper a warpgroup multiplies 64 rows; there and on Blackwell's data centre parts operands stay in shared memory.
TILES = {9: (128, 64, 8, 3), 10: (128, 64, 8, 2)}
OTHER_TILE = (64, 32, 8, 3)
# What restoring takes by a device's major compute capability: `tiles`, a program a tile, or what `prompt_attention_persistent`
# has. Tiles, until one has been timed on a GPU: on paper they differ by a tile's first copy alone.
FORMS = {9: "tiles", 10: "tiles"}


def _branch(q: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.matmul(torch.softmax(logits_ref(q, key, bias), dim=-1).to(value.dtype), value)


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
        out = out + weight.to(q.dtype) * _branch(q, key, value)
    return out


def log_sums_ref(q: Tensor, text_key: Tensor, text_log_count: Tensor, prompt_key: Tensor) -> Tensor:
    """Logarithms of the softmaxes' denominators, [1 + P, B, H, N] float32: the text's, then each prompt's."""
    logits = [logits_ref(q, text_key, text_log_count), *(logits_ref(q, key) for key in prompt_key)]
    return torch.stack([branch.logsumexp(dim=-1) for branch in logits]).float()


@triton.jit
def attend(
    b_q, key, value, bias, rows, scale, HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr
):  # fmt: skip
    """A branch in one sweep over its keys, [QUERIES, DIMS]; and the logarithm of its denominator, to base 2."""
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, DIMS], tl.float32)
    for start in range(0, rows, KEYS):
        keys = start + tl.arange(0, KEYS)
        logits = tile_logits(b_q, load_keys(key, keys, rows, HEAD, DIMS), bias, keys, rows, scale, False)
        larger = tl.maximum(largest, tl.max(logits, 1))
        likely, shrink = tl.exp2(logits - larger[:, None]), tl.exp2(largest - larger)
        b_v = load_keys(value, keys, rows, HEAD, DIMS)
        out = tl.dot(likely.to(b_v.dtype), b_v, out * shrink[:, None])
        total = total * shrink + tl.sum(likely, 1)
        largest = larger
    return out / total[:, None], largest + tl.log2(total)


@triton.jit
def prompt_attention_kernel(
    q, text_key, text_value, bias, prompt_key, prompt_value, prompt_weight, out, log_sum,
    q_batch, q_head, q_token, text_batch, batch, heads, tokens, text_rows, prompts, prompt_rows, scale,
    PROMPTED: tl.constexpr, SAVE: tl.constexpr, HEAD: tl.constexpr, DIMS: tl.constexpr,
    QUERIES: tl.constexpr, TEXT_KEYS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Heads are the fastest index: programs that run together read whole rows of q's memory.
    program = tl.program_id(0).to(tl.int64)
    h, tile = program % heads, program // heads
    tiles = tl.cdiv(tokens, QUERIES)
    b, block = tile // tiles, tile % tiles
    rows, dims = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, DIMS)
    mask = (rows < tokens)[:, None] & (dims < HEAD)[None]
    b_q = tl.load(q + b * q_batch + h * q_head + rows[:, None] * q_token + dims[None], mask=mask, other=0.0)

    b_out = tl.zeros([QUERIES, DIMS], tl.float32)
    if PROMPTED:
        offset = h * prompt_rows * HEAD
        b_out, b_sum = attend(
            b_q, prompt_key + offset, prompt_value + offset, bias, prompt_rows, scale, HEAD, QUERIES, KEYS, DIMS
        )
        b_out *= tl.load(prompt_weight).to(tl.float32)
        if SAVE:
            sums = ((batch + b) * heads + h) * tokens + rows
            tl.store(log_sum + sums, b_sum * 0.6931471805599453, mask=rows < tokens)
    for p in range(1, prompts):
        offset = (p * heads + h) * prompt_rows * HEAD
        b_out, b_sum = add_branch(
            b_out, tl.load(prompt_weight + p).to(tl.float32), b_q, prompt_key + offset, prompt_value + offset, bias,
            prompt_rows, scale, False, HEAD, QUERIES, KEYS, DIMS,
        )  # fmt: skip
        if SAVE:
            sums = (((p + 1) * batch + b) * heads + h) * tokens + rows
            tl.store(log_sum + sums, b_sum * 0.6931471805599453, mask=rows < tokens)
    text = b * text_batch + h * text_rows * HEAD
    b_out, b_sum = add_branch(
        b_out, 1.0, b_q, text_key + text, text_value + text, bias, text_rows, scale, True, HEAD, QUERIES, TEXT_KEYS, DIMS
    )
    if SAVE:
        tl.store(log_sum + (b * heads + h) * tokens + rows, b_sum * 0.6931471805599453, mask=rows < tokens)
    offsets = ((b * tokens + rows[:, None]) * heads + h) * HEAD + dims[None]
    tl.store(out + offsets, b_out.to(out.dtype.element_ty), mask=mask)


def prompt_attention_launch(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; queries of any strides. Returns the output and, if `save`, the log-sums of `log_sums_ref`."""
    batch, heads, tokens, head = q.shape
    prompts, _, prompt_rows, _ = prompt_key.shape
    queries, keys, warps, stages = TILES.get(backend.capability(q), OTHER_TILE)
    q, out = dense(q), rows_of_heads(q)
    log_sum = q.new_empty((1 + prompts, batch, heads, tokens) if save else 0, dtype=torch.float32)
    if q.numel():
        with backend.on(q):
            prompt_attention_kernel[(batch * heads * triton.cdiv(tokens, queries),)](
                q, text_key.contiguous(), text_value.contiguous(), text_log_count.contiguous(),
                prompt_key.contiguous(), prompt_value.contiguous(), prompt_weight.contiguous(), out, log_sum,
                *q.stride()[:3], text_stride(text_key), batch, heads, tokens,
                text_key.shape[2], prompts, prompt_rows, head**-0.5 * 1.4426950408889634,
                PROMPTED=prompts > 0, SAVE=save,
                QUERIES=queries, TEXT_KEYS=text_keys(text_key.shape[2], keys), KEYS=keys,
                num_warps=warps, num_stages=stages, **constants(q),
            )  # fmt: skip
    return out, log_sum


@torch.library.custom_op("ebr::prompt_attention", mutates_args=())
@gated({"q": 2}, (2, 3))
def prompt_attention_op(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight)
    if launches(q):
        form = FORMS.get(backend.capability(q), "tiles")
        if form != "tiles" and not save and described(q, prompt_key):
            return prompt_attention_persistent_launch(*inputs, form), q.new_empty(0, dtype=torch.float32)
        return prompt_attention_launch(*inputs, save)
    if cpu := backend.native(*inputs):
        log_sum = q.new_empty((1 + len(prompt_key), *q.shape[:3]) if save else 0, dtype=torch.float32)
        if (out := cpu.prompt_attention(*inputs, log_sum if save else None)) is not None:
            return out, log_sum
    log_sum = log_sums_ref(q, text_key, text_log_count, prompt_key) if save else q.new_empty(0, dtype=torch.float32)
    return rows_of_heads(q).copy_(prompt_attention_ref(*inputs)), log_sum


@prompt_attention_op.register_fake
def _(q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight, save):
    shape = (1 + prompt_key.shape[0], *q.shape[:3]) if save else (0,)
    return rows_of_heads(q), q.new_empty(shape, dtype=torch.float32)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, gradient: Tensor, _: Tensor) -> tuple:
    dq, key, value, weight = prompt_attention_backward_op(gradient, *ctx.saved_tensors)
    return dq, None, None, None, key, value, weight, None


prompt_attention_op.register_autograd(_backward, setup_context=_save)


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

    Args: `q` [B, H, N, d] of any strides; `text_key`, `text_value` [B or 1, H, M, d] (distinct text rows); `text_log_count`
    [M] float32, the log of how many rows each stands for; `prompt_key`, `prompt_value` [P, H, L, d]; `prompt_weight` [P]
    float32 (mixing weight × the block's α); P may be 0.
    Returns: [B, H, N, d] in `q.dtype`; the kernel's memory is [B, N, H, d], so that `.transpose(1, 2).flatten(2)` is free.
    Differentiable in q, the prompts and their weights; where the text needs a gradient too, the reference runs.
    Source: the authors' Wan inference code (dual cross-attention).
    """
    inputs = (q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight)
    cpu = backend.native(*inputs)
    if cpu and (out := cpu.prompt_attention(*inputs)) is not None:
        return out
    registered = backend.registered(q) or backend.native_learning(*inputs[: 7 if len(prompt_key) else 4])
    if not registered or backend.learned(text_key, text_value):
        return prompt_attention_ref(*inputs)
    return prompt_attention_op(*inputs, backend.learned(*inputs))[0]
