"""How benchmarks measure: forms in turns, device times, the device's own ceilings, CUDA graphs, errors; rows by a deadline."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from benchmarks.gpus import GPUS, Gpu
from benchmarks.report import NO_TIME, spread

MEASURED = 50  # milliseconds to spend on one measurement
RUNS = (5, 30)  # fewest and most runs of one
LONG = 500  # milliseconds from which on one run warms up and three are enough
FLUSH = 2**28  # bytes read between runs: several times the largest second-level cache
HEAD_START = 1_000_000  # cycles (half a millisecond) that a device waits while the host enqueues a run: no gaps are timed
COPIED = 2**30  # bytes
PRODUCT = 8192  # rows, columns and depth of the product that gives a ceiling


def seconds(function: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """What one run takes by the clock, the device's work included."""
    started = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turns(forms: Mapping[Any, Callable[[], Any]], rounds: int, device: torch.device | str = "cpu") -> dict[Any, dict]:
    """The spread of each form's seconds; each form runs once a round, so that whatever the machine does meets all alike."""
    taken: dict[Any, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, function in forms.items():
            taken[name].append(seconds(function, device))
    return {name: spread(values) for name, values in taken.items()}


def milliseconds(function: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Median and quartiles of a run of `function`, which has been run before.

    On CUDA by events around the device's work alone, with a cold cache (its lines clean, so that nothing is written back
    meanwhile), and no time lost to the host: the device starts when all is enqueued. On a CPU by the clock.
    """
    if device.type != "cuda":
        return spread([seconds(function) * 1e3 for _ in range(3)])

    def marked() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.sum()
        torch.cuda._sleep(HEAD_START)
        start.record()
        function()
        end.record()
        return start, end

    flushed = torch.zeros(FLUSH // 4, device=device)
    start, end = marked()
    torch.cuda.synchronize(device)
    estimate = start.elapsed_time(end)
    runs = 3 if estimate > LONG else min(max(int(MEASURED / max(estimate, 1e-3)), RUNS[0]), RUNS[1])
    events = [marked() for _ in range(runs)]
    torch.cuda.synchronize(device)
    return spread([start.elapsed_time(end) for start, end in events])


def captured(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`function` as a CUDA graph: a call replays it and gives the same tensor, rewritten. Elsewhere `function` itself."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is set up by a first run cannot be captured
        function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def ceilings(device: torch.device) -> Gpu:
    """What a GPU does at best, measured: a copy's bandwidth, products of bf16 and (by row scales) of e4m3.

    On a CPU they mean nothing and are those of a named GPU.
    """
    if device.type != "cuda":
        return GPUS["h200"]

    def rate(work: float, function: Callable[[], Any]) -> float:
        """Tera-units of work a second."""
        function()
        return work / milliseconds(function, device)["median"] / 1e9

    source, target = torch.randn(2, COPIED // 2, device=device, dtype=torch.bfloat16)
    bandwidth = rate(2 * COPIED, lambda: target.copy_(source))
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2))
    bf16 = rate(2 * PRODUCT**3, lambda: a @ b.t())
    fp8 = None
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one, other = torch.ones(PRODUCT, 1, device=device), torch.ones(1, PRODUCT, device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        try:
            fp8 = rate(2 * PRODUCT**3, lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=other, out_dtype=torch.bfloat16))
        except RuntimeError as error:  # not every version of CUDA has row scales on every device
            print(f"  no e4m3 product with row scales: {str(error).splitlines()[0]}", flush=True)
    return Gpu(bf16, fp8, bandwidth, "measured in this run")


def product_rate(device: Any, dtype: Any) -> float:
    """Operations a second of a product of large matrices by the clock, the best of a few."""
    x, weight = torch.randn(1024, 2048, device=device, dtype=dtype), torch.randn(2048, 2048, device=device, dtype=dtype)
    best = min(seconds(lambda: torch.nn.functional.linear(x, weight).sum().item()) for _ in range(8))
    return 2 * len(x) * weight.numel() / best


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: what was allocated on a GPU, what was resident of a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def relative_rms(value: Tensor, reference: Tensor) -> float | None:
    """Root mean square of the difference, relative to the reference's; None for NaN, Inf or another shape."""
    if value.shape != reference.shape or not value.isfinite().all():
        return None
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()


class DeviceLost(BaseException):
    """Nothing works on the device any more in this process, as after an address out of bounds: no row can follow."""


def lost(device: torch.device) -> bool:
    """Whether this process has lost its device: the errors of a kernel that went out of bounds stay until its end."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@dataclass
class Run:
    """A section at work: where it runs, until when, the file that its rows go to (a JSON object a line), the results' folder.

    `begun`: what earlier processes of the section began, and is not begun again; `marks`: the file that says so to later ones.
    """

    device: torch.device
    tiny: bool
    deadline: float  # of time.monotonic()
    file: IO[str]
    out: Path
    work: Path = Path()  # what a section leaves beside its rows
    begun: set[str] = field(default_factory=set)
    marks: IO[str] | None = None

    def add(self, **row: Any) -> None:
        """Keep a row and print it; nothing that was added is lost if the process dies."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        print("  " + "  ".join(shown(key, value) for key, value in row.items() if not isinstance(value, list)), flush=True)

    @contextmanager
    def guarded(self, **about: Any) -> Iterator[None]:
        """What fails inside becomes a row with its error, and the section goes on."""
        try:
            yield
        except Exception as error:  # a first GPU can fail in any way
            lines = str(error).strip().splitlines() or [""]
            self.add(**about, error=f"{type(error).__name__}: {lines[0]}"[:300])
            self.leave_if_lost()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def leave_if_lost(self) -> None:
        """End this process where the device no longer answers it; a new one goes on after what this one had begun."""
        if lost(self.device):
            raise DeviceLost

    def left(self, seconds: float, **about: Any) -> bool:
        """Whether to begin something: it was not begun by a process that was lost, and so many seconds are left before the
        deadline; if not, that is a row."""
        mark = json.dumps(about)
        if mark in self.begun:
            return False
        enough = time.monotonic() + seconds < self.deadline
        if not enough:
            self.add(**about, error=NO_TIME)
        elif self.marks is not None:
            self.marks.write(mark + "\n")
            self.marks.flush()
        return enough

    def room(self, seconds: float) -> bool:
        """Whether so many seconds are left, for what is welcome and not missed."""
        return time.monotonic() + seconds < self.deadline

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def shown(key: str, value: Any) -> str:
    """A number with its name, a name that is true or not, a text as it is."""
    if isinstance(value, bool):
        return key if value else f"NOT {key}"
    if isinstance(value, (int, float)):
        return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
    return f"{value}"
