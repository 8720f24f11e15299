"""The run over all files: each is read, restored, finished and written, and a file that fails does not stop the others.

The next picture is read and the last one is written while one is restored.
"""

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.cli.run import pictures
from ebr_engine.cli.run.auto import settled
from ebr_engine.cli.run.clips import compare_only, restore_clip
from ebr_engine.cli.run.interrupts import Interrupted, Interrupts
from ebr_engine.cli.run.outcome import Outcome
from ebr_engine.cli.run.overlap import Behind, ahead
from ebr_engine.cli.run.progress import Progress
from ebr_engine.cli.run.recipe import Recipe
from ebr_engine.cli.run.telling import one_line, out_of_memory
from ebr_engine.errors import EbrError

if TYPE_CHECKING:
    from ebr_engine.media.files import Job
    from ebr_engine.media.holdings import Outcome as HoldingOutcome
    from ebr_engine.media.images import Picture
    from ebr_engine.media.journal import Journal

_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_jobs(
    restorer: Any,
    jobs: "Sequence[Job]",
    recipes: Mapping[str | None, Recipe],
    progress: Progress,
    *,
    journal: "Journal | None" = None,
    skipped: int = 0,
    fail_fast: bool = False,
) -> int:
    """Restore every job by the recipe of its task, telling of each; the number that failed.

    `journal` writes down what is finished; `skipped` files are only counted. The run ends early when the disk is full, and
    with `fail_fast` at the first failure. Ctrl-C finishes what is being written and raises `Interrupted`.
    """
    run = _Run(restorer, recipes, progress, journal)
    started = time.perf_counter()
    try:
        with Interrupts(progress.stopping) as run.interrupts, Behind() as run.writer, closing(ahead(run.read(jobs))) as sources:
            for job, source in sources:
                run.interrupts.check()
                progress.start(job.source.name)
                run.restore(job, source)
                if run.full or (fail_fast and run.failures):
                    break
    except KeyboardInterrupt:
        kept = ", and what is restored of a clip," if any(job.is_clip for job in jobs) else ""
        again = f"the finished ones{kept} are kept: the same command goes on" if journal or kept else "start again"
        raise Interrupted(f"interrupted: {run.done} of {len(jobs)} files are finished; {again}") from None
    progress.summary(run.done, run.failures, skipped, len(jobs) - run.done - len(run.failures), time.perf_counter() - started)
    return len(run.failures)


class _Run:
    """The steps of a job, with what they share."""

    def __init__(self, restorer: Any, recipes: Mapping[str | None, Recipe], progress: Progress, journal: "Journal | None"):
        self.restorer = restorer
        self.recipes = recipes
        self.progress = progress
        self.journal = journal
        self.interrupts: Interrupts
        self.writer: Behind
        self.done = 0
        self.failures: list[Outcome] = []
        self.full = False

    def read(self, jobs: "Sequence[Job]") -> "Iterator[tuple[Job, Any]]":
        """Each job with its picture and how it is committed, or with the error in their place; nothing for a clip."""
        for job in jobs:
            if job.is_clip:
                yield job, None
                continue
            try:
                commit = self._commit(job)
                source = pictures.read(job, self.recipes[job.task]), commit
            except _EXPECTED as error:
                source = error
            yield job, source
            del source

    def restore(self, job: "Job", source: Any) -> None:
        """Restore a job and leave it to the writer; an error that is the file's is told and counted."""
        started = time.perf_counter()
        recipe = self.recipes[job.task]
        try:
            if isinstance(source, Exception):
                raise source
            if job.is_clip:
                self.writer.wait()
                shared = job, recipe, self.progress, self.interrupts, self._commit(job)
                made = self.journal is not None and self.journal.vouches(job.target, job, recipe.settings)
                outcome = compare_only(*shared) if made else restore_clip(self.restorer, *shared)
                self._finished(outcome)
                return
            picture, commit = source
            recipe = settled(recipe, lambda: [picture.pixels])
            restored = pictures.restore(self.restorer, picture, recipe, self._step)
        except _EXPECTED as error:
            self.writer.wait()
            self._failed(job, error)
            return
        self.writer.call(partial(self._write, job, picture, restored, recipe, commit, started))

    def _write(self, job: "Job", picture: "Picture", restored: "Picture", recipe: Recipe, commit: Any, started: float) -> None:
        if self.full:  # found while this one was restored
            return
        try:
            held = pictures.write(pictures.finish(job, picture, restored, recipe), recipe, commit)
        except _EXPECTED as error:
            self._failed(job, error)
            return
        seconds = time.perf_counter() - started
        self._tell_lost(job, held)
        self._finished(Outcome(job, seconds, picture.width, picture.height, picture.bits, note=recipe.note, holdings=tuple(held)))

    def _tell_lost(self, job: "Job", held: "Sequence[HoldingOutcome]") -> None:
        from ebr_engine.media.holdings import not_kept_line

        if line := not_kept_line(held):
            self.progress.error(f"{job.source}: {line}", "warning")

    def _commit(self, job: "Job") -> "Callable[[Path, Path], None] | None":
        return self.journal.commit(job, self.recipes[job.task].settings) if self.journal else None

    def _step(self, index: int, total: int) -> None:
        self.interrupts.check()
        self.progress.step(index, total)

    def _finished(self, outcome: Outcome) -> None:
        self.done += 1
        self.progress.finish(outcome)

    def _failed(self, job: "Job", error: BaseException) -> None:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise error
        line = one_line(error) or type(error).__name__
        outcome = Outcome(job, error=line if str(job.source) in line else f"{job.source}: {line}")
        self.failures.append(outcome)
        self.full = self.full or any(getattr(e, "errno", None) in _FULL for e in (error, error.__cause__))
        self.progress.finish(outcome)


_EXPECTED = (EbrError, OSError, MemoryError, RuntimeError)
