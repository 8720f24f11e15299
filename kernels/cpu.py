"""Launchers of the native code for CPUs (`csrc/cpu/`, built as `ebr_engine._cpu`) for the operations it has.

Each computes what the operation of its name does, from the same arguments, or gives None where the code has no kernel for the
layout; the caller then takes torch's way. `backend.native` decides whether they are asked at all. Gradients are launchers of
their own, which the operations' registrations call.

Operations run on torch's own threads, at the level of instructions that the CPU has (`levels`).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ebr_engine import _cpu
from ebr_engine.kernels.cpu_channels import channel_norm_silu as channel_norm_silu
from ebr_engine.kernels.cpu_channels import convolution as convolution
from ebr_engine.kernels.cpu_views import DTYPES, NO_HEADS, NONE, extra, heads, level, rows, table, takes
from ebr_engine.kernels.cpu_views import levels as levels
from ebr_engine.kernels.heads import rows_of_heads
from ebr_engine.kernels.rows import batch_stride, dense

PADDED = 16  # numbers of the widest vector; rows of the keys' gradients are multiples of it
PARTS = 16  # of a gradient of attention that may run side by side, of at least so many queries
LEAST_QUERIES = 192
_cpu.keep_memory()


@functools.cache
def learns() -> None:
    """From here on this process learns, and keeps the memory of a step for the next one."""
    _cpu.keep_steps()


return_memory = _cpu.return_memory


def norm(x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple | None:
    """x' = x + gate·y and its norm; x' is None without `y`, and the norm is RMSNorm without `bias`."""
    if not takes(x, y, gate, weight, bias) or x.dim() != 3:
        return None
    batch, tokens, width = x.shape
    if y is not None and (y.shape != x.shape or y.dtype != x.dtype):
        return None
    x, y, *tables = (None if t is None else dense(t) for t in (x, y, gate, weight, bias))  # kept until the call is over
    named = zip(("gate", "weight", "bias"), tables)
    views = (NONE if t is None else table(t, batch_stride(name, t, batch, width)) for name, t in named)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if y is None else torch.empty_like(out)
    stored = 0 if total is None else total.data_ptr()
    _cpu.norm(
        level(), rows(x), NONE if y is None else rows(y), *views, stored, out.data_ptr(), batch, tokens, width, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return total, out


def layer_norm_modulate(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor | None:
    found = norm(x, None, None, weight, bias, eps)
    return None if found is None else found[1]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    return layer_norm_modulate(x, weight[None], None, eps)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    return norm(x, y, gate, weight, bias, eps)


def norm_gradient(
    sum_gradient: Tensor | None,
    gradient: Tensor,
    total: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    centred: bool = True,
    y: Tensor | None = None,
    needed: Sequence[bool] = (False, False, False),
) -> tuple[Tensor | None, Tensor | None, list[Tensor]] | None:
    """Gradients of x, unless `weight` is None, and of y where there is a gate, from those of x' (or none) and of its norm; and of
    weight, bias and gate the sums over tokens [B, D] that are `needed`, else empty: see `table_gradients`."""
    alike = (sum_gradient, gradient, total, y)
    if not takes(*alike, gate, weight) or total.dim() != 3 or any(t is not None and t.dtype != total.dtype for t in alike):
        return None
    batch, tokens, width = total.shape
    alike, tables = ([None if t is None else dense(t) for t in some] for some in (alike, (gate, weight)))
    dx = None if weight is None else torch.empty_like(total, memory_format=torch.contiguous_format)
    dy = None if gate is None else torch.empty_like(dx)
    sums = [torch.empty((batch, width) if one else (0,), dtype=torch.float32) for one in needed]
    views = [NONE if t is None else rows(t) for t in alike]
    named = zip(("gate", "weight"), tables)
    views[3:3] = [NONE if t is None else table(t, batch_stride(name, t, batch, width)) for name, t in named]
    addresses = (0 if t is None or not t.numel() else t.data_ptr() for t in (dx, dy, *sums))
    _cpu.norm_gradient(level(), *views, *addresses, batch, tokens, width, eps, centred, torch.get_num_threads())
    return dx, dy, sums


def weight_gradient(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    if not takes(gradient, x) or gradient.dtype != torch.bfloat16 or x.dtype != torch.bfloat16:
        return None
    gradient, x = gradient.contiguous(), x.contiguous()
    (rows, outputs), inputs = gradient.shape, x.shape[1]
    dw, db = torch.empty(outputs, inputs), torch.empty(outputs)
    addresses = (t.data_ptr() for t in (gradient, x, dw, db))
    return (dw, db) if _cpu.weight_gradient(level(), *addresses, rows, outputs, inputs, torch.get_num_threads()) else None


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    added = dense(added) if added is not None and added.shape[-2] else None
    if not takes(qkv, q_weight, k_weight, cos, sin, added):
        return None
    given = (dense(t) for t in (qkv, q_weight, k_weight, cos, sin))
    qkv, q_weight, k_weight, cos, sin = given
    plus, length = extra(added)
    q, k, v = (qkv.new_empty(batch, heads, tokens, width // heads) for _ in range(3))
    served = _cpu.rope(
        level(), rows(qkv), table(q_weight), table(k_weight), table(cos, 0, cos.stride(0)), table(sin, 0, sin.stride(0)), plus,
        length, q.data_ptr(), k.data_ptr(), v.data_ptr(), batch, tokens, width, heads, q_weight.shape[0] == width // heads, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return (q, k, v) if served else None


def qk_norm_rope_gradient(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    added: Tensor | None,
    needed: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradient of the projection, and float32 ones of the norms' weights where they are `needed`, else empty."""
    batch, heads_, tokens, head = dq.shape
    width = heads_ * head
    added = dense(added) if added is not None and added.shape[-2] else None
    if not takes(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, added) or {dq.dtype, dk.dtype, dv.dtype} != {qkv.dtype}:
        return None
    given = (dense(t) for t in (dq, dk, dv, qkv, q_weight, k_weight, cos, sin))
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin = given
    plus, length = extra(added)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    weights = [torch.empty(q_weight.shape if one else 0) for one in needed]
    served = _cpu.rope_gradient(
        level(), heads(dq), heads(dk), heads(dv), rows(qkv), table(q_weight), table(k_weight), table(cos, 0, cos.stride(0)),
        table(sin, 0, sin.stride(0)), plus, length, *(t.data_ptr() for t in (dqkv, *weights)), batch, tokens, width, heads_,
        q_weight.shape[0] == head, eps, torch.get_num_threads(),
    )  # fmt: skip
    return (dqkv, *weights) if served else None


