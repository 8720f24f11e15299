"""Gradients of norms: of their rows, and for who learns a model's own weights of what norms and gates multiply rows by.

of weight = Σ_n dy·n̂, n̂ the norm of x;   of bias = Σ_n dy;   of gate = Σ_n dx·y          sums over the tokens

On a CPU they are made in the same pass as the gradients of the rows, whose reading takes longer than the sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.rows import wide

Needed = tuple[bool, bool, bool]  # of weight, bias and gate


class Tables(NamedTuple):
    """Gradients [B, D] of weight, bias and gate in float32 (or float64); None where they are not needed."""

    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None


def like(sums: Tensor | None, table: Tensor | None) -> Tensor | None:
    """Sums [B, D] in the shape and dtype of what they are the gradient of: [B or 1, D], or [D]."""
    return None if sums is None else sums.sum_to_size(table.shape).to(table.dtype)


def table_gradients_ref(
    gradient: Tensor, x: Tensor, eps: float, centred: bool, needed: Needed, dx: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas with float32 (or float64) sums; see `table_gradients`. What is not needed is empty."""
    g, none = wide(gradient), wide(x).new_empty(0)
    norm = F.layer_norm if centred else F.rms_norm
    weight = (g * norm(wide(x), x.shape[-1:], eps=eps)).sum(1) if needed[0] else none
    return weight, g.sum(1) if needed[1] else none, (wide(dx) * wide(y)).sum(1) if needed[2] else none


def table_gradients(
    gradient: Tensor,
    x: Tensor,
    eps: float,
    needed: Needed,
    dx: Tensor | None = None,
    y: Tensor | None = None,
    centred: bool = True,
) -> Tables:
    """See `Tables`.

    Args: `gradient` of the norm's result and what it was taken of, `x`, both [B, N, D]; for a gate the gradient `dx` of the sum
    and the branch `y` that was gated. `centred`: LayerNorm, not RMSNorm.
    """
    if not any(needed):
        return Tables(None, None, None)
    if backend.native_kind(x) and not needed[2]:
        found = torch.ops.ebr.table_gradients.default(gradient, x, eps, centred, needed)
    else:
        found = table_gradients_ref(gradient, x, eps, centred, needed, dx, y)
    return Tables(*(one if wanted else None for one, wanted in zip(found, needed)))


def norm_gradients(
    sum_gradient: Tensor | None,
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    needed: Needed,
    centred: bool = True,
) -> tuple[Tensor, Tensor | None, Tables]:
    """Gradients [B, N, D] of x and of a gated branch `y`, in one pass with the tables', for `backend.native_kind`.

    Args: as of `table_gradients`; `sum_gradient` is that of x itself, whose norm `gradient` belongs to; `weight` [B or 1, D].
    """
    given = sum_gradient, gradient, x, y, gate, weight
    dx, dy, *sums = torch.ops.ebr.norm_gradients.default(*given, eps, centred, needed)
    return dx, None if gate is None else dy, Tables(*(one if wanted else None for one, wanted in zip(sums, needed)))


torch.library.define(
    "ebr::table_gradients",
    "(Tensor gradient, Tensor x, float eps, bool centred, bool[] needed) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ebr::norm_gradients",
    "(Tensor? sum_gradient, Tensor gradient, Tensor x, Tensor? y, Tensor? gate, Tensor weight, float eps, bool centred, "
    "bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("ebr::table_gradients", "CPU")
def _(gradient, x, eps, centred, needed):
    cpu = backend.native(gradient, x)
    found = cpu.norm_gradient(None, gradient, x, None, None, eps, centred, None, needed) if cpu else None
    return table_gradients_ref(gradient, x, eps, centred, needed) if found is None else tuple(found[2])


@torch.library.impl("ebr::norm_gradients", "CPU")
def _(sum_gradient, gradient, x, y, gate, weight, eps, centred, needed):
    cpu = backend.native(gradient, x, sum_gradient, y, gate, weight)
    found = cpu.norm_gradient(sum_gradient, gradient, x, gate, weight, eps, centred, y, needed) if cpu else None
    if found is not None:
        dx, dy, sums = found
        return dx, x.new_empty(0) if dy is None else dy, *sums
    dx = norm_gradient_ref(gradient, x, weight, eps, centred)
    dx = dx if sum_gradient is None else dx + wide(sum_gradient)
    dy = x.new_empty(0) if gate is None else (dx * wide(gate).unsqueeze(-2)).to(x.dtype)
    dx = dx.to(x.dtype).contiguous()
    return dx, dy.contiguous(), *table_gradients_ref(gradient, x, eps, centred, needed, dx, y)


def norm_gradient_ref(gradient: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool = True) -> Tensor:
    """Gradient of what was normed and multiplied by `weight`, in float32 (or float64), unrounded."""
    x, g = wide(x), wide(gradient) * wide(weight).unsqueeze(-2)
    off = x - x.mean(-1, keepdim=True) if centred else x
    inverse = torch.rsqrt(off.square().mean(-1, keepdim=True) + eps)
    n = off * inverse
    flat = g.mean(-1, keepdim=True) if centred else 0.0
    return inverse * (g - flat - n * (g * n).mean(-1, keepdim=True))


def _empty_tables(x: Tensor, needed: Needed) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty((x.shape[0], x.shape[-1]) if one else (0,), dtype=dtype) for one in needed)


@torch.library.register_fake("ebr::table_gradients")
def _(gradient, x, eps, centred, needed):
    return _empty_tables(x, needed)


@torch.library.register_fake("ebr::norm_gradients")
def _(sum_gradient, gradient, x, y, gate, weight, eps, centred, needed):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if gate is None else torch.empty_like(dx), *_empty_tables(x, needed)
