"""What a fleet gains, and what Ray costs: pictures restored by `restore`, and by one and two workers of one core each.

    python -m benchmarks.fleet [--pictures 40] [--size 256] [--rounds 3] [--json FILE]

All run `ebr-engine restore`'s own code on a folder of PNG files, mini in float32, uncompiled, one thread, file to file. Models
are loaded, workers ready and warm before the clock runs; what the start takes is told apart. What computes, of each worker and
of `plain`, is bound to a core of its own; driver and Ray have no core to themselves: on a machine of two they take what they need
from the workers. The three ways take turns. Beside the clock stands the processor's time of driver and workers, which tells more
where others want the machine too; what Ray's own processes took of it stands beside it. Workers have the driver's
priority, not Ray's lower one (nice 15), which would leave them behind `plain` wherever the machine has other work.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import Benchmark, columns, spread
from ebr_engine.cluster.connect import Share, needed_ray
from ebr_engine.cluster.fleet import Fleet
from ebr_engine.cluster.run import FleetRun
from ebr_engine.cluster.worker import RestoreWorker
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipes
from ebr_engine.jobs.run import Run, run_work
from ebr_engine.jobs.work import Work, find_work
from ebr_engine.request import RestoreRequest

WAYS = ("plain", "1 worker", "2 workers")
TICKS = os.sysconf("SC_CLK_TCK")


class Bound(RestoreWorker):
    """A worker that is bound to the first core that no other of `folder` has taken."""

    def __init__(self, folder: Path, *arguments: Any) -> None:
        super().__init__(*arguments)
        for core in sorted(os.sched_getaffinity(0)):
            try:
                (folder / str(core)).touch(exist_ok=False)
            except FileExistsError:
                continue
            self._run(os.sched_setaffinity, 0, {core})  # the thread that computes; files are read and written in others
            break

    def cpu(self) -> tuple[int, float]:
        """This process, and the processor's time that it has had."""
        return os.getpid(), time.process_time()


