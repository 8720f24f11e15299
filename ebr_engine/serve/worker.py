"""The one thread that holds the model and restores what waits in the store, file by file."""

import logging
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

from ebr_engine.errors import one_line
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.sheet import Sheet, sheet_of_file
from ebr_engine.request import RestoreRequest
from ebr_engine.serve.metrics import Metrics
from ebr_engine.serve.store import CANCELLED, DONE, FAILED, SKIPPED, Store, StoredJob

log = logging.getLogger("ebr_engine.serve")
SHEET_SIDE = 320  # pixels of a picture on a sheet: about what a page shows of it
IDLE = 5.0  # seconds between two looks at what is too old, while nothing comes


class Stopped(KeyboardInterrupt):
    """Asked for between two steps: by a client that cancels, or by the end of the server. It ends a run in good order."""


@dataclass(frozen=True)
class Progress:
    """How far the running job is: `share` from 0 to 1, in words, and the seconds that are left if it goes on like that."""

    share: float = 0.0
    text: str = "starting"
    left: float | None = None


class Worker(threading.Thread):
    """Takes jobs from the store until it is stopped; `restorer` has `restore_file`, as `Restorer` does."""

    def __init__(self, store: Store, restorer: Any, metrics: Metrics):
        super().__init__(name="restorer")
        self.store, self.restorer, self.metrics = store, restorer, metrics
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._job: StoredJob | None = None
        self._cancelled = False
        self._progress = Progress()

    def stop(self) -> None:
        """End after the current step; the job that runs is put back into the queue."""
        self.stopping.set()
        with self.store.arrived:
            self.store.arrived.notify_all()

    def cancel(self, id: str) -> None:
        """Cancel a job at once if it waits, after its current step if it runs; nothing happens to one that is over."""
        if self.store.cancel_queued(id):
            self.metrics.jobs.labels(CANCELLED).inc()
            return
        with self._lock:
            if self._job is not None and self._job.id == id:
                self._cancelled = True

    def progress(self, id: str) -> Progress | None:
        """How far a job is; None for one that does not run."""
        with self._lock:
            return self._progress if self._job is not None and self._job.id == id else None

    def run(self) -> None:
        while not self.stopping.is_set():
            self._prune()
            with self._lock:  # so that `cancel` finds a job either waiting or running
                job = self._job = self.store.claim()
                self._cancelled, self._progress = False, Progress()
            if job is None:
                with self.store.arrived:
                    if not self.stopping.is_set():
                        self.store.arrived.wait(IDLE)
                continue
            self.metrics.seconds.labels("waiting").observe(job.started - job.created)
            try:
                self._restore(job)
            finally:
                with self._lock:
                    self._job = None

    def _prune(self) -> None:
        try:
            self.store.prune()
        except OSError as error:  # old files that cannot be removed now do not keep new ones from being restored
            log.error("the store cannot be tidied: %s", error.strerror)

    def _restore(self, job: StoredJob) -> None:
        began = time.perf_counter()
        warned: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                state, about = self._made(job)
        except KeyboardInterrupt:
            if not self._cancelled:
                self.store.put_back(job)
                return
            self.store.remove_outputs(job)
            state, error, about = CANCELLED, None, {}
        except Exception as problem:  # whatever it is, it is this job's, and the next one is tried
            self.store.remove_outputs(job)
            line = one_line(problem)
            if line is None:
                _log_bug(problem)
            state, error, about = FAILED, self._without_paths(line or "an error inside the server; its log has more", job), {}
        else:
            error, lines = None, [self._without_paths(str(each.message), job) for each in warned]
            about = {**about, "warnings": lines, "has_result": self.store.path(job, job.target).is_file()}
        seconds = time.perf_counter() - began
        self.store.finish(job.id, state, error, about)
        self.metrics.seconds.labels("restoring").observe(seconds)
        self.metrics.jobs.labels(state).inc()
        log.info("job %s: %s after %.2f s", job.id, state, seconds)

    def _made(self, job: StoredJob) -> tuple[str, dict[str, Any]]:
        """Make a job's result: the state that it ends in, and what is told of it."""
        request = RestoreRequest.from_json(job.request)
        paths = self.store.path(job, job.source), self.store.path(job, job.target)
        if job.is_sheet:
            return DONE, _about_sheet(sheet_of_file(self.restorer, *paths, request, SHEET_SIDE, self._heard))
        options = {name: getattr(request, name) for name in job.request}
        outcome = self.restorer.restore_file(*paths, callback=self._heard, resume=True, **options)
        return SKIPPED if outcome.skipped else DONE, _about_file(outcome)

    def _heard(self, share: float, text: str) -> None:
        """A step is done: what the job's watchers are told, and the moment at which it can end."""
        now = time.time()
        with self._lock:
            took = now - (self._job.started or now)
            self._progress = Progress(min(share, 1), text, took * (1 / share - 1) if 0 < share <= 1 else None)
            asked = self._cancelled
        if asked or self.stopping.is_set():
            raise Stopped

    def _without_paths(self, line: str, job: StoredJob) -> str:
        """The client's name of the file in place of the server's."""
        for name in (job.source, job.target):
            line = line.replace(str(self.store.path(job, name)), job.name)
        return line.replace(f"{self.store.files / job.id}/", "")


def _about_file(outcome: Outcome) -> dict[str, Any]:
    """What is told of a file: all that a command tells but the paths, which are the server's own."""
    return {name: value for name, value in outcome.as_json().items() if name not in ("input", "output", "task", "status")}


def _about_sheet(sheet: Sheet) -> dict[str, Any]:
    """What is told of a sheet: its size, what auto sees, and where on it which task is."""
    height, width, _ = sheet.pixels.shape
    probability = sheet.diagnosis.probability
    tiles = [
        {"task": task, "probability": probability.get(task), "chosen": task == sheet.chosen, "place": place}
        for task, place in zip(sheet.tasks, sheet.places)
    ]
    return {"width": width, "height": height, "note": f"auto: {sheet.diagnosis}", "tiles": tiles}


def _log_bug(error: BaseException) -> None:
    """Where an unexpected error came from; not its words, which may hold something of an input."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("unexpected %s\n%s", type(error).__name__, frames)
