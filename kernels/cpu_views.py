"""Tensors as the native code for CPUs reads them: an address, strides and a dtype; who makes a view keeps its tensor alive."""

import torch
from torch import Tensor

from ebr_engine import _cpu

DTYPES = {getattr(torch, name): index for index, name in enumerate(_cpu.DTYPES)}
NONE = _cpu.Rows(0, 0, 0, 0)
NO_HEADS = _cpu.Heads(0, 0, 0, 0)


def table(x: Tensor, batch: int = 0, token: int = 0) -> _cpu.Rows:
    """`x` with these strides, in numbers, from sample to sample and token to token."""
    return _cpu.Rows(x.data_ptr(), batch, token, DTYPES[x.dtype])


def rows(x: Tensor) -> _cpu.Rows:
    """`x` [B, N, D]."""
    return table(x, x.stride(0), x.stride(1))


def extra(x: Tensor | None) -> tuple[_cpu.Rows, int]:
    """`x` [L, D] or [B, L, D], dense, and L; nothing where there is none."""
    if x is None:
        return NONE, 0
    return table(x, x.stride(0) if x.dim() == 3 and len(x) > 1 else 0, x.stride(-2)), x.shape[-2]


def heads(x: Tensor, shared: bool = False) -> _cpu.Heads:
    """`x` [B, H, N, d]; `shared`: by all of the batch."""
    batch, head, token, _ = x.stride()
    return _cpu.Heads(x.data_ptr(), 0 if shared else batch, head, token)
