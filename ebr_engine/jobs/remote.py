"""A run whose inputs or outputs lie behind addresses: fetched some at a time, restored here or by a fleet, put back finished.

What is finished is written down beside the outputs, in objects of some lines each below `.ebr-journal/`, before the output is
put there; so a run on any machine goes on where another ended. An output counts when its line agrees with the input (bytes
and time), the settings and its own bytes. Parts of clips lie in this machine's cache until the clip is whole.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ebr_engine import settings
from ebr_engine.errors import EbrError, one_line
from ebr_engine.jobs.files import Job, check_jobs, check_medium, pair_found
from ebr_engine.jobs.interrupts import Interrupted
from ebr_engine.jobs.journal import Journal, Stamp
from ebr_engine.jobs.manifest import read_manifest
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.overlap import ahead
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipes
from ebr_engine.jobs.run import EXPECTED, run_work
from ebr_engine.jobs.storage import Place, Stored
from ebr_engine.jobs.texts import is_address
from ebr_engine.jobs.work import Work, prompts_of
from ebr_engine.media.decoding import MediaError
from ebr_engine.media.kinds import reason_to_leave
from ebr_engine.media.video.folder import names_frames
from ebr_engine.request import RestoreRequest

JOURNAL = ".ebr-journal"
LINES = 1000  # of one object of the journal, which is put anew with every line
FILES, BYTES = 64, 2_000_000_000  # that are fetched at a time


@dataclass(frozen=True)
class Item:
    """A file to restore: where it is, and where its result goes."""

    source: Stored
    target: Place  # a folder, for the file's name below what was named, or
    exact: bool  # the very file
    request: RestoreRequest
    named_task: str | None
    settings: str  # the digest of its request
    named: bool  # by its own name, not found in a folder


class RemoteJournal:
    """What has been finished, in the output's storage."""

    def __init__(self, top: Place) -> None:
        self.top, self.folder = top, top / JOURNAL
        self._name, self._number = f"{time.time_ns()}-{secrets.token_hex(3)}", 0
        self._lines: list[bytes] = []
        self._lock = threading.Lock()
        self.known: dict[str, tuple[Stamp, str, dict[str, int]]] = {}  # source: as it was, settings, outputs and their bytes
        for path in sorted(self.folder.sizes()):
            for line in Place(top.fs, path).read().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    self._learn(json.loads(line))

    def finished(self, item: Item, there: Mapping[str, int]) -> bool:
        """Whether all outputs of an item are there as told, from the same settings and the same input."""
        stamp, made_by, outputs = self.known.get(item.source.address, (None, "", {}))
        wanted = 1 + (item.request.compare is not None)
        same = stamp == item.source.stamp and made_by == item.settings and len(outputs) == wanted
        return same and all(there.get(path) == size for path, size in outputs.items())

    def ours(self, item: Item, place: Place) -> bool:
        """Whether an output was, or was about to be, made from the same settings and the same input."""
        stamp, made_by, outputs = self.known.get(item.source.address, (None, "", {}))
        return place.path in outputs and (stamp, made_by) == (item.source.stamp, item.settings)

    def add(self, item: Item, output: Place, size: int) -> None:
        """Write down an output that is about to be put; from any thread."""
        with self._lock:
            self._add(item, output, size)

    def _add(self, item: Item, output: Place, size: int) -> None:
        stamp = item.source.stamp
        line = {"source": item.source.address, "source_size": stamp.size, "source_time": stamp.time}
        line |= {"settings": item.settings, "output": output.path, "size": size}
        self._learn(line)
        if len(self._lines) == LINES:
            self._lines, self._number = [], self._number + 1
        self._lines.append(json.dumps(line).encode())
        (self.folder / f"{self._name}-{self._number:06}.jsonl").write(b"\n".join(self._lines) + b"\n")

    def _learn(self, line: dict[str, Any]) -> None:
        stamp = Stamp(line["source_size"], line["source_time"])
        before = self.known.get(line["source"])
        outputs = before[2] if before and before[:2] == (stamp, line["settings"]) else {}
        self.known[line["source"]] = stamp, line["settings"], outputs | {line["output"]: line["size"]}