def attend(q: Tensor, branches: list[_cpu.Branch], log_sums: Tensor | None = None) -> Tensor | None:
    """The sum over branches; logarithms of their denominators into `log_sums` [branches, B, H, N] float32."""
    out = rows_of_heads(q)
    batch, heads_, tokens, head = q.shape
    served = _cpu.attention(
        level(), heads(q), heads(out), branches, batch, heads_, tokens, head, head**-0.5,
        0 if log_sums is None else log_sums.data_ptr(), DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out if served else None


def pull(
    gradient: Tensor,
    q: Tensor,
    branches: list[_cpu.Branch],
    keys: list[int],
    log_sums: Tensor,
    out: Tensor | None = None,
    rounded: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor] | None:
    """Gradients of the queries; of the keys and values of each branch that has `keys` that are learned (others: 0), [splits,
    B, H, keys, d] float32, to be added up; and of all branches' weights [branches, splits, B, H]. `out` as `AttentionGradient`;
    `rounded`: those of keys and values in the queries' dtype, of one split.
    """
    batch, heads_, tokens, head = q.shape
    splits = max(1, min(-(-PARTS // (batch * heads_)), tokens // LEAST_QUERIES))
    padded = -(-head // PADDED) * PADDED
    if rounded and (splits > 1 or padded != head):
        return None
    dq, dweight = rows_of_heads(q), q.new_empty(len(branches), splits, batch, heads_, dtype=torch.float32)
    stored = q.dtype if rounded else torch.float32
    sums = [q.new_empty(2, splits, batch, heads_, count, padded, dtype=stored) for count in keys]
    gradients = [
        _cpu.BranchGradient(*((one[0].data_ptr(), one[1].data_ptr()) if count else (0, 0)), dweight[n].data_ptr())
        for n, (one, count) in enumerate(zip(sums, keys))
    ]
    served = _cpu.attention_gradient(
        level(), heads(q), heads(gradient), NO_HEADS if out is None else heads(out), heads(dq), branches, gradients, batch,
        heads_, tokens, splits, head, padded, head**-0.5, log_sums.data_ptr(), DTYPES[q.dtype], rounded, torch.get_num_threads(),
    )  # fmt: skip
    return (dq, [tuple(one[..., :head].unbind()) for one in sums], dweight) if served else None


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` serves."""
    alike = q.dtype == k.dtype == v.dtype and k.shape == v.shape and k.shape[:2] == q.shape[:2]
    return alike and takes(q, k, v) and q.shape[-1] % 8 == 0 and q.shape[-1] <= _cpu.LARGEST_HEAD


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    if not attends(q, k, v):
        return None
    q, k, v = dense(q), dense(k), dense(v)
    return attend(q, [_cpu.Branch(heads(k), heads(v), k.shape[2], 0, 1.0)])


def attention_saving(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """`attention`, and the logarithms of its softmaxes' denominators [B, H, N] float32."""
    if not attends(q, k, v):
        return None
    q, k, v = dense(q), dense(k), dense(v)
    log_sum = q.new_empty(q.shape[:3], dtype=torch.float32)
    out = attend(q, [_cpu.Branch(heads(k), heads(v), k.shape[2], 0, 1.0)], log_sum)
    return None if out is None else (out, log_sum)


def attention_gradient(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not attends(q, k, v) or not takes(gradient, out) or {gradient.dtype, out.dtype} != {q.dtype}:
        return None
    gradient, q, k, v, out = (dense(x) for x in (gradient, q, k, v, out))
    branch = _cpu.Branch(heads(k), heads(v), k.shape[2], 0, 1.0)
    given = gradient, q, [branch], [k.shape[2]], log_sum.contiguous(), out
    found = (pull(*given, rounded=True) if q.dtype == torch.bfloat16 else None) or pull(*given)
    if found is None:
        return None
    dq, [sums], _ = found
    return dq, *(added(one).to(x.dtype) for one, x in zip(sums, (k, v)))


def added(splits: Tensor) -> Tensor:
    """The sum over the first dimension, without a pass where there is one."""
    return splits[0] if len(splits) == 1 else splits.sum(0)


def prompt_attention(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
    log_sums: Tensor | None = None,
) -> Tensor | None:
    given = readable(q, text_key, text_value, text_log_count, prompt_key, prompt_value)
    return None if given is None else attend(given[0], branches_of(*given[1:], prompt_weight), log_sums)


def readable(q: Tensor, text_key: Tensor, text_value: Tensor, text_log_count: Tensor, *prompts: Tensor) -> list[Tensor] | None:
    """The tensors as the code reads them, to be kept until the call is over; None where it does not take them."""
    given = (text_key, text_value, *(prompts if len(prompts[0]) else ()))
    if not takes(q, text_log_count, *given) or text_log_count.dtype != torch.float32 or any(x.dtype != q.dtype for x in given):
        return None
    return [dense(q), dense(text_key), dense(text_value), text_log_count.contiguous(), *map(dense, prompts)]


def branches_of(
    text_key: Tensor, text_value: Tensor, bias: Tensor, prompt_key: Tensor, prompt_value: Tensor, weights: Tensor
) -> list[_cpu.Branch]:
    """The text's branch, and each prompt's."""
    shared = len(text_key) == 1
    text = _cpu.Branch(heads(text_key, shared), heads(text_value, shared), text_key.shape[2], bias.data_ptr(), 1.0)
    prompts = zip(prompt_key, prompt_value, weights.tolist())
    return [text] + [
        _cpu.Branch(heads(key[None], True), heads(value[None], True), key.shape[1], 0, weight) for key, value, weight in prompts
    ]


def prompt_attention_gradient(
    gradient: Tensor,
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    given = readable(q, text_key, text_value, text_log_count, prompt_key, prompt_value)
    if given is None or not takes(gradient) or gradient.dtype != q.dtype:
        return None
    q, *rest = given
    prompts, rows = prompt_key.shape[0], prompt_key.shape[2]
    found = pull(dense(gradient), q, branches_of(*rest, prompt_weight), [0] + [rows] * prompts, log_sum.contiguous())
    if found is None:
        return None
    dq, [_, *sums], dweight = found
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (prompt_key, prompt_value))
    for p, one in enumerate(sums):
        for to, parts in zip((dk, dv), one):
            to[p] = parts.sum((0, 1))
    return dq, dk, dv, dweight[1:].sum((1, 2, 3)).to(prompt_weight.dtype)


def gelu(x: Tensor) -> Tensor | None:
    if not takes(x) or not x.is_contiguous():
        return None
    out = torch.empty_like(x)
    _cpu.gelu(level(), x.data_ptr(), 0, out.data_ptr(), x.numel(), DTYPES[x.dtype], torch.get_num_threads())
    return out


def gelu_gradient(gradient: Tensor, x: Tensor) -> Tensor | None:
    if not takes(gradient, x) or not x.is_contiguous() or gradient.dtype != x.dtype:
        return None
    gradient = gradient.contiguous()
    out = torch.empty_like(x)
    given = x.data_ptr(), gradient.data_ptr(), out.data_ptr(), x.numel(), DTYPES[x.dtype]
    _cpu.gelu(level(), *given, torch.get_num_threads())
    return out


def gelu_gradient_to(out: Tensor, gradient: Tensor, x: Tensor) -> bool:
    """Written to `out`, where it serves; all are contiguous and of one dtype."""
    if not takes(gradient, x):
        return False
    given = x.data_ptr(), gradient.data_ptr(), out.data_ptr(), x.numel(), DTYPES[x.dtype]
    return _cpu.gelu(level(), *given, torch.get_num_threads())


def gelu_(x: Tensor) -> bool:
    """In place, where it serves."""
    served = takes(x) and x.is_contiguous()
    return served and _cpu.gelu(level(), x.data_ptr(), 0, x.data_ptr(), x.numel(), DTYPES[x.dtype], torch.get_num_threads())
