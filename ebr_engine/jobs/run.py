"""The run over all files: each is read, restored, finished and written, and a file that fails does not stop the others.

The next picture is read and the last one is written while one is restored. A run is given a loaded restorer; how it is heard
of is a `Progress`'s matter.
"""

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.errors import EbrError, one_line, out_of_memory
from ebr_engine.jobs import pictures
from ebr_engine.jobs.clips import compare_only, restore_clip
from ebr_engine.jobs.interrupts import Interrupted, Interrupts
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.overlap import Behind, ahead
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import NothingToRepair, Recipe, Recipes
from ebr_engine.jobs.sounds import restore_sound
from ebr_engine.jobs.work import Work, find_work
from ebr_engine.request import LOAD, RUN

if TYPE_CHECKING:
    from ebr_engine.jobs.files import Job
    from ebr_engine.media.picture import Picture
    from ebr_engine.request import RestoreRequest

_FULL = (errno.ENOSPC, errno.EDQUOT)
EXPECTED = (EbrError, OSError, MemoryError, RuntimeError)


def run_work(
    restorer: Any,
    work: Work,
    progress: Progress,
    recipes: Recipes | None = None,
    fail_fast: bool = False,
    kind: "type[Run] | None" = None,
) -> int:
    """Restore every job of a run by the recipe of its request, telling of each; the number that failed.

    What is finished is written down in the run's journal. The run ends early when the disk is full, and with `fail_fast` at the
    first failure. Ctrl-C finishes what is being written and raises `Interrupted`. `kind`: how it is done, here and one by one
    by default. Raises `EbrError` for a request that the backbone cannot meet, before any file is read.
    """
    run = (kind or Run)(restorer, work, recipes or Recipes(restorer, work.digests), progress)
    jobs = work.jobs
    for request in dict.fromkeys(job.request for job in jobs):
        run.recipes.of(request)
        if not request.per_frame and restorer.asks_per_frame and any(job.is_clip for job in jobs if job.request == request):
            name = restorer.backbone.name
            raise EbrError(f"{name} knows no time; add --per-frame to restore a clip frame by frame, or use --backbone wan")
    sizes = dict(sizes_of(jobs))
    restorer.expect(_seen_sizes(run.recipes, sizes))
    progress.expect(len(jobs), partial(_expected_seconds, restorer, run.recipes, sizes))
    started = time.perf_counter()
    try:
        with Interrupts(progress.stopping) as run.interrupts:
            run.all(fail_fast)
    except KeyboardInterrupt:
        kept = ", and what is restored of a clip," if any(job.is_clip for job in jobs) else ""
        again = f"the finished ones{kept} are kept: the same command goes on" if work.journal or kept else "start again"
        raise Interrupted(f"interrupted: {run.done} of {len(jobs)} files are finished; {again}") from None
    left = len(jobs) - run.done - len(run.failures)
    progress.summary(run.done, run.failures, work.skipped, left, time.perf_counter() - started)
    return len(run.failures)


