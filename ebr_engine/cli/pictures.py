"""The part of `ebr-engine restore` that does pictures, in four steps: read, restore, finish, write."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.cli.recipe import Recipe

if TYPE_CHECKING:
    from ebr_engine.media.files import Job
    from ebr_engine.media.images import Picture


def read(job: "Job", recipe: Recipe) -> "Picture":
    """The picture at the size that it is restored at; MediaError also when an output's format cannot hold it."""
    from ebr_engine.media.images import check_can_hold, read_image, resize_picture

    picture = read_image(job.source)
    for path in job.outputs:
        check_can_hold(path, picture)
    return resize_picture(picture, *recipe.size) if recipe.size else picture


def restore(restorer: Any, picture: "Picture", recipe: Recipe, callback: Callable[[int, int], None]) -> "Picture":
    """The restored picture; depth, alpha and metadata are those of the input."""
    return replace(picture, pixels=restorer.restore(picture.pixels, callback=callback, **recipe.run))


def finish(job: "Job", picture: "Picture", restored: "Picture", recipe: Recipe) -> "dict[Path, Picture]":
    """What is written where: the result, and what is made of it and its input."""
    results = {job.target: restored}
    if job.compare:
        results[job.compare] = _beside(picture, restored)
    return results


def write(results: "Mapping[Path, Picture]", recipe: Recipe, commit: "Callable[[Path, Path], None] | None" = None) -> None:
    """Write every result; each file appears whole or not at all, by `commit(part, path)` where that is given."""
    from ebr_engine.media.images import write_image

    for path, picture in results.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, picture, recipe.quality, commit)


def _beside(left: "Picture", right: "Picture") -> "Picture":
    import numpy as np

    alpha = None if left.alpha is None else np.concatenate([left.alpha, right.alpha], axis=1)
    return replace(right, pixels=np.concatenate([left.pixels, right.pixels], axis=1), alpha=alpha)
