"""`ebr-engine restore --preview`: the first file's first frame or centre, restored at once, before all the rest is."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.errors import EbrError
from ebr_engine.jobs import pictures
from ebr_engine.jobs.clips import reading, some_frames
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipe, Recipes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebr_engine.jobs.files import Job
    from ebr_engine.media.picture import Picture

SIDE = 512  # a larger picture is shown by its centre


def write_preview(restorer: Any, jobs: "Sequence[Job]", recipes: Recipes, progress: Progress) -> Path:
    """Restore a part of the first job and write it beside its input as NAME_preview.png, in place of an older one.

    Raises `EbrError` when that name is one of the inputs.
    """
    from ebr_engine.media.images import write_image

    job = jobs[0]
    if job.is_sound:
        raise EbrError(f"{job.source}: is sound, of which there is no preview; leave --preview out")
    path = job.target.with_name(f"{job.target.stem}_preview.png")
    if path.exists() and any(path.samefile(each.source) for each in jobs if each.source.exists()):
        raise EbrError(f"{path}: is an input; it is never overwritten, choose another output for the preview")
    recipe = recipes.of(job.request)
    whole = _whole(job, recipe)
    recipe = recipes.seen(recipe, lambda: some_frames(job.source, job.request) if job.is_clip else [whole.pixels])
    picture = _part(whole, recipe)
    with restorer.previewing():
        restored = pictures.restore(restorer, picture, recipe, lambda index, steps: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, pictures.compared(picture, restored, recipe.request.compare or "side"))
    note = f"  {recipe.note}" if recipe.note else ""
    progress.line(f"{job.source} -> {path}  {picture.width} x {picture.height}{note}")
    return path


def _whole(job: "Job", recipe: Recipe) -> "Picture":
    """The first frame of a clip, or a picture."""
    from ebr_engine.media.picture import Picture
    from ebr_engine.media.video import open_video

    if not job.is_clip:
        return pictures.read(replace(job, compare=None), replace(recipe, size=None))
    with open_video(job.source, **reading(job.request.with_(frames=1))) as reader:
        return Picture(next(iter(reader)).pixels, bits=16 if reader.info.bits > 8 else 8)


def _part(picture: "Picture", recipe: Recipe) -> "Picture":
    """The picture at the size that all are restored at, or the centre of a large one."""
    from ebr_engine.media.images import resize_picture

    if recipe.size:
        return resize_picture(picture, *recipe.size)
    rows, columns = (_middle(side) for side in picture.pixels.shape[:2])
    alpha = None if picture.alpha is None else picture.alpha[rows, columns]
    return replace(picture, pixels=picture.pixels[rows, columns], alpha=alpha)


def _middle(side: int) -> slice:
    start = max(0, (side - SIDE) // 2)
    return slice(start, start + SIDE)
