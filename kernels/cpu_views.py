"""Tensors as the native code for CPUs reads them: an address, strides and a dtype; who makes a view keeps its tensor alive.

And which it takes, and at which level of instructions.
"""

import torch
from torch import Tensor

from ebr_engine import _cpu
from ebr_engine.kernels import backend

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


def levels() -> tuple[str, ...]:
    """Levels of instructions that this CPU has, each faster than the one before."""
    return _cpu.LEVELS


def level() -> int:
    """The number of the level that serves: the last, or the one that `EBR_CPU_LEVEL` names."""
    return _cpu.LEVELS.index(backend.CPU_LEVEL) if backend.CPU_LEVEL in _cpu.LEVELS else len(_cpu.LEVELS) - 1


def takes(*tensors: Tensor | None) -> bool:
    """Whether there is something to do, on the CPU, in dtypes that the code reads; with several threads only in torch's pool."""
    if not _cpu.POOLED and torch.get_num_threads() > 1:
        return False
    return all(x is None or (x.dtype in DTYPES and x.is_cpu and x.numel()) for x in tensors)
