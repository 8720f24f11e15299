"""Query and key RMSNorm, rotary position embedding, and the layout attention wants, in one pass over the fused projection.

    q, k, v ← q, k, v + rows                            on the first tokens: a prompt's constant residual (FLUX)
    q, k ← x / sqrt(mean(x²) + eps) · weight            over all heads of a token (Wan) or each head alone (FLUX)
    (a, b) ← (a·cos − b·sin, a·sin + b·cos)             for each rotary pair

Pairs lie in halves: element i of a head pairs with element i + head_dim/2. A checkpoint whose pairs are interleaved is
permuted once when it is loaded; query and key are permuted alike, so attention does not change.

Gradient of x from that of the rotated pairs (a', b'), with n = x / sqrt(mean(x²) + eps):

    g = weight · (a'·cos + b'·sin, b'·cos − a'·sin)          dx = (g − n · mean(g · n)) / sqrt(mean(x²) + eps)
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.norm_gradients import like
from ebr_engine.kernels.qk_norm_rope_gradient import norm_weight_gradients, qk_norm_rope_backward_op
from ebr_engine.kernels.rotary import (
    add_rows_ref,
    dense_rows,
    head_tile,
    load_pairs,
    load_projection,
    mean_of_group,
    rms_norm_ref,
    row_strides,
    store_pairs,
)
from ebr_engine.kernels.rows import dense, launches, wide


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
    dtype = qkv.dtype

    def to_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_ref(x.unflatten(-1, (-1, weight.shape[0])), weight, eps).flatten(2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(dtype)

    q, k, v = add_rows_ref(qkv, rows).chunk(3, dim=-1)
    q, k = to_heads(norm(q, q_weight)), to_heads(norm(k, k_weight))
    return rotate(q), rotate(k), to_heads(v.to(dtype))


@triton.jit
def norm_rotate(
    b_a, b_b, weight, weights, mask, b_cos, b_sin, eps, PER_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    inverse = tl.rsqrt(mean_of_group(b_a * b_a + b_b * b_b, PER_HEAD, HEADS, HALF) + eps)
    b_weight_a, b_weight_b = load_pairs(weight, weights, mask, HALF)
    b_a, b_b = b_a * inverse * b_weight_a, b_b * inverse * b_weight_b
    return b_a * b_cos - b_b * b_sin, b_a * b_sin + b_b * b_cos


@triton.jit
def qk_norm_rope_kernel(
    qkv, q_weight, k_weight, cos, sin, rows, q, k, v, qkv_batch, qkv_token, rows_batch, rows_token, length, tokens, eps,
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
    out = ((b * HEADS + h) * tokens + n) * 2 * HALF + pair
    qkv += b * qkv_batch + n * qkv_token
    if rows is not None:
        rows += b * rows_batch + n * rows_token
    prompted = (n + 0 * pair) < length  # [1, pairs]: a scalar mask is no mask to the interpreter
    b_cos = tl.load(cos + n * HALF + pair, mask=here, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + n * HALF + pair, mask=here, other=0.0).to(tl.float32)

    b_a, b_b = load_projection(qkv, rows, offsets, mask, prompted, HALF)
    b_a, b_b = norm_rotate(b_a, b_b, q_weight, weights, covered, b_cos, b_sin, eps, PER_HEAD, HEADS, HALF)
    store_pairs(q, out, mask, b_a, b_b, HALF)
    offsets += HEADS * 2 * HALF
    b_a, b_b = load_projection(qkv, rows, offsets, mask, prompted, HALF)
    b_a, b_b = norm_rotate(b_a, b_b, k_weight, weights, covered, b_cos, b_sin, eps, PER_HEAD, HEADS, HALF)
    store_pairs(k, out, mask, b_a, b_b, HALF)
    offsets += HEADS * 2 * HALF
    b_a, b_b = load_projection(qkv, rows, offsets, mask, prompted, HALF)
    store_pairs(v, out, mask, b_a, b_b, HALF)


def check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, rows: Tensor | None) -> None:
    """ValueError if shapes do not fit together: a kernel would read past the end where torch would complain."""
    batch, tokens, width = qkv.shape
    head = width // 3 // heads
    expected = {
        "qkv": (qkv, [(batch, tokens, 3 * heads * head)]),
        "q_weight": (q_weight, [(heads * head,), (head,)]),
        "k_weight": (k_weight, [q_weight.shape]),
        "cos": (cos, [(tokens, head // 2)]),
        "sin": (sin, [(tokens, head // 2)]),
    }
    if rows is not None:
        length = min(rows.shape[-2], tokens)
        expected["rows"] = (rows, [(length, width), (1, length, width), (batch, length, width)])
    for name, (x, shapes) in expected.items():
        if x.shape not in shapes:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; {' or '.join(str(tuple(s)) for s in shapes)} was expected")


def qk_norm_rope_launch(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel."""
    batch, tokens, width = qkv.shape
    head = width // 3 // heads
    qkv, rows = dense(qkv), dense_rows(rows)
    q, k, v = (qkv.new_empty(batch, heads, tokens, head) for _ in range(3))
    if qkv.numel():
        with backend.on(qkv):
            qk_norm_rope_kernel[(batch * tokens,)](
                qkv, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), rows, q, k, v,
                *qkv.stride()[:2], *row_strides(rows), tokens, eps, **head_tile(head, heads, q_weight),
            )  # fmt: skip
    return q, k, v


