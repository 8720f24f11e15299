"""What `mini` does around its transformer: the grid of tokens lies elsewhere in each step, and detail keeps its level.

A transformer that decides token by token leaves their grid in the picture. Over moved grids it averages out, at no further
evaluation (cycle spinning: Coifman and Donoho, "Translation-invariant de-noising", 1995). A prompt also changes every token
alike a little, which draws one texture over the whole picture; a picture as a whole has next to none, so the clean estimate's
mean detail is set to the degraded picture's. Both belong to the backbone: learning, validation and restoring do the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebr_engine.backbones.loading import Backbone
from ebr_engine.codecs import Codec
from ebr_engine.sampler import Velocity


class View(NamedTuple):
    """How the transformer sees the state in one step."""

    time: float | Tensor  # of the bridge; [B] where samples differ
    offset: tuple[int, int] | None  # of the grid of tokens, pixels up and left of the picture's corner; None: in place


def views(parts: Backbone, times: Sequence[float]) -> tuple[View, ...]:
    """The view of each step that starts at one of `times`; none but for `mini`.

    A graph of one size only leaves the grid no room to move.
    """
    if parts.name != "mini":
        return ()
    offsets, last = parts.codec.offsets, len(times) - 1
    return tuple(View(time, None if parts.fixed else offsets[(last - i) % len(offsets)]) for i, time in enumerate(times))


def room_of(codec: Codec, views: Sequence[View]) -> int:
    """Cells by which the grid of these views is larger than the picture's, either way."""
    return codec.span // codec.spatial if views and views[0].offset is not None else 0


def seen(entries: Sequence[Any], views: Sequence[View]) -> Sequence[Any]:
    """What the function of `spun` takes in each step: the step's own entry, with its view if there is one."""
    return list(zip(entries, views)) if views else entries


def spun(velocity: Velocity, codec: Codec, degraded: Tensor) -> Velocity:
    """The same velocity function through a step's view; entries are (step, `View`). `degraded`: the picture's latent.

    Differentiable. The moved grid is one cell larger either way, whatever the offset, so that the transformer meets one size.
    """
    pixels = codec.decode(degraded) if codec.levels else None  # once, for every step

    def through(state: Tensor, entry: tuple[Any, View]) -> Tensor:
        step, view = entry
        there = moved(state, codec, view.offset)
        result = velocity(there, step).contiguous()  # one layout, one order of sums
        if codec.levels:
            level = degraded if view.offset is None else codec.encode(extended(pixels, view.offset, codec.span))
            result = levelled(result, there, level, view.time, codec.tones)
        return moved_back(result, codec, view.offset)

    return through


def moved(latent: Tensor, codec: Codec, offset: tuple[int, int] | None) -> Tensor:
    """A latent [B, C, F, h, w] on a grid that begins `offset` pixels up and left, [B, C, F, h + n, w + n]; n a token's cells.

    What the larger grid shows beyond the picture is its reflection.
    """
    if offset is None:
        return latent.contiguous()
    return codec.encode(extended(codec.decode(latent), offset, codec.span))


def extended(pixels: Tensor, offset: tuple[int, int], span: int) -> Tensor:
    """Pixels [..., H, W] with `offset` (up, left) of their reflection before them and the rest of `span` after them."""
    for axis, before in zip((-2, -1), offset):
        after = span - before
        first, last = pixels.narrow(axis, 0, before), pixels.narrow(axis, pixels.shape[axis] - after, after)
        pixels = torch.cat((first.flip(axis), pixels, last.flip(axis)), axis)
    return pixels


def moved_back(latent: Tensor, codec: Codec, offset: tuple[int, int] | None) -> Tensor:
    """The inverse of `moved`."""
    if offset is None:
        return latent
    pixels = codec.decode(latent)
    for axis, before in zip((-2, -1), offset):
        pixels = pixels.narrow(axis, before, pixels.shape[axis] - codec.span)
    return codec.encode(pixels)


def levelled(velocity: Tensor, state: Tensor, degraded: Tensor, time: float | Tensor, tones: Tensor) -> Tensor:
    """The velocity whose clean estimate D = state − t·velocity has the mean detail of `degraded`; all [B, C, F, h, w].

    Means are over frames, height and width of each channel that is not one of the `tones` [C].
    """
    if isinstance(time, Tensor):
        time = time.view(-1, 1, 1, 1, 1)
    own, wanted = (x.mean((2, 3, 4), keepdim=True) for x in (velocity, state - degraded))
    return velocity + (wanted / time - own) * ~tones.to(velocity.device).view(1, -1, 1, 1, 1)
