"""Measuring many files: restored now or given, in one process or several, resumable, a row a file.

Beside the result, two other ways are measured: the input as it is, and where files are restored now the frozen transformer with
the empty prompt, from the same start by the same steps. Without them a score says nothing of what a prompt gained.
"""

import json
import math
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebr_engine.engine.plan import Plan
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import EbrError
from ebr_engine.evaluation.metrics import METRICS, Score, make_scores
from ebr_engine.evaluation.paired import Item, Media
from ebr_engine.evaluation.protocols import Protocol, as_frame, protocol_for
from ebr_engine.evaluation.statistics import EMPTY, INPUT, RESTORED
from ebr_engine.prompts.catalogue import find_prompts, with_fine
from ebr_engine.request import PLAN, RUN, RestoreRequest

# name, stamp, frames, height, width, scores {metric: value}, beside {way: scores}, with several seeds by_seed {seed: scores};
# or name and error
Row = dict[str, Any]


@dataclass(frozen=True)
class Restoring:
    """How files are restored that have no result yet: a request, by each of several seeds."""

    request: RestoreRequest
    seeds: tuple[int, ...] = (42,)

    def load(self, device: str) -> tuple[Restorer, Plan]:
        """The restorer and its plan; `EbrError` for anything that does not fit."""
        restorer = Restorer.from_request(self.request.with_(device=device))
        return restorer, self.plan(restorer)

    def plan(self, restorer: Restorer, **other: Any) -> Plan:
        """The request's plan, with `other` fields; at strength 0 it is the frozen transformer's own, from the same start."""
        return restorer.plan(**(self.request.part(PLAN) | other))


@dataclass(frozen=True)
class Settings:
    """Everything that a row depends on but its files."""

    protocol: str
    metrics: tuple[str, ...]
    restoring: Restoring | None = None  # None: every item has its result already
    backbone: str | None = None  # of the released protocol's size; None: by the kind of file
    weights_dir: str | None = None  # folder of the metrics' weights
    empty: bool = True  # measure the empty prompt too

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        how = self.restoring and {"request": self.restoring.request.to_json(), "seeds": self.restoring.seeds}
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"restoring": how}

    def protocol_of(self, item: Item) -> Protocol:
        """The protocol for an item's kind of file."""
        return protocol_for(self.protocol, self.backbone, (item.source or item.restored).clip)


