"""Frames that another program hands over, restored in order: chunked, run and blended as `ebr-engine restore` does with clips."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ebr_engine.errors import EbrError
from ebr_engine.jobs.clips import recoloured
from ebr_engine.jobs.recipe import Recipe, Recipes
from ebr_engine.media.chunking import blend, chunked
from ebr_engine.media.video.info import Frame
from ebr_engine.prompts.catalogue import AUTO
from ebr_engine.request import LOAD, PLAN, RUN, RestoreRequest, check_names, names_of

TAKEN = (*names_of(PLAN, RUN), "chunk_frames", "chunk_overlap", "per_frame", "color_fix", "guess")


def request_of(task: str | None, prompt: Any, options: Mapping[str, Any], more: Sequence[str] = ()) -> RestoreRequest:
    """The request of a task or a prompt and of options by name; `EbrError` for a wrong one, and unless something is asked for.

    `more`: names of fields that may be given beside those that frames have a use for.
    """
    known = (*TAKEN, *more)
    check_names(options, known, "option")
    if not task and prompt is None:
        raise EbrError("name a task, such as task='haze', or a prompt")
    return RestoreRequest.of(task=task, prompt=prompt, **options)


def recipe_for(restorer: Any, request: RestoreRequest, look: Callable[[], Sequence[np.ndarray]]) -> Recipe:
    """How frames are restored; for task auto as it is for those [H, W, 3] in [0, 1] that `look` shows.

    Raises `EbrError` for what the backbone cannot meet, and `NothingToRepair` where auto finds nothing.
    """
    if restorer.asks_per_frame and not request.per_frame:
        raise EbrError(f"{restorer.backbone.name} knows no time; say per_frame=True, or use the backbone wan")
    recipes = Recipes(restorer)
    return recipes.seen(recipes.of(request), look) if request.task == AUTO else recipes.of(request)


def restored(
    restorer: Any,
    frames: Iterable[Frame],
    recipe: Recipe,
    size: tuple[int, int],
    callback: Callable[[int, float], None] | None = None,
) -> Iterator[Frame]:
    """The same frames, of `size` (height, width), in order with restored pixels; not more than two chunks are held.

    `callback(frame, part)`: the chunk up to this number of frames is so far, from 0 to 1. What it raises ends the run.
    """
    request = recipe.request
    asked = (request.chunk_frames, request.chunk_overlap, size, recipe.plan)
    length, overlap = restorer.chunk_size(*asked, **request.part(RUN))
    tail: list[Frame] = []
    restorer.begin()
    for chunk in chunked(frames, length, overlap, restorer.codec.frames):
        until = chunk.start + len(chunk.frames)

        def on_step(index: int, steps: int, until: int = until) -> None:
            if callback is not None:
                callback(until, index / steps)

        clip = torch.from_numpy(chunk.pixels).movedim(-1, 0)[None]  # [1, 3, F, H, W]
        pixels = recoloured(restorer.run(clip, callback=on_step, first=chunk.start, **recipe.run), clip, recipe)
        finished, tail = blend(chunk, pixels, tail)
        del chunk, clip, pixels  # before the next ones are made
        while finished:
            frame = finished.popleft()
            yield replace(frame, pixels=np.clip(frame.pixels, 0, 1))
    for frame in tail:
        yield replace(frame, pixels=np.clip(frame.pixels, 0, 1))


def split_load(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by name, those that load a model apart from the others."""
    load = names_of(LOAD)
    return {k: v for k, v in options.items() if k in load}, {k: v for k, v in options.items() if k not in load}
