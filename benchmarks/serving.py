"""The server under load: latency of many requests at once, its memory, what a kill in the middle loses, and what batching gains.

    python -m benchmarks.serving [--requests 200] [--at-once 20] [--size 128] [--batch-size 64 256] [--json FILE]

Starts `ebr-engine serve` with mini on this machine, one step a picture. First all pictures are sent, so many at once, each client
waiting for its result before it sends the next. Then they are sent to a new server, with five steps, which is killed when it has
accepted half of them, while others come in; started anew, and killed again when a quarter of what it had accepted is done; and
started once more: every job that was accepted has to end, with the bytes of an undisturbed run.

Last, without a server: pictures that wait, eight at once by `restore_batch` beside one by one, in interleaved rounds, by the
clock and by the time that this process got of the processor, which tells more where others want it too; and how many of them
come out with the same bits.
"""

import argparse
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import ROOT, Benchmark, columns

QUICK, LONGER = '{"task": "haze", "steps": 1}', '{"task": "haze", "steps": 5}'  # the second, so that a kill finds a queue
PICTURES = 8  # different ones, sent in turn
TOGETHER = 8  # in a batch
LONGEST = 600  # seconds that anything may take


def main(arguments: Sequence[str] | None = None) -> None:
    report.main("serving", __doc__, Benchmark(_options, measure, table), arguments)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=20, help="clients")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[64, 256], help="sides of pictures that are restored together"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of restoring together and one by one")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, then a kill in the middle, then batches."""
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = _pictures(folder, options.size)
        load = _load(folder / "load", pictures, options)
        kill = _kill(folder / "kill", pictures, options)
    batches = [row for side in options.batch_size for row in _batches(side, options.rounds)]
    return {"options": vars_of(options), "processes_before": busy, "load": load, "kill": kill, "batches": batches}


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("requests", "at_once", "size", "batch_size", "rounds")}


def _load(store: Path, pictures: list[bytes], options: argparse.Namespace) -> dict[str, Any]:
    with serving(store, options.requests) as (client, process):
        run(client, pictures[0])  # the first one makes the plan
        begun_with = memory(process.pid)
        digests: dict[int, str] = {}

        def one(number: int) -> float:
            started = time.perf_counter()
            digest = run(client, pictures[number % PICTURES])
            digests.setdefault(number % PICTURES, digest)
            if digest != digests[number % PICTURES]:
                raise SystemExit("error: one picture gave two results")
            return time.perf_counter() - started

        started = time.perf_counter()
        with ThreadPoolExecutor(options.at_once) as pool:
            taken = list(pool.map(one, range(options.requests)))
        seconds = time.perf_counter() - started
        p50, p95 = np.percentile(taken, (50, 95)).tolist()
        grown = memory(process.pid) - begun_with
    return {
        "seconds": seconds,
        "per_second": options.requests / seconds,
        "p50": p50,
        "p95": p95,
        "done": len(taken),
        "memory_mib": begun_with,
        "memory_grown_mib": grown,
    }


