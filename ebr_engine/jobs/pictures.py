"""The part of `ebr-engine restore` that does pictures, in four steps: read, restore, finish, write."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.jobs.recipe import Recipe

if TYPE_CHECKING:
    from ebr_engine.jobs.files import Job
    from ebr_engine.media.holdings import Outcome as HoldingOutcome
    from ebr_engine.media.picture import Picture


def read(job: "Job", recipe: Recipe) -> "Picture":
    """The picture at the size that it is restored at; MediaError also when an output's format cannot hold it."""
    from ebr_engine.media.images import check_can_hold, read_image, resize_picture

    picture = read_image(job.source, all_pages=True)
    for path in job.outputs:
        check_can_hold(path, picture)
    return resize_picture(picture, *recipe.size) if recipe.size else picture


def restore(restorer: Any, picture: "Picture", recipe: Recipe, callback: Callable[[int, int], None]) -> "Picture":
    """The restored picture, all of its pages; depth, alpha and everything else are those of the input."""
    from ebr_engine.media.colour_fix import fix_colours

    pixels = restorer.restore(picture.pixels, callback=callback, **recipe.run)
    more = tuple(restore(restorer, page, recipe, callback) for page in picture.more)
    return replace(picture, pixels=fix_colours(pixels, picture.pixels, recipe.colour_fix or "none"), more=more)


def finish(job: "Job", picture: "Picture", restored: "Picture", recipe: Recipe) -> "dict[Path, Picture]":
    """What is written where: the result, and what is made of it and its input."""
    results = {job.target: restored}
    if job.compare:
        results[job.compare] = compared(picture, restored, recipe.request.compare)
    return results


def write(
    results: "Mapping[Path, Picture]", recipe: Recipe, commit: "Callable[[Path, Path], None] | None" = None
) -> "list[HoldingOutcome]":
    """Write every result, and tell what became of all that the first one's input holds beside its pixels.

    Each file appears whole or not at all, by `commit(part, path)` where that is given.
    """
    from ebr_engine.media.images import write_image

    fates: list[HoldingOutcome] = []
    for index, (path, picture) in enumerate(results.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        outcomes = write_image(path, picture, recipe.request.quality, commit, strict=recipe.request.strict and not index)
        fates = fates if index else outcomes
    return fates


def compared(picture: "Picture", restored: "Picture", way: str) -> "Picture":
    """Input and output in one picture: side by side, or the input in the left half."""
    from ebr_engine.media import compare

    alpha = None
    if picture.alpha is not None:
        alpha = compare.compared(picture.alpha[..., None], restored.alpha[..., None], way)[..., 0]
    return replace(restored, pixels=compare.compared(picture.pixels, restored.pixels, way), alpha=alpha, more=())
