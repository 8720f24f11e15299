"""Launchers of the native code for CPUs (see `cpu.py`) for what codecs do, on [B, C, H, W] whose channels lie side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ebr_engine import _cpu
from ebr_engine.kernels.cpu_views import DTYPES, NONE, level, table, takes

FEW_PIXELS = 32 * 16  # below it transforming a convolution's weights takes longer than its products


def channel_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, silu: bool, overwrite: bool
) -> Tensor | None:
    if not takes(x, weight, bias) or not side_by_side(x):
        return None
    out = x if overwrite else torch.empty_like(x, memory_format=torch.channels_last)
    frames, channels, height, width = x.shape
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    tables = (NONE if t is None else table(t) for t in (weight, bias))
    _cpu.channel_norm(
        level(), x.data_ptr(), out.data_ptr(), *tables, frames, height * width, channels, groups, eps, silu, DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def convolution(
    frames: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    doubled: bool,
    over_added: bool,
) -> Tensor | None:
    given = [frame for frame in frames if frame is not None]
    x, (outputs, channels, taps) = frames[-1], weight.shape[:3]
    height, width = (side << doubled for side in x.shape[-2:])
    floats = takes(*given, weight, bias, added) and all(
        t is None or t.dtype == torch.float32 for t in (*given, weight, bias, added)
    )
    if not floats or len(x) != 1 or taps != len(frames) or weight.shape[3:] != (3, 3) or height * width < FEW_PIXELS:
        return None
    if not all(frame.shape == x.shape and side_by_side(frame) for frame in given) or not side_by_side(weight[:, :, -1]):
        return None
    if not weight.permute(2, 0, 3, 4, 1).is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return None
    if added is not None and (added.shape != (1, outputs, height, width) or not side_by_side(added)):
        return None
    out = added if over_added else torch.empty((1, outputs, height, width), memory_format=torch.channels_last)
    addresses = [0 if frame is None else frame.data_ptr() for frame in frames]
    others = (0 if t is None else t.data_ptr() for t in (bias, added))
    served = _cpu.convolution(
        level(), addresses, doubled, weight.data_ptr(), *others, out.data_ptr(), height, width, channels, outputs,
        torch.get_num_threads(),
    )  # fmt: skip
    return out if served else None


def side_by_side(x: Tensor) -> bool:
    """Whether all of the channels of `x` [B, C, H, W] lie side by side, pixel by pixel, without gaps."""
    return x.permute(0, 2, 3, 1).is_contiguous()