def _kill(store: Path, pictures: list[bytes], options: argparse.Namespace) -> dict[str, Any]:
    import httpx

    accepted: dict[str, int] = {}  # id → number of its picture

    with serving(store, options.requests) as (client, process):
        digests = [run(client, picture, LONGER) for picture in pictures]

        def one(number: int) -> None:
            try:
                accepted[send(client, pictures[number % PICTURES], LONGER)] = number % PICTURES
            except httpx.TransportError:  # it is not there any more
                return
            if len(accepted) == options.requests // 2:
                process.kill()

        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(one, range(options.requests)))
        process.wait()
    with serving(store, options.requests) as (client, process):
        until(lambda: finished(client, accepted) >= len(accepted) // 4)
        process.kill()
        process.wait()
    with serving(store, options.requests) as (client, _):
        before = finished(client, accepted)
        if before >= len(accepted):
            raise SystemExit("error: no job was waiting at the kill; more --requests, or larger ones, take longer")
        until(lambda: finished(client, accepted) >= len(accepted))
        same = sum(fetch(client, id) == digests[number] for id, number in accepted.items())
    return {"accepted": len(accepted), "done_at_second_kill": before, "done_with_the_same_bytes": same}


def _batches(side: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a picture, one by one and eight at once, in each precision."""
    from ebr_engine import Restorer

    pictures = [np.random.default_rng(number).random((side, side, 3), dtype=np.float32) for number in range(TOGETHER)]
    forms, taken, made = {}, {}, {}
    for precision in ("fp32", "bf16"):
        restorer = Restorer("mini", precision=precision, compile="off")
        plan = restorer.plan("haze")
        for at_once in (1, TOGETHER):
            forms[precision, at_once] = partial(restorer.restore_batch, pictures, plan=plan, at_once=at_once)
            made[precision, at_once] = forms[precision, at_once]()
            taken[precision, at_once] = []
    for _ in range(rounds):
        for form, run_form in forms.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run_form()
            taken[form].append(((time.perf_counter() - clock) / TOGETHER, (time.process_time() - cpu) / TOGETHER))
    medians = {form: np.median(values, axis=0).tolist() for form, values in taken.items()}
    return [
        {
            "side": side,
            "precision": precision,
            "at_once": TOGETHER,
            **{f"{name}_one_by_one": medians[precision, 1][i] for i, name in enumerate(("seconds", "cpu_seconds"))},
            **{f"{name}_together": medians[precision, TOGETHER][i] for i, name in enumerate(("seconds", "cpu_seconds"))},
            "same_bits": sum(map(np.array_equal, made[precision, 1], made[precision, TOGETHER])),
        }
        for precision in ("fp32", "bf16")
    ]


@contextmanager
def serving(store: Path, queue: int) -> Iterator[tuple[Any, subprocess.Popen]]:
    """A client of a server of its own, and the server's process, which is ended at the end."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ebr_engine", "serve", "--port", str(port), "--store", str(store), "--queue", str(queue + 1)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LONGEST) as client:

            def up() -> bool:
                if process.poll() is not None:
                    raise SystemExit("error: the server has ended; try: ebr-engine serve")
                try:
                    return client.get("/healthz").status_code == 200
                except httpx.TransportError:
                    return False

            until(up)
            yield client, process
    finally:
        process.terminate()
        process.wait(60)


def send(client: Any, content: bytes, request: str = QUICK) -> str:
    answer = client.post("/v1/restorations", files={"files": ("a.png", content)}, data={"request": request})
    answer.raise_for_status()
    return answer.json()["data"][0]["id"]


def run(client: Any, content: bytes, request: str = QUICK) -> str:
    """Send a picture, wait, and fetch its result's digest."""
    id = send(client, content, request)
    with client.stream("GET", f"/v1/restorations/{id}/events") as events:
        for _ in events.iter_lines():
            pass
    return fetch(client, id)


def fetch(client: Any, id: str) -> str:
    return hashlib.sha256(client.get(f"/v1/restorations/{id}/result").raise_for_status().content).hexdigest()


def finished(client: Any, ids: Collection[str]) -> int:
    """How many of these jobs are done; a kill may also leave one that was accepted without its client's hearing of it."""
    jobs = client.get("/v1/restorations", params={"limit": 1000}).json()["data"]
    return sum(job["id"] in ids and job["status"] == "done" for job in jobs)


def until(met: Any) -> None:
    end = time.monotonic() + LONGEST
    while not met():
        if time.monotonic() > end:
            raise SystemExit(f"error: it did not come about within {LONGEST} s")
        threading.Event().wait(0.1)


def memory(process: int) -> float:
    """MiB that a process holds, by Linux."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _pictures(folder: Path, size: int) -> list[bytes]:
    from ebr_engine.media.images import Picture, write_image

    made = []
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).random((size // 8, size // 8, 3), dtype=np.float32).repeat(8, 0).repeat(8, 1)
        write_image(folder / f"{number}.png", Picture(pixels))
        made.append((folder / f"{number}.png").read_bytes())
    return made


def table(result: dict[str, Any]) -> str:
    load, kill, options = result["load"], result["kill"], result["options"]
    rows = [
        ["requests done", f"{load['done']} of {options['requests']}, {options['at_once']} at once"],
        ["p50, p95", f"{load['p50']:.2f} s, {load['p95']:.2f} s"],
        ["pictures a second", f"{load['per_second']:.2f}"],
        ["memory, grown by", f"{load['memory_mib']:.0f} MiB, {load['memory_grown_mib']:+.0f} MiB"],
        ["killed while sending, and after", f"{kill['done_at_second_kill']} of {kill['accepted']}"],
        ["the same bytes at last", f"{kill['done_with_the_same_bytes']} of {kill['accepted']}"],
        ["other processes at the start", f"{result['processes_before']:.1f}"],
    ]
    for one in result["batches"]:
        by_clock, by_cpu = (one[f"{name}_one_by_one"] / one[f"{name}_together"] for name in ("seconds", "cpu_seconds"))
        name = f"{one['at_once']} together, {one['side']} x {one['side']}, {one['precision']}"
        same = f"{one['same_bits']} of {one['at_once']} with the same bits"
        rows.append([name, f"{by_clock:.2f} times as fast by the clock, {by_cpu:.2f} by CPU time, {same}"])
    return columns([f"mini, {options['size']} x {options['size']}, one step", ""], rows)


if __name__ == "__main__":
    main()
