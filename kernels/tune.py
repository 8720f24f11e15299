"""Which of several ways serves an operation on this CPU: timed once for a kind of call, on the call's own tensors, and kept.

No instruction set, library or thread count is taken for faster than another: the same library's bf16 attention is twice as fast
as explicit products on one CPU and a twentieth on the next. A choice belongs to the CPU's model, the number of threads, torch's
version, the build of the native code, and the kind of call (operation, dtype, widths, tokens to a power of two). All choices of a
process take at most `BUDGET` seconds, or `LONG` where it runs for long (`for_long`); what is left untimed then takes the first
way, and is timed by a later process. Small calls take the first way too. `EBR_CPU_TUNE` (`backend.TUNE`): `on`; `off`, the first
way always; `again`, timed anew.
"""

import functools
import json
import os
import re
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch

from ebr_engine import settings
from ebr_engine.kernels import backend

BUDGET = 1.0  # seconds of a process, of all of its threads
LONG = 10.0  # seconds of one that learns, for minutes or hours
ROUNDS = 3  # of all ways in turns, after one that warms up; the best one of each counts
LEAST = 2**28  # operations of a call below which no way is timed
GAIN = 1.03  # that another way than the first has to bring
FINE = 1e-5  # seconds that a clock has to tell apart
FILE = "cpu_choices.json"

_spent = 0.0
_budget = BUDGET
_choices: dict[str, dict[str, Any]] = {}  # of this process and, once they were read, of earlier ones


def chosen(operation: str, kind: tuple[Hashable, ...], work: int, ways: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the way that serves: `ways` in order of preference; `work` is the call's operations."""
    global _spent
    first = next(iter(ways))
    if len(ways) == 1 or backend.TUNE == "off" or work < LEAST:
        return first
    key = f"{machine(torch.get_num_threads())}: {', '.join(map(str, (operation, *kind)))}"
    if backend.TUNE != "again":
        _read()
    if key in _choices and _choices[key]["way"] in ways and ways.keys() <= _choices[key]["seconds"].keys():
        return _choices[key]["way"]
    if _spent >= _budget:
        return first
    started = time.process_time()
    seconds = timed(ways)
    _spent += time.process_time() - started
    fastest = min(seconds, key=seconds.get)
    way = fastest if seconds[first] > GAIN * seconds[fastest] else first
    _choices[key] = {"way": way, "seconds": seconds}
    _write()
    return way


def for_long() -> None:
    """This process will run for long: its choices may take `LONG` seconds."""
    global _budget
    _budget = LONG


def timed(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The best seconds of each way, as this thread computes; a first round, in which libraries set themselves up, is not counted.

    The thread has its share in all that runs on several, and its own time is that of an idle machine beside busy neighbours too.
    """
    clock = time.thread_time if time.get_clock_info("thread_time").resolution < FINE else time.perf_counter
    best = dict.fromkeys(ways, float("inf"))
    for counted in [False] + [True] * ROUNDS:
        for name, run in ways.items():
            started = clock()
            run()
            if counted:
                best[name] = min(best[name], clock() - started)
    return best


def summary() -> dict[str, dict[str, str]]:
    """What was chosen here with as many threads as torch has now, and by how much: operation → kind of call → words."""
    _read()
    here = f"{machine(torch.get_num_threads())}: "
    found: dict[str, dict[str, str]] = {}
    for key, choice in sorted(_choices.items()):
        if key.startswith(here):
            operation, _, kind = key.removeprefix(here).partition(", ")
            taken = sorted(choice["seconds"].items(), key=lambda item: item[1])
            times = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in taken)
            found.setdefault(operation, {})[kind] = f"{choice['way']} ({times})"
    return found


@functools.cache
def machine(threads: int) -> str:
    """What choices belong to: the CPU's model, the level that native code runs at and its build, threads, torch's version."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    level = f"{backend.native_level()} {backend.native_build()}".rstrip()
    return f"{names[0] if names else 'a CPU'}, {level}, {threads} threads, torch {torch.__version__}"


def _path() -> Path:
    return settings.cache_dir() / FILE


def _stored() -> dict[str, dict[str, Any]]:
    """What the file holds; nothing where there is none, or where it is damaged: it can be made again."""
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    usable = found.items() if isinstance(found, dict) else ()
    return {key: one for key, one in usable if isinstance(one, dict) and {"way", "seconds"} <= one.keys()}


@functools.cache
def _read() -> None:
    _choices.update(_stored() | _choices)


def _write() -> None:
    """Add this process's choices to the file; a folder that cannot be written to costs the next process the timing."""
    path = _path()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_stored() | _choices, indent=1) + "\n")
        partial.replace(path)
    except OSError:
        if partial.exists():
            partial.unlink()