def main(arguments: Sequence[str] | None = None) -> None:
    report.main("fleet", __doc__, Benchmark(_options, measure, table), arguments)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures")
    parser.add_argument("--rounds", type=int, default=3, help="in which the ways take turns")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a folder of pictures, by the clock and of the processor."""
    import torch

    from ebr_engine.engine.restorer import Restorer

    torch.set_num_threads(1)
    busy = os.getloadavg()[0]
    request = RestoreRequest(task="haze", device="cpu", precision="fp32", compile="off")
    taken: dict[str, dict[str, list[float]]] = {way: {"seconds": [], "cpu_seconds": [], "ray_seconds": []} for way in WAYS}
    starts = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        pictures(folder / "in", options.pictures, options.size)
        pictures(folder / "warm", 4, options.size)
        begun = time.perf_counter()
        restorers: dict[str, Any] = {"plain": Restorer.from_request(request)}
        starts["plain"] = time.perf_counter() - begun
        begun = time.perf_counter()
        ray = needed_ray()
        how = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address="local", num_cpus=3, _system_config={"worker_niceness": os.nice(0)}, **how)
        stack.callback(ray.shutdown)
        starts["Ray"] = time.perf_counter() - begun
        jobs = find_work([folder / "warm"], f"{folder}/none", request, resume=False).jobs
        for count, way in enumerate(WAYS[1:], 1):
            begun = time.perf_counter()
            restorers[way] = stack.enter_context(_fleet(folder / way.replace(" ", ""), request, jobs, count))
            starts[way] = time.perf_counter() - begun
        for index in range(-1, options.rounds):
            for way in WAYS:
                work = find_work([folder / ("in" if index >= 0 else "warm")], str(folder / f"{way}{index}"), request)
                took = _timed(restorers[way], work, way)
                for key, value in took.items() if index >= 0 else ():
                    taken[way][key].append(value)
        made = [sorted((folder / f"{way}0").glob("*.png")) for way in WAYS]
        same = all(len({file.read_bytes() for file in files}) == 1 for files in zip(*made))
    plain = taken["plain"]
    ways = {way: {name: spread(values) for name, values in found.items()} for way, found in taken.items()}
    gains = {
        way: {
            "throughput": spread([a / b for a, b in zip(plain["seconds"], found["seconds"])]),
            "cpu": spread([b / a for a, b in zip(plain["cpu_seconds"], found["cpu_seconds"])]),
        }
        for way, found in taken.items()
    }
    gains["2 workers"]["of one worker"] = spread(
        [a / b for a, b in zip(taken["1 worker"]["seconds"], taken["2 workers"]["seconds"])]
    )
    asked = {"pictures": options.pictures, "size": options.size, "rounds": options.rounds}
    return {"options": asked, "processes_before": busy, "starts": starts, "ways": ways, "gains": gains, "same_bytes": same}


def pictures(folder: Path, count: int, size: int) -> None:
    """PNG files of smooth noise."""
    from ebr_engine.media.images import resize_picture, write_image
    from ebr_engine.media.picture import Picture

    folder.mkdir()
    for index in range(count):
        small = np.random.default_rng(index).random((size // 8, size // 8, 3), dtype=np.float32)
        write_image(folder / f"{index:03}.png", resize_picture(Picture(small), size, size))


@contextmanager
def _fleet(folder: Path, request: RestoreRequest, jobs: list, count: int) -> Iterator[Fleet]:
    folder.mkdir()
    kind = type("BoundFleet", (Fleet,), {"worker": staticmethod(partial(Bound, folder))})
    with kind(request, [], jobs, Share(), count) as fleet:
        while fleet.pool.ready < count:
            time.sleep(0.05)
        yield fleet


def _timed(restorer: Any, work: Work, way: str) -> dict[str, float]:
    """What one run takes."""
    kind, cores = (Run, 1) if way == "plain" else (FleetRun, None)
    workers = (lambda: 0.0) if way == "plain" else (lambda: _workers(restorer))
    own = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, {min(own)})
    try:
        before, ray_before, driver = workers(), _ray(), time.process_time()
        begun = time.perf_counter()
        failed = run_work(restorer, work, Progress(), Recipes(restorer, work.digests), kind=kind)
        seconds = time.perf_counter() - begun
        cpu = time.process_time() - driver + workers() - before
    finally:
        os.sched_setaffinity(0, own)
    assert not failed
    return {"seconds": seconds, "cpu_seconds": cpu, "ray_seconds": _ray() - ray_before}


def _workers(fleet: Fleet) -> float:
    """The processor's time of all workers; asked of each, however calls fall."""
    found: dict[int, float] = {}
    while len(found) < fleet.pool.ready:
        found |= dict(call.result() for call in [fleet.pool.submit("cpu") for _ in range(2 * fleet.pool.ready)])
    return sum(found.values())


def _ray() -> float:
    """The processor's time of Ray's own processes (its control store, its node's manager and agents)."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if name in ("gcs_server", "raylet"):
            total += sum(map(int, rest.split()[11:13])) / TICKS
    return total


def table(result: dict[str, Any]) -> str:
    """Seconds, pictures a second, and what is gained."""
    rows: list[Sequence[str]] = []
    for way, found in result["ways"].items():
        gain, count = result["gains"][way], result["options"]["pictures"]
        seconds = found["seconds"]["median"]
        rows.append(
            (
                way,
                f"{seconds:.2f}",
                f"{count / seconds:.2f}",
                f"{gain['throughput']['median']:.3f}",
                f"{found['cpu_seconds']['median']:.2f}",
                f"{gain['cpu']['median']:.3f}",
                f"{found['ray_seconds']['median']:.2f}",
            )
        )
    head = ("way", "seconds", "pictures/s", "times plain", "cpu seconds", "of plain's", "Ray's own")
    started = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["starts"].items())
    same = "the same bytes in all" if result["same_bytes"] else "NOT the same bytes"
    return "\n".join([columns(head, rows), f"start: {started}; {same}; load before: {result['processes_before']:.1f}"])


if __name__ == "__main__":
    main()
