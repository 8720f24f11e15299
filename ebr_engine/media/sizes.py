"""Clips and pictures at another length or size."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_frames(clip: Tensor, frames: int) -> Tensor:
    """Extend [B, 3, F, H, W] to `frames` by repeating the last one."""
    missing = frames - clip.shape[2]
    return torch.cat((clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else clip


def reduced(clip: Tensor, side: int, multiple: int) -> Tensor:
    """The clip [B, 3, F, H, W] reduced so that its longer side is at most `side`; both sides multiples of `multiple`."""
    scale = min(1.0, side / max(clip.shape[-2:]))
    return resized(clip, *(max(multiple, round(length * scale / multiple) * multiple) for length in clip.shape[-2:]))


def resized(clip: Tensor, height: int, width: int) -> Tensor:
    """The clip [B, 3, F, H, W] at another size, bicubic with antialiasing, in [0, 1]."""
    frames = clip.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return frames.unflatten(0, (clip.shape[0], -1)).transpose(1, 2)
