"""How threads that wait for each other share a machine: one restoration idle, and beside busy processes on every core.

A process for each way to wait stays loaded, and restores in turn with the others, so that whatever the machine does meets all
alike. Beside n busy processes a core, fair sharing gives n + 1 times the idle time; what is told is the time over that. On a
machine that others use, run it at a priority above theirs (`nice -n -10`), which its own busy processes have too.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from typing import Any

from benchmarks.report import ROOT, columns, spread

WORKER = "import sys; from benchmarks.waiting import restore_in_turns; restore_in_turns(*sys.argv[1:])"
BUSY = [sys.executable, "-c", "while True: pass"]
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LIBRARY = "as the library does"


def restore_in_turns(size: str, task: str) -> None:
    """A worker: for every line that comes in, restore once and print the seconds, by the clock and of all threads."""
    import time

    import torch

    from benchmarks import clock
    from ebr_engine import Restorer

    restorer, picture = Restorer("mini", compile="off"), torch.rand(1, 3, int(size), int(size))
    plan = restorer.plan(task)
    for _ in sys.stdin:
        began = time.process_time()
        taken = clock.seconds(lambda: restorer.run(picture, plan))
        print(json.dumps([taken, time.process_time() - began]), flush=True)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=256, help="side of the square picture in pixels")
    parser.add_argument("--task", default="haze")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="busy processes a core beside it")
    parser.add_argument("--spins", type=int, nargs="*", default=[1000, 10000], help="GOMP_SPINCOUNT to try")


def measure(options: Namespace) -> dict[str, Any]:
    """One restoration beside busy processes, by how its threads wait."""
    if options.rounds < 1 or options.size < 16 or min(options.busy) < 0:
        options.error("--rounds must be at least 1, --size at least 16, --busy at least 0")
    ways = {LIBRARY: {}, "without spinning": {"OMP_WAIT_POLICY": "passive"}}
    ways |= {f"{count} spins": {"GOMP_SPINCOUNT": str(count)} for count in options.spins}
    ways["one thread"] = {"OMP_NUM_THREADS": "1"}
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    rows = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(started(options, plain | way)) for name, way in ways.items()}
        for worker in workers.values():
            turn(worker)  # the first run lays weights out
        for busy in options.busy:
            burners = [subprocess.Popen(BUSY) for _ in range(busy * os.cpu_count())]
            taken: dict[str, list] = {name: [] for name in workers}
            for _ in range(options.rounds):
                for name, worker in workers.items():
                    taken[name].append(turn(worker))
            for burner in burners:
                burner.kill()
                burner.wait()
            rows += [
                {"way": name, "busy": busy, "seconds": spread([t[0] for t in each]), "cpu_seconds": spread([t[1] for t in each])}
                for name, each in taken.items()
            ]
        for worker in workers.values():
            worker.stdin.close()
    return {"size": options.size, "task": options.task, "rounds": options.rounds, "rows": rows}


def started(options: Namespace, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(options.size), options.task]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def turn(worker: subprocess.Popen) -> list[float]:
    """One restoration by a worker: its seconds, by the clock and of all threads."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    idle = {row["way"]: row["seconds"]["median"] for row in result["rows"] if not row["busy"]}
    rows = []
    for row in result["rows"]:
        taken = row["seconds"]
        milliseconds = [taken["median"], min(taken["all"]), *taken["quartiles"], row["cpu_seconds"]["median"]]
        fair = f"{taken['median'] / idle[row['way']] / (row['busy'] + 1):.2f}" if row["way"] in idle else ""
        rows.append([row["way"], str(row["busy"]), *(f"{value * 1e3:.0f}" for value in milliseconds), fair])
    title = f"mini, {result['task']}, {result['size']} x {result['size']}, {result['rounds']} rounds"
    header = ["threads wait", "busy a core", "median ms", "least", "from", "to", "CPU ms", "x fair share"]
    return "\n".join([title, "", columns(header, rows)])