def restore_one(
    restorer: Any,
    source: str | Path,
    target: str | Path,
    request: "RestoreRequest",
    callback: Callable[[float, str], None] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Outcome:
    """Restore one file into another; what became of it. Raises what went wrong, as an `EbrError` where it has no better kind.

    `resume`: a clip's parts are kept while it is not whole, and an earlier call's of the same request and model are used.
    """
    request = request.with_(**{**restorer.loaded.part(LOAD), "backbone": restorer.backbone.name})
    work = find_work([Path(source).expanduser()], str(Path(target).expanduser()), request, overwrite=overwrite, resume=False)
    listener = _One(callback)
    run_work(restorer, work, listener, Recipes(restorer, work.digests, keep_parts=resume))
    if listener.outcome.error:
        raise EbrError(listener.outcome.error)
    return listener.outcome


def sizes_of(jobs: "Sequence[Job]") -> "Iterator[tuple[Job, tuple[int, int]]]":
    """The pictures among the jobs with height and width, of those that say them; only their headers are read."""
    from ebr_engine.media.decoding import MediaError
    from ebr_engine.media.images import size_of_image

    for job in jobs:
        if not (job.is_clip or job.is_sound):
            try:
                yield job, size_of_image(job.source)
            except (MediaError, OSError):  # told when its turn comes
                continue


def _seen_sizes(recipes: Recipes, sizes: "Mapping[Job, tuple[int, int]]") -> "Iterator[tuple[int, int]]":
    """The sizes in which the transformer will see pictures of these sizes."""
    for job, (height, width) in sizes.items():
        plan = recipes.of(job.request).plan
        times = 1 if plan is None else max(stage.supersample for stage in plan.stages_for(height, width))
        yield times * height, times * width


def _expected_seconds(restorer: Any, recipes: Recipes, sizes: "Mapping[Job, tuple[int, int]]") -> float | None:
    """What pictures of these sizes may take; None where that is little, or where each has to be looked at first."""
    made = [(recipes.of(job.request), size) for job, size in sizes.items()]
    if not made or any(recipe.plan is None for recipe, _ in made):
        return None
    return restorer.estimate((recipe.size or size, recipe.plan, recipe.request.part(RUN)) for recipe, size in made)


class Run:
    """The steps of a job, with what they share."""

    def __init__(self, restorer: Any, work: Work, recipes: Recipes, progress: Progress):
        self.restorer, self.work, self.recipes, self.progress = restorer, work, recipes, progress
        self.interrupts: Interrupts
        self.writer: Behind
        self.done = 0
        self.failures: list[Outcome] = []
        self.full = False

    def all(self, fail_fast: bool) -> None:
        """Do every job, the next one read and the last one written meanwhile."""
        with Behind() as self.writer, closing(ahead(self.read())) as sources:
            for job, source in sources:
                self.interrupts.check()
                self.progress.start(job.source.name)
                self.restore(job, source)
                if self.full or (fail_fast and self.failures):
                    break

    def read(self) -> "Iterator[tuple[Job, Any]]":
        """Each job with its picture and how it is committed, or with the error in their place; nothing for a clip or a sound."""
        for job in self.work.jobs:
            if job.is_clip or job.is_sound:
                yield job, None
                continue
            try:
                commit = self._commit(job)
                source = pictures.read(job, self.recipes.of(job.request)), commit
            except EXPECTED as error:
                source = error
            yield job, source
            del source

    def restore(self, job: "Job", source: Any) -> None:
        """Restore a job and leave it to the writer; an error that is the file's is told and counted."""
        started = time.perf_counter()
        recipe = self.recipes.of(job.request)
        self.restorer.begin()
        try:
            if isinstance(source, Exception):
                raise source
            if job.is_clip or job.is_sound:
                self.writer.wait()
                self._finished((self._clip if job.is_clip else self._sound)(job, recipe))
                return
            picture, commit = source
            recipe = self.recipes.seen(recipe, lambda: [picture.pixels])
            restored = pictures.restore(self.restorer, picture, recipe, self._step)
            recipe = self._with_note(recipe)
        except NothingToRepair as error:
            self.writer.wait()
            self._left_out(job, str(error))
            return
        except EXPECTED as error:
            self.writer.wait()
            self._failed(job, error)
            return
        self.writer.call(partial(self._write, job, picture, restored, recipe, commit, started))

    def _clip(self, job: "Job", recipe: Recipe) -> Outcome:
        shared = job, recipe, self.progress, self.interrupts, self._commit(job)
        journal = self.work.journal
        if journal is not None and journal.vouches(job.target, job, recipe.digest):
            return compare_only(*shared)
        outcome = restore_clip(self.restorer, self.recipes, *shared)
        return replace(outcome, note=self._with_note(replace(recipe, note=outcome.note)).note)

    def _sound(self, job: "Job", recipe: Recipe) -> Outcome:
        outcome = restore_sound(self.restorer, job, recipe, self.progress, self.interrupts, self._commit(job))
        return replace(outcome, note=self._with_note(replace(recipe, note=outcome.note)).note)

    def _with_note(self, recipe: Recipe) -> Recipe:
        """The recipe, with a word on a file that had to be run in smaller pieces because memory ran out."""
        smaller = self.restorer.smaller
        return replace(recipe, note=f"{recipe.note}  memory ran out: {smaller}".strip()) if smaller else recipe

    def _write(self, job: "Job", picture: "Picture", restored: "Picture", recipe: Recipe, commit: Any, started: float) -> None:
        from ebr_engine.media.holdings import not_kept_line

        if self.full:  # found while this one was restored
            return
        try:
            held = pictures.write(pictures.finish(job, picture, restored, recipe), recipe, commit)
        except EXPECTED as error:
            self._failed(job, error)
            return
        seconds = time.perf_counter() - started
        if line := not_kept_line(held):
            self.progress.error(f"{job.source}: {line}", "warning")
        sizes = picture.width, picture.height, picture.bits
        self._finished(Outcome(job, seconds, *sizes, note=recipe.note, holdings=tuple(held)))

    def _left_out(self, job: "Job", why: str) -> None:
        """Auto sees nothing to repair: the file is left out or, where that is asked for, copied as it is."""
        copies = job.request.copy_clean and job.source.is_file() and job.source.suffix.lower() == job.target.suffix.lower()
        if copies:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            part = job.target.with_name(f".ebr-{job.target.name}.part")
            shutil.copyfile(job.source, part)
            (self._commit(job) or (lambda part, target: part.replace(target)))(part, job.target)
        self._finished(Outcome(job, skipped=why, copied=copies))

    def _commit(self, job: "Job") -> "Callable[[Path, Path], None] | None":
        journal = self.work.journal
        return journal.commit(job, self.recipes.of(job.request).digest) if journal else None

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


class _One(Progress):
    """Keeps the outcome of a single file."""

    outcome: Outcome

    def __init__(self, callback: Callable[[float, str], None] | None):
        self.callback = callback

    def share(self, part: float, text: str) -> None:
        if self.callback is not None:
            self.callback(part, text)

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def error(self, text: str, kind: str = "error") -> None:
        if kind == "warning":
            from ebr_engine.errors import warn

            warn(text)