class Measurer:
    """Measures one item after another: the metrics' networks and the restorer are loaded once."""

    def __init__(self, settings: Settings, device: str):
        self.settings, restoring = settings, settings.restoring
        self.restorer, plan = restoring.load(device) if restoring else (None, None)
        self.plans = {RESTORED: plan}
        if restoring and settings.empty and not restoring.request.engine:  # whose tables are its prompt's
            self.plans[EMPTY] = restoring.plan(self.restorer, strength=0.0)
        where = self.restorer.device if self.restorer else "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
        on_luma = settings.protocol == "y-channel"
        self.scores = make_scores(settings.metrics, where, on_luma, settings.weights_dir)

    def measure(self, item: Item) -> Row:
        """The row of an item; a clip's scores are means over its frames, and all are means over the seeds.

        Without a target there are only those that need none. Raises `EbrError` naming the file for what cannot be read or
        compared.
        """
        protocol = self.settings.protocol_of(item)
        wanted = {name: score for name, score in self.scores.items() if _possible(name, item)}
        if not wanted:
            return {"name": item.name, "frames": None, "height": None, "width": None, "scores": {}}
        by_seed = self._by_seed(item, protocol, wanted, RESTORED)
        count, size, _ = by_seed[0]
        row = {"name": item.name, "frames": count, "height": size[0], "width": size[1], "scores": _mean(by_seed)}
        if len(by_seed) > 1:
            row["by_seed"] = {str(seed): scores for seed, (*_, scores) in zip(self.settings.restoring.seeds, by_seed)}
        return row | {"beside": self._beside(item, protocol, wanted)}

    def _beside(self, item: Item, protocol: Protocol, wanted: dict[str, Score]) -> dict[str, dict[str, float]]:
        """Scores of the other ways; without the input's where results are given and it cannot be compared with their target."""
        beside = {}
        if item.source is not None:
            try:
                beside[INPUT] = self._scored(item, protocol, wanted, _prepared(item.source, protocol))[2]
            except EbrError:
                if item.restored is None:
                    raise
        if EMPTY in self.plans and item.restored is None:
            beside[EMPTY] = _mean(self._by_seed(item, protocol, wanted, EMPTY))
        return beside

    def _by_seed(self, item: Item, protocol: Protocol, wanted: dict[str, Score], way: str) -> list[tuple]:
        seeds = self.settings.restoring.seeds if item.restored is None else (0,)
        return [self._scored(item, protocol, wanted, self._results(item, protocol, way, seed)) for seed in seeds]

    def _scored(
        self, item: Item, protocol: Protocol, wanted: dict[str, Score], results: Iterable[Tensor]
    ) -> tuple[int, tuple[int, int], dict[str, float]]:
        """How many frames, of which size, and their mean scores."""
        sums, count, size = dict.fromkeys(wanted, 0.0), 0, (0, 0)
        for result, target in _pairs(item, protocol, results):
            result, target = protocol.compared(result), None if target is None else protocol.compared(target)
            for name, score in wanted.items():
                sums[name] += score(result, target) if METRICS[name].needs_target else score(result)
            count, size = count + 1, tuple(result.shape[-2:])
        return count, size, {name: total / count for name, total in sums.items()}

    def first_frames(self, item: Item) -> dict[str, Tensor]:
        """The first frame [3, H, W] of input, results by way, and target, as they are compared."""
        protocol, seed = self.settings.protocol_of(item), self.settings.restoring.seeds[0] if self.settings.restoring else 0
        frames = {INPUT: _prepared(item.source, protocol)} if item.source else {}
        ways = [way for way in (EMPTY, RESTORED) if way in self.plans and (way == RESTORED or item.restored is None)]
        frames |= {way: self._results(item, protocol, way, seed) for way in ways}
        frames |= {"target": _prepared(item.target, protocol)} if item.target else {}
        return {name: protocol.compared(next(iter(found)))[0] for name, found in frames.items()}

    def _results(self, item: Item, protocol: Protocol, way: str, seed: int) -> Iterator[Tensor]:
        if item.restored is None:
            yield from self._restored(item.source, protocol, self.plans[way], seed)
            return
        reference = item.target or item.source
        native = None if reference is None else next(reference.frames(1)).shape[:2]
        for pixels in item.restored.frames(protocol.frames):
            frame = as_frame(pixels)
            yield protocol.result(frame, native or tuple(frame.shape[-2:]), str(item.restored))

    def _restored(self, source: Media, protocol: Protocol, plan: Plan, seed: int) -> Iterator[Tensor]:
        from ebr_engine.media.chunking import chunked, cross_fade
        from ebr_engine.media.video.info import Frame

        request = self.settings.restoring.request
        how = request.part(RUN) | {"seed": seed}
        peak = 2 ** (_bits(source) if protocol.size is None else 8) - 1

        def run(clip: Tensor, first: int = 0) -> Tensor:  # [1, 3, F, H, W], or a picture [1, 3, H, W]
            restored = self.restorer.run(clip, plan, first=first, **how)
            return (restored * peak).round() / peak if protocol.rounded else restored

        frames = _prepared(source, protocol)
        if not source.clip:
            yield from (run(frame) for frame in frames)
            return
        if protocol.frames is not None:  # all of them in one run, as the released code does
            yield from run(torch.cat(list(frames)).movedim(0, 1)[None])[0].movedim(1, 0).split(1)
            return
        length, overlap = self.restorer.chunk_size(None, None, plan=plan, **how)
        stream = (Frame(frame[0].permute(1, 2, 0).numpy(), i, Fraction(1, 24)) for i, frame in enumerate(frames))
        chunks = chunked(stream, length, overlap, self.restorer.codec.frames)
        pixels = ((chunk, torch.from_numpy(chunk.pixels).movedim(-1, 0)[None]) for chunk in chunks)
        for frame in cross_fade((chunk, run(clip, chunk.start)[0].movedim(0, -1).numpy()) for chunk, clip in pixels):
            yield as_frame(frame.pixels)


def _prepared(media: Media, protocol: Protocol) -> Iterator[Tensor]:
    return (protocol.prepared(as_frame(pixels)) for pixels in media.frames(protocol.frames))


def _mean(runs: Sequence[tuple[int, tuple[int, int], dict[str, float]]]) -> dict[str, float]:
    """Mean scores over runs."""
    return {name: math.fsum(scores[name] for *_, scores in runs) / len(runs) for name in runs[0][2]}


def _possible(name: str, item: Item) -> bool:
    return item.target is not None or not METRICS[name].needs_target


