"""The run over all files with a fleet: many are restored at once, and this process alone reads inputs and writes results."""

import queue
import secrets
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_engine.cluster.worker import Made
from ebr_engine.jobs.clips import compare_only, restore_clip
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import NothingToRepair
from ebr_engine.jobs.run import EXPECTED, Run

if TYPE_CHECKING:
    from ebr_engine.jobs.files import Job

CLIPS = 4  # at once, each read and encoded in a thread here
LOOK = 0.2  # seconds between two looks at Ctrl-C


class FleetRun(Run):
    """The jobs of a run on a `Fleet`: pictures and sounds whole, clips by chunks that are joined here, in order."""

    def all(self, fail_fast: bool) -> None:
        """Do every job. What is finished is committed as it comes; ends early as `Run.all` does."""
        self.ended: queue.SimpleQueue[tuple[Job, Future, float]] = queue.SimpleQueue()
        self.parts: dict[Job, float] = {}  # how much of each clip is done
        waiting = deque(job for job in self.work.jobs if not job.is_clip)
        clips = [job for job in self.work.jobs if job.is_clip]
        at_once, running = min(CLIPS, max(1, len(clips))), len(clips)
        self.clips = at_once
        with ThreadPoolExecutor(at_once, "clip") as threads:
            try:
                for job in clips:
                    self._await(job, threads.submit(self._clip, job, self.recipes.of(job.request)))
                while waiting or running:
                    while waiting and running < len(clips) + 2 * self.restorer.pool.size + 2:
                        running += self._begin(waiting.popleft())
                    running -= self._next()
                    if self.full or (fail_fast and self.failures):
                        break
            finally:  # threads that wait for chunks are let go
                self.interrupts.asked = self.interrupts.asked or bool(running)
                self.restorer.pool.stop() if running else None
                threads.shutdown(cancel_futures=True)

    def _begin(self, job: "Job") -> int:
        """Give a picture or a sound away; 1, or 0 for one that cannot be read."""
        try:
            commit = self._commit(job)
            future = self.restorer.file(job)
        except EXPECTED as error:
            self._failed(job, error)
            return 0
        future.commit = commit
        self._await(job, future)
        return 1

    def _await(self, job: "Job", future: Future) -> None:
        begun = time.perf_counter()
        future.add_done_callback(lambda future: self.ended.put((job, future, begun)))

    def _next(self) -> int:
        """Wait for a job that ends, and finish it; 0 for none so far."""
        self.interrupts.check()
        self._tell()
        try:
            job, future, begun = self.ended.get(timeout=LOOK)
        except queue.Empty:
            return 0
        self.parts.pop(job, None)
        try:
            result = future.result()
            outcome = self._kept(job, result, future.commit, begun) if isinstance(result, Made) else result
        except NothingToRepair as error:
            self._left_out(job, str(error))
        except EXPECTED as error:
            self._failed(job, error)
        else:
            if outcome.error:
                self.failures.append(outcome)
                self.progress.finish(outcome)
            else:
                self._finished(outcome)
        return 1

    def _kept(self, job: "Job", made: Made, commit: "callable", begun: float) -> Outcome:
        """Write what a worker has made of a file; its outcome as of this machine."""
        for kind, text in made.said:
            self.progress.line(text) if kind == "line" else self.progress.error(text, kind)
        for name, content in made.contents.items():
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".ebr-{secrets.token_hex(6)}.part")
            try:
                part.write_bytes(content)
                (commit or (lambda part, target: part.replace(target)))(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return replace(made.outcome, job=job)

    def _clip(self, job: "Job", recipe) -> Outcome:
        """In a thread of its own."""
        progress, smaller = _Part(self, job), set()
        shared = job, recipe, progress, self.interrupts, self._commit(job)
        journal = self.work.journal
        if journal is not None and journal.vouches(job.target, job, recipe.digest):
            return compare_only(*shared)
        through = partial(self.restorer.chunks, clips=self.clips, smaller=smaller.add)
        outcome = restore_clip(self.restorer, self.recipes, *shared, through=through)
        if seen := sorted(smaller - {""}):
            return replace(outcome, note=f"{outcome.note}  memory ran out: {seen[0]}".strip())
        return outcome

    def _tell(self) -> None:
        workers = self.restorer.pool.ready
        done = self.done + len(self.failures) + sum(self.parts.values())
        self.progress.several(done, f"{workers} worker{'s' * (workers != 1)}")


class _Part(Progress):
    """One clip of several: its share goes into the whole, what is said of it is said."""

    def __init__(self, run: FleetRun, job: "Job"):
        self._run, self._job = run, job

    def share(self, part: float, text: str) -> None:
        self._run.parts[self._job] = min(part, 1)

    def line(self, text: str) -> None:
        self._run.progress.line(text)

    def error(self, text: str, kind: str = "error") -> None:
        self._run.progress.error(text, kind)
