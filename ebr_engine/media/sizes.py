"""Clips and pictures at another length or size."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_frames(clip: Tensor, frames: int) -> Tensor:
    """Extend [B, 3, F, H, W] to `frames` by repeating the last one."""
    missing = frames - clip.shape[2]
    return torch.cat((clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else clip


def reduced_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Height and width reduced so that the longer one is at most `side`; both multiples of `multiple`."""
    scale = min(1.0, side / max(height, width))
    return tuple(max(multiple, round(length * scale / multiple) * multiple) for length in (height, width))


def enlarged(clip: Tensor, times: int) -> Tensor:
    """The clip [B, 3, F, H, W] so many times larger either way, bicubic, in [0, 1]; `resized` brings it back.

    Without antialiasing, as prompts have learned it: with it torch takes another cubic, though nothing is made smaller.
    """
    if times == 1:
        return clip
    frames = F.interpolate(clip.transpose(1, 2).flatten(0, 1), scale_factor=times, mode="bicubic").clamp(0, 1)
    return frames.unflatten(0, (clip.shape[0], -1)).transpose(1, 2)


def resized(clip: Tensor, height: int, width: int) -> Tensor:
    """The clip [B, 3, F, H, W] at another size, bicubic with antialiasing, in [0, 1]."""
    frames = clip.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return frames.unflatten(0, (clip.shape[0], -1)).transpose(1, 2)