@torch.library.custom_op("ebr::qk_norm_rope", mutates_args=())
@gated({"qkv": 1, "cos": 0, "sin": 0, "rows": -2}, (2, 2, 2))
def qk_norm_rope_op(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(qkv, q_weight, k_weight, cos, sin, heads, rows)
    if qkv.is_cuda and (cuda := backend.extension()):
        return cuda.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)
    cpu = backend.native(qkv, q_weight, k_weight, cos, sin, rows)
    if cpu and (results := cpu.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)):
        return results
    if launches(qkv):
        return qk_norm_rope_launch(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)
    results = qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in results)  # v may be a view of qkv


@qk_norm_rope_op.register_fake
def _(qkv, q_weight, k_weight, cos, sin, heads, eps, rows):
    batch, tokens, width = qkv.shape
    return tuple(qkv.new_empty(batch, heads, tokens, width // 3 // heads) for _ in range(3))


def _save(ctx, inputs: tuple, output: tuple) -> None:
    qkv, q_weight, k_weight, cos, sin, _, ctx.eps, rows = inputs
    ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, rows)


def _backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
    qkv, q_weight, k_weight, cos, sin, rows = ctx.saved_tensors
    given = qkv, q_weight, k_weight, cos, sin, ctx.eps, rows
    learned = ctx.needs_input_grad[1:3]
    if any(learned) and backend.native_kind(qkv):
        dqkv, *weights = torch.ops.ebr.qk_norm_rope_backward_learned.default(dq, dk, dv, *given)
    else:
        dqkv = qk_norm_rope_backward_op(dq, dk, dv, *given)
        weights = norm_weight_gradients(dq, dk, *given) if any(learned) else (None, None)
    drows = None
    if rows is not None and ctx.needs_input_grad[7]:
        drows = wide(dqkv[:, : rows.shape[-2]]).sum_to_size(rows.shape).to(rows.dtype)

    of_weights = (like(sums, table) if wanted else None for sums, table, wanted in zip(weights, (q_weight, k_weight), learned))
    return dqkv, *of_weights, None, None, None, None, drows


qk_norm_rope_op.register_autograd(_backward, setup_context=_save)


def filled(rows: Tensor | None) -> Tensor | None:
    """`rows`, unless they are none."""
    return rows if rows is not None and rows.shape[-2] else None


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
    cpu = backend.native(qkv, q_weight, k_weight, cos, sin, rows)
    if cpu and (results := cpu.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)):
        return results
    registered = backend.registered(qkv) or backend.native_learning(qkv, q_weight, k_weight, cos, sin, filled(rows))
    split = qk_norm_rope_op if registered else qk_norm_rope_ref
    return split(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)