@dataclass
class RemoteWork:
    """What a run has to do, like `work.Work`, and does it batch by batch."""

    items: list[Item]
    digests: Mapping[RestoreRequest, str]
    skipped: int
    journal: RemoteJournal | None
    stage: Path
    there: Mapping[str, int]
    overwrite: bool
    medium: str | None

    def __post_init__(self) -> None:
        self.left_out = None
        self._batches: Iterator[_Batch] | None = None
        self.files_at_once = FILES

    @property
    def files(self) -> int:
        """How many are left to do."""
        return len(self.items)

    def locked(self) -> AbstractContextManager:
        """While entered, no other run on this machine may work on the same output."""
        return Journal(self.stage).locked()

    def first(self) -> list[Job]:
        """The jobs of the first batch, fetched; for what has to know sizes."""
        batches = self._made()
        found = next(batches)
        self._batches = _again(found, batches)
        return found.jobs

    def run(self, restorer: Any, progress: Progress, recipes: Recipes, fail_fast: bool, kind: Any) -> int:
        """Restore everything, as `run_work` does; the number that failed."""
        whole = _Whole(progress, len(self.items))
        started = time.perf_counter()
        try:
            with closing(ahead(self._batches or self._made())) as batches:
                for batch in batches:
                    whole.begin(batch)
                    for outcome in batch.refused:
                        whole.finish(outcome)
                    if batch.jobs and not (fail_fast and whole.failures):
                        work = Work(batch.jobs, self.digests, journal=batch)
                        run_work(restorer, work, whole, recipes, fail_fast, kind)
                    batch.forget()
                    if fail_fast and whole.failures:
                        break
        except KeyboardInterrupt:
            again = "the finished ones are kept: the same command goes on" if self.journal else "start again"
            raise Interrupted(f"interrupted: {whole.done} of {len(self.items)} files are finished; {again}") from None
        finally:
            shutil.rmtree(self.stage / "in", ignore_errors=True)
            if not any((self.stage / "out").rglob("*.parts")):
                shutil.rmtree(self.stage / "out", ignore_errors=True)
        left = len(self.items) - whole.done - len(whole.failures)
        progress.summary(whole.done, whole.failures, self.skipped, left, time.perf_counter() - started)
        return len(whole.failures)

    def _made(self) -> "Iterator[_Batch]":
        waiting: list[Item] = []
        for item in self.items:
            waiting.append(item)
            if len(waiting) >= self.files_at_once or sum(each.source.stamp.size for each in waiting) > BYTES:
                yield _Batch(self, waiting)
                waiting = []
        if waiting:
            yield _Batch(self, waiting)


class _Batch:
    """Some items, fetched and paired; to a run it is the journal of their jobs."""

    def __init__(self, work: RemoteWork, items: Sequence[Item]) -> None:
        self.work, self.jobs, self.refused = work, [], []
        self.items: dict[Path, Item] = {}  # by the source's path here
        self.places: dict[Path, Place] = {}  # of outputs, by their paths here
        for item in items:
            here = work.stage / "in" / Path(item.source.relative)
            self.items[here] = item
            try:
                item.source.place.fetch(here, item.source.stamp)
                if (job := self._job(item, here)) is not None:
                    self.jobs.append(job)
                else:
                    self.refused.append(Outcome(Job(here, here), skipped="no picture, clip or sound that is restored"))
            except EXPECTED as error:
                self.refused.append(Outcome(Job(here, here), error=one_line(error)))

    def _job(self, item: Item, here: Path) -> Job | None:
        if item.named:
            check_medium(here, self.work.medium)
        elif reason_to_leave(here, self.work.medium or "pictures") is not None:
            return None
        name = PurePosixPath(item.target.path).name if item.exact else item.source.relative
        job = pair_found(here, Path(item.source.relative), self.work.stage / "out", item.request.compare is not None)
        if item.exact:
            target = job.target.with_name(name)
            beside = job.compare and target.with_name(f"{target.stem}_compare{job.compare.suffix}")
            job = replace(job, target=target, compare=beside)
        job = replace(job, request=item.request, named_task=item.named_task)
        check_jobs([job], overwrite=True)
        folder = Place(item.target.fs, item.target.path.rsplit("/", 1)[0]) if item.exact else item.target
        for path in job.outputs:
            below = path.name if item.exact else path.relative_to(self.work.stage / "out").as_posix()
            place = self.places[path] = folder / below
            ours = self.work.journal is not None and self.work.journal.ours(item, place)
            if place.path in self.work.there and not (self.work.overwrite or ours):
                raise MediaError(f"{place.address}: exists; replace it with --overwrite")
        return job

    def commit(self, job: Job, digest: str):
        """As `Journal.commit`: what puts the outputs of a job where they belong."""
        item = self.items[job.source]

        def put(part: Path, target: Path) -> None:
            place = self.places[target]
            if self.work.journal is not None:
                self.work.journal.add(item, place, part.stat().st_size)
            place.put(part)
            os.replace(part, target)  # what is made of it next, a comparison, reads it here

        return put

    def vouches(self, path: Path, job: Job, digest: str) -> bool:
        """What is half finished is made anew."""
        return False

    def shown(self, text: str) -> str:
        """A text with addresses in place of paths here."""
        for path, place in (*((path, item.source) for path, item in self.items.items()), *self.places.items()):
            text = text.replace(str(path), place.address)
        return text

    def told(self, outcome: Outcome) -> Outcome:
        """An outcome in the words of addresses."""
        job = outcome.job
        target = self.places[job.target].address if job.target in self.places else ""
        job = replace(job, source=self.items[job.source].source.address, target=target)
        texts = {name: self.shown(text) for name in ("note", "error", "skipped") if (text := getattr(outcome, name))}
        return replace(outcome, job=job, **texts)

    def forget(self) -> None:
        """Delete what was fetched and made here; parts of clips that are not whole stay."""
        for path in (*self.items, *self.places):
            path.unlink(missing_ok=True)


