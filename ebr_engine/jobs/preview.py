"""`ebr-engine restore --preview`: the first file's first frame or centre, restored at once, before all the rest is."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.cli.progress import Progress
from ebr_engine.errors import EbrError
from ebr_engine.jobs import pictures
from ebr_engine.jobs.auto import frames_of, settled
from ebr_engine.jobs.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebr_engine.jobs.files import Job
    from ebr_engine.media.images import Picture

SIDE = 512  # a larger picture is shown by its centre


def write_preview(restorer: Any, jobs: "Sequence[Job]", recipe: Recipe, progress: Progress) -> Path:
    """Restore a part of the first job and write it beside its input as NAME_preview.png, in place of an older one.

    Raises `EbrError` when that name is one of the inputs.
    """
    from ebr_engine.media.images import write_image

    job = jobs[0]
    path = job.target.with_name(f"{job.target.stem}_preview.png")
    if path.exists() and any(path.samefile(each.source) for each in jobs if each.source.exists()):
        raise EbrError(f"{path}: is an input; it is never overwritten, choose another output for the preview")
    whole = _whole(job, recipe)
    recipe = settled(recipe, lambda: frames_of(job.source, recipe.clips) if job.is_clip else [whole.pixels])
    picture = _part(whole, recipe)
    restored = pictures.restore(restorer, picture, recipe, lambda index, steps: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, pictures.compared(picture, restored, recipe.compare))
    note = f"  {recipe.note}" if recipe.note else ""
    progress.line(f"{job.source} -> {path}  {picture.width} x {picture.height}{note}")
    return path


def go_on(files: int, yes: bool, progress: Progress) -> bool:
    """Whether to restore all files: asked on a terminal, else only with --yes."""
    what = f"{files} files" if files > 1 else "the whole file"
    if yes:
        return True
    if on_terminal():
        return progress.ask(f"go on with {what}?")
    progress.line(f"this was the preview; --yes goes on with {what}")
    return False


def on_terminal() -> bool:
    """Whether there is a person to ask."""
    return sys.stdin.isatty()


def _whole(job: "Job", recipe: Recipe) -> "Picture":
    """The first frame of a clip, or a picture."""
    from ebr_engine.media.images import Picture
    from ebr_engine.media.video import open_video

    if not job.is_clip:
        return pictures.read(replace(job, compare=None), replace(recipe, size=None))
    options = recipe.clips
    with open_video(job.source, start=options.start, frames=1, deinterlace=options.deinterlace) as reader:
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
