"""The run over all files: each is read, restored, finished and written, and a file that fails does not stop the others."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ebr_engine.cli import pictures
from ebr_engine.cli.clips import restore_clip
from ebr_engine.cli.group import one_line, out_of_memory
from ebr_engine.cli.progress import Progress
from ebr_engine.cli.recipe import Recipe
from ebr_engine.errors import EbrError

if TYPE_CHECKING:
    from ebr_engine.media.files import Job


def run_jobs(restorer: Any, jobs: "Sequence[Job]", recipes: Mapping[str | None, Recipe], progress: Progress) -> int:
    """Restore every job by the recipe of its task, telling of each; the number that failed."""
    started = time.perf_counter()
    failed = 0
    for job in jobs:
        progress.start(job.source.name)
        try:
            restore_one = restore_clip if job.is_clip else _restore_picture
            progress.finish(restore_one(restorer, job, recipes[job.task], progress))
        except (EbrError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            failed += 1
            line = one_line(error)
            progress.error(line if str(job.source) in line else f"{job.source}: {line}")
            progress.finish(None)
    if len(jobs) > 1:
        failures = f", {failed} failed" if failed else ""
        progress.line(f"{len(jobs) - failed} of {len(jobs)} restored{failures}, {time.perf_counter() - started:.1f} s")
    return failed


def _restore_picture(restorer: Any, job: "Job", recipe: Recipe, progress: Progress) -> str:
    started = time.perf_counter()
    picture = pictures.read(job, recipe)
    restored = pictures.restore(restorer, picture, recipe, progress.step)
    pictures.write(pictures.finish(job, picture, restored, recipe), recipe)
    seconds = time.perf_counter() - started
    return f"{job.source} -> {job.target}  {picture.width} x {picture.height}  {picture.bits} bit  {seconds:.1f} s"