class _Whole(Progress):
    """All batches as one run, in the words of addresses."""

    batch: _Batch

    def __init__(self, progress: Progress, files: int) -> None:
        self._progress, self._files, self.done, self.failures = progress, files, 0, []

    def begin(self, batch: _Batch) -> None:
        """The next batch begins."""
        self.batch, self._before = batch, self.done + len(self.failures)

    def expect(self, files: int, seconds: Any) -> None:
        """How long the first files take says nothing of all."""

    def start(self, name: str) -> None:
        self._progress.start(name)

    def share(self, part: float, text: str) -> None:
        self._progress.share(part, text)

    def several(self, done: float, text: str) -> None:
        self._progress.several(self._before + len(self.batch.refused) + done, text)

    def finish(self, outcome: Outcome) -> None:
        outcome = self.batch.told(outcome)
        if outcome.error:
            self.failures.append(outcome)
        else:
            self.done += 1
        self._progress.finish(outcome)

    def line(self, text: str) -> None:
        self._progress.line(self.batch.shown(text))

    def error(self, text: str, kind: str = "error") -> None:
        self._progress.error(self.batch.shown(text), kind)

    def stopping(self, text: str) -> None:
        self._progress.stopping(text)


def find_remote(
    inputs: Sequence[str], out: str | None, request: RestoreRequest, *, manifest: str | None, overwrite: bool, resume: bool
) -> RemoteWork:
    """Find everything that is asked for, and what of it an earlier run has finished; nothing is fetched but a manifest."""
    from ebr_engine.backbones.registry import medium_of

    if request.as_clip or (out and names_frames(out)):
        raise EbrError("frames that are one clip have to lie on this machine; addresses are for pictures, clips and sounds")
    if out is None:
        raise EbrError("say where to write it: --out, a path or an address such as s3://bucket/folder")
    top = Place.of(out)
    stage = settings.cache_dir() / "staging" / hashlib.sha256(top.address.encode()).hexdigest()[:16]
    stage.mkdir(parents=True, exist_ok=True)
    exact = False
    if manifest is not None:
        items = _listed(manifest, inputs, top, request, stage)
    else:
        if not inputs:
            raise EbrError("nothing to restore: name at least one INPUT, a path or an address")
        found = [(Place.of(text), text) for text in inputs]
        exact = len(found) == 1 and not out.endswith("/") and bool(PurePosixPath(out).suffix) and found[0][0].is_file()
        items = [item for place, _ in found for item in _items(place, top, exact, request, None)]
    digests = {one: one.digest(prompts_of(one)) for one in dict.fromkeys(item.request for item in items)}
    items = [replace(item, settings=digests[item.request]) for item in items]
    folder = Place(top.fs, top.path.rsplit("/", 1)[0]) if exact else top
    there = top.sizes()
    journal = RemoteJournal(folder) if resume and not exact else None
    todo = [item for item in items if not (journal and journal.finished(item, there))]
    _check(todo, there, overwrite, journal)
    medium = None if request.engine else medium_of(request.backbone)
    return RemoteWork(todo, digests, len(items) - len(todo), journal, stage, there, overwrite, medium)


def _items(place: Place, target: Place, exact: bool, request: RestoreRequest, task: str | None) -> list[Item]:
    named = place.is_file()
    return [Item(stored, target, exact, request, task, "", named) for stored in place.files()]


def _listed(manifest: str, inputs: Sequence[str], top: Place, request: RestoreRequest, stage: Path) -> list[Item]:
    """The items of a manifest, whose inputs are addresses, or lie beside it."""
    if inputs:
        raise EbrError(f"{inputs[0]}: name inputs or a --manifest, not both")
    place = Place.of(manifest)
    copy = stage / PurePosixPath(place.path).name
    copy.write_bytes(place.read())
    base = Place(place.fs, place.path.rsplit("/", 1)[0])
    items = []
    for row in read_manifest(copy, request):
        source = Place.of(row.input) if is_address(row.input) or row.input.startswith("/") else base / row.input
        exact = bool(row.output and PurePosixPath(row.output).suffix) and source.is_file()
        if row.output:
            target = Place.of(row.output) if is_address(row.output) else top / row.output.rstrip("/")
        else:
            target = top if is_address(row.input) else top / PurePosixPath(row.input).parent
        items += _items(source, target, exact, row.request, row.task)
    copy.unlink()
    return items


def _check(items: Sequence[Item], there: Mapping[str, int], overwrite: bool, journal: RemoteJournal | None) -> None:
    """MediaError for two inputs with one output, an output that is an input, and one that exists, by the inputs' own names."""
    sources = {item.source.address for item in items}
    writers: dict[str, str] = {}
    for item in items:
        place = item.target if item.exact else item.target / item.source.relative
        first = writers.setdefault(place.address, item.source.address)
        if first != item.source.address:
            raise MediaError(f"{first} and {item.source.address} would both be written to {place.address}")
        if place.address in sources:
            raise MediaError(f"{place.address}: is an input; it is never overwritten, choose another output")
        if place.path in there and not (overwrite or (journal and journal.ours(item, place))):
            known = journal and item.source.address in journal.known
            how = ", made with other settings or from an input that has changed" if known else ""
            raise MediaError(f"{place.address}: exists{how}; replace it with --overwrite")


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