def _pairs(item: Item, protocol: Protocol, results: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
    if item.target is None:
        yield from ((result, None) for result in results)
        return
    targets = _prepared(item.target, protocol)
    for number, (result, target) in enumerate(zip_longest(results, targets), 1):
        if result is None or target is None:
            shorter = item.target if target is None else item.restored or item.source
            raise EbrError(f"{shorter}: has {number - 1} frame(s), fewer than what it is compared with")
        if result.shape != target.shape:
            found, wanted = (f"{x.shape[-1]} x {x.shape[-2]}" for x in (target, result))
            raise EbrError(f"{item.target}: has {found} pixels, not {wanted} as {item.restored or item.source}")
        yield result, target


def _bits(media: Media) -> int:
    if not media.listed:
        from ebr_engine.media.video import open_video

        with open_video(media.paths[0], frames=1) as reader:
            return reader.info.bits
    from ebr_engine.media.images import read_image

    return read_image(media.paths[0]).bits


def evaluate(
    items: Sequence[Item],
    settings: Settings,
    out: Path,
    *,
    device: str = "auto",
    workers: int = 1,
    resume: bool = True,
    callback: Callable[[Row], None] | None = None,
    measurer: Callable[[], Measurer] | None = None,
    elsewhere: Callable[[Sequence[Item]], Iterator[Row]] | None = None,
) -> list[Row]:
    """Measure every item: rows in the items' order, kept in `out`/rows.jsonl as they come, so that a run can go on.

    A file that cannot be measured gives a row with `error` in place of scores, which a resumed run tries again. Rows do not
    depend on `workers`, but for rounding. `callback(row)` after each that is new. `measurer`: makes the measurer of a single
    process, so that it can be used again. `elsewhere`: measures in place of processes here. Raises `EbrError` for a model or
    a library that is missing, and where `out` holds rows of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamps = {item.name: item.stamp() for item in items}
    key = json.loads(json.dumps({**settings.to_json(), "files": _model_stamps(settings.restoring)}))
    known = _read_rows(out / "rows.jsonl", key) if resume else {}
    done = {name: row for name, row in known.items() if row["stamp"] == json.loads(json.dumps(stamps.get(name)))}
    with (out / "rows.jsonl").open("w") as journal:
        for line in ({"settings": key}, *done.values()):
            print(json.dumps(line), file=journal, flush=True)
        todo = [item for item in items if item.name not in done]
        make = measurer or (lambda: Measurer(settings, device))
        here = partial(_rows, settings=settings, device=device, workers=min(workers, len(todo)), make=make)
        for row in (elsewhere or here)(todo):
            if "error" not in row:
                print(json.dumps(row | {"stamp": stamps[row["name"]]}), file=journal, flush=True)
            done[row["name"]] = row
            if callback is not None:
                callback(row)
    return [{name: value for name, value in done[item.name].items() if name != "stamp"} for item in items]


def _model_stamps(restoring: Restoring | None) -> list:
    """Path and time of change of the files that a restoration depends on besides its input."""
    if restoring is None:
        return []
    request = restoring.request
    paths = [request.model, request.engine, request.context, *(path for path, _ in request.prompt)]
    if request.task:
        paths += [path for path, _ in with_fine(find_prompts(request.backbone, request.task))]
    return [(str(path), Path(path).stat().st_mtime_ns) for path in paths if path and Path(path).is_file()]


def _read_rows(path: Path, key: dict) -> dict[str, Row]:
    if not path.exists():
        return {}
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the line that an interrupted run was writing
    first = lines[0].get("settings", {}) if lines else key
    if other := [name for name in key if first.get(name) != key[name]]:
        raise EbrError(f"{path.parent} holds scores of other settings ({', '.join(other)}); use another --out, or --no-resume")
    return {row["name"]: row for row in lines[1:]}


def _rows(items: Sequence[Item], settings: Settings, device: str, workers: int, make: Callable[[], Measurer]) -> Iterator[Row]:
    if workers <= 1:
        measurer = make() if items else None
        yield from (row_of(measurer, item) for item in items)
        return
    context = torch.multiprocessing.get_context("spawn")
    tasks, rows = context.Queue(), context.Queue()
    for task in (*items, *[None] * workers):
        tasks.put(task)
    threads = max(1, torch.get_num_threads() // workers)
    processes = [
        context.Process(target=_work, args=(tasks, rows, settings, device, threads), daemon=True) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        for _ in items:
            row = _next_row(rows, processes)
            if "fatal" in row:
                raise EbrError(row["fatal"])
            yield row
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _next_row(rows: Any, processes: Sequence[Any]) -> Row:
    while True:
        dead = [process for process in processes if process.exitcode]
        try:
            return rows.get(timeout=1.0)
        except queue.Empty:
            if dead:
                raise RuntimeError(f"a measuring process ended with exit code {dead[0].exitcode}") from None


def _work(tasks: Any, rows: Any, settings: Settings, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        measurer = Measurer(settings, device)
    except EbrError as error:
        rows.put({"fatal": str(error)})
        return
    while (item := tasks.get()) is not None:
        rows.put(row_of(measurer, item))


def row_of(measurer: Measurer, item: Item) -> Row:
    """The row of an item, or its error."""
    started = time.perf_counter()
    try:
        return measurer.measure(item) | {"seconds": round(time.perf_counter() - started, 2)}
    except (EbrError, OSError) as error:
        return {"name": item.name, "error": " ".join(str(error).split())}


def means(rows: Iterable[Row], metrics: Iterable[str]) -> dict[str, dict[str, float]]:
    """Mean over files, and over how many: {metric: {mean, files}}, without metrics that no file has."""
    values = {name: [row["scores"][name] for row in rows if name in row.get("scores", {})] for name in metrics}
    return {name: {"mean": math.fsum(found) / len(found), "files": len(found)} for name, found in values.items() if found}
