"""Pictures and clips of any sizes as few batches: what is extended to one size runs together."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebr_engine.media.arrays import to_tensor

AT_ONCE = 8  # pictures in a batch: more only takes memory


def one_item(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Pixels [1, 3, F, H, W] of one picture or clip, and the function that turns a result into what it was.

    Pictures: see `to_tensor`. Clips: tensor [3, F, H, W] or array [F, H, W, 3]. Raises `EngineError` for anything else.
    """
    if isinstance(image, Tensor) and image.ndim == 4:
        frames, rebuild = to_tensor(image.transpose(0, 1))
        return frames.transpose(0, 1)[None], lambda result: rebuild(result[0].transpose(0, 1)).transpose(0, 1)
    if isinstance(image, np.ndarray) and image.ndim == 4:
        parts = [to_tensor(frame) for frame in image]
        clip = torch.cat([pixels for pixels, _ in parts]).transpose(0, 1)[None]
        return clip, lambda result: np.stack([part[1](result[:, :, i]) for i, part in enumerate(parts)])
    pixels, rebuild = to_tensor(image)
    return pixels.unsqueeze(2), lambda result: rebuild(result.squeeze(2))


def groups(shapes: Sequence[tuple[int, ...]], alone: Sequence[bool], at_once: int = AT_ONCE) -> Iterator[list[int]]:
    """Numbers of the items that run together, equal shapes at most `at_once` at a time; those that are to run alone do."""
    kept: dict[tuple[int, ...], list[int]] = {}
    for i, (shape, single) in enumerate(zip(shapes, alone)):
        if single:
            yield [i]
            continue
        group = kept.setdefault(shape, [])
        group.append(i)
        if len(group) == at_once:
            yield kept.pop(shape)
    yield from kept.values()
