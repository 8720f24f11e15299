"""Pictures and clips of any sizes as few batches: what is extended to one size runs together."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebr_engine.engine.plan import Plan
from ebr_engine.engine.run import Engine, calmed
from ebr_engine.errors import EngineError
from ebr_engine.media.arrays import to_tensor
from ebr_engine.media.tiling import crop

AT_ONCE = 8  # pictures in a batch: more only takes memory


def one_item(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Pixels [B, 3, F, H, W] of one picture or clip, and the function that turns a result into what it was.

    Pictures: see `to_tensor`. Clips: tensor [1, 3, F, H, W], or [3, F, H, W] unless F is 3, which could be three pictures as
    well; or array [F, H, W, 3]. Raises `EngineError` for anything else.
    """
    if isinstance(image, Tensor) and image.ndim == 5 and len(image) == 1:
        clip, rebuild = _clip(image[0])
        return clip, lambda result: rebuild(result)[None]
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[0] == 3:
        if image.shape[1] == 3:
            shape = tuple(image.shape)
            raise EngineError(f"a tensor {shape} is three pictures or a clip of three frames; give a clip as [1, 3, F, H, W]")
        return _clip(image)
    if isinstance(image, np.ndarray) and image.ndim == 4:
        frames = [to_tensor(frame) for frame in image]
        clip = torch.cat([pixels for pixels, _ in frames]).transpose(0, 1)[None]
        return clip, lambda result: np.stack([frame[1](result[:, :, i]) for i, frame in enumerate(frames)])
    pixels, rebuild = to_tensor(image)
    return pixels.unsqueeze(2), lambda result: rebuild(result.squeeze(2))


def _clip(image: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    frames, rebuild = to_tensor(image.transpose(0, 1))
    return frames.transpose(0, 1)[None], lambda result: rebuild(result[0].transpose(0, 1)).transpose(0, 1)


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


def together(engine: Engine, clips: list[Tensor], plan: Plan, at_once: int, how: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """(number, restored clip) of every clip [B, 3, F, H, W], those of one padded size in one run.

    `how`: options of `Engine.run`. Between two stages each is cut to its own size again, as it is when it runs alone. Where the
    detail is the input's nothing is padded, as a small version would show the padding: one size is then the pictures' own.
    """
    geometry, by_input = engine.geometry, plan.any_by_input(how["detail"])
    ready = (lambda clip: clip) if by_input else geometry.padded
    shapes = [tuple(ready(clip).shape) for clip in clips]
    sides = geometry.tile_size(how["tile"], how["tile_overlap"])
    if by_input:
        large = [max(shape[-2:]) > engine.backbone.spec.tile for shape in shapes]
    else:
        finest = [max(stage.supersample for stage in stages_of(engine, plan, shape, how)) for shape in shapes]
        seen = [(finest * height, finest * width) for finest, (*_, height, width) in zip(finest, shapes)]
        large = [len(geometry.tiles(*size, *sides)) > 1 for size in seen]
    for group in groups(shapes, large, at_once):
        now = [clips[i] for i in group]
        for stage in stages_of(engine, plan, shapes[group[0]], how):
            blurred = now if stage.deconvolves(how["deconvolve"]) else None
            if blurred:  # before they are padded
                now = [engine.unblurred(clip) for clip in now]
            whole = torch.cat([ready(clip) for clip in now])
            parts = engine.run(whole, stage, 0, None, **how | {"deconvolve": "off"}).split([len(clip) for clip in now])
            now = [crop(part, *clip.shape[-2:])[:, :, : clip.shape[2]] for part, clip in zip(parts, now)]
            if blurred:
                now = [calmed(*pair) for pair in zip(blurred, now)]
        yield from zip(group, now)


def stages_of(engine: Engine, plan: Plan, shape: Sequence[int], how: dict[str, Any]) -> list[Plan]:
    """The runs of a picture or clip [B, 3, F, H, W]: a small picture's may see it finer."""
    return plan.stages if shape[2] > 1 else engine.stages(plan, *shape[-2:], how)


def read(image: Any) -> Any:
    """A picture's pixels where `image` is the path of one, else `image` itself."""
    if not isinstance(image, (str, Path)):
        return image
    from ebr_engine.media.images import read_image

    picture = read_image(Path(image).expanduser())
    top = 255 if picture.bits == 8 else 65535
    return (picture.pixels * top).round().astype("uint8" if picture.bits == 8 else "uint16")
