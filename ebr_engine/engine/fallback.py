"""Fitting runs into memory: the way to run that a limit allows, and the next one when memory runs out after all."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.layers import safer_trunk
from ebr_engine.engine.costs import precision
from ebr_engine.engine.execute import Runner, Tiling
from ebr_engine.engine.memory import (
    Costs,
    Fallback,
    Work,
    choose,
    fallbacks,
    filter_peak,
    first_within,
    format_size,
    last_with_view,
    limits_of,
    peak,
    size_of,
    unseen,
)
from ebr_engine.engine.plan import Plan
from ebr_engine.errors import EngineError, out_of_memory, warn

Result = TypeVar("Result")
M_MMAP_THRESHOLD, LARGE = -3, 2**17  # of glibc's malloc.h; bytes


class Fitting:
    """In which way a restorer runs. `limit`: bytes (or `8G`) of the device, on a CPU of the process, None for all; `low`: all
    that saves memory without making tiles and chunks smaller.

    Where memory ran out, a smaller way is kept: for good what does not change a picture, and for the file at hand what does.
    """

    def __init__(self, limit: str | int | None = None, low: bool = False):
        self.limit, self.low = None if limit is None else size_of(limit), low
        self.reached: tuple[float, ...] = ()  # limits that other works' ways keep to as well
        self.seen = ""  # the way of this file, where it changes the picture
        if limit is not None or low:
            give_back_at_once()

    def begin(self) -> None:
        """A new file begins: it is tried as it was asked for, so that its picture does not depend on the files before it."""
        self.reached, self.seen = unseen(self.reached), ""

    def choose(self, ways: list[Fallback], costs: Costs, work: Work) -> int:
        """Number of the way to run; `EngineError` says the least memory that would do."""
        first = max(first_within(ways, self.reached), last_with_view(ways) if self.low else 0)
        return choose(ways, costs, work, self.limit, first)

    def check_filter(self, costs: Costs, work: Work) -> None:
        """`EngineError` where taking blur out of pictures of that size first needs more than a process on a CPU may hold."""
        need = filter_peak(costs, work)
        if self.limit is not None and not costs.cuda and need > self.limit:
            sizes = f"{format_size(need)}, more than the {format_size(self.limit)} that are allowed"
            raise EngineError(f"taking the blur out of {work} needs {sizes}; --deconvolve off leaves it to the prompt")

    def fits(self, ways: list[Fallback], costs: Costs, work: Work) -> bool:
        """Whether any of the ways fits into what is allowed."""
        return self.limit is None or min(peak(costs, way, work) for way in ways) <= self.limit

    def next(self, ways: list[Fallback], costs: Costs, work: Work, index: int) -> int | None:
        """The next way in which this work needs less; None after the smallest."""
        need = peak(costs, ways[index], work)
        return next((i for i in range(index + 1, len(ways)) if peak(costs, ways[i], work) < need), None)

    def descend(self, ways: list[Fallback], index: int, work: Work) -> None:
        """Memory has run out: go on with way `index`, and say so."""
        warn(f"not enough memory for {work}; going on with {ways[index]}")
        found = limits_of(ways, index)
        self.reached = tuple(map(min, self.reached or found, found))
        if unseen(self.reached) != self.reached:
            self.seen = str(ways[index])


def fallbacks_of(backbone: Backbone, start: Fallback, costs: Costs, compiled: bool) -> list[Fallback]:
    """The ways to run a loaded backbone; what is compiled cannot wait on the CPU block by block, nor can an exported one."""
    return fallbacks(start, costs, isinstance(backbone.trunk, nn.Module) and not compiled, backbone.fixed is not None)


def load_with_offload(make: Callable[[str], Result], device: torch.device, offload: str, movable: bool) -> Result:
    """`make(offload)`; if a GPU's memory ends on the way and its blocks are `movable`, `make("blocks")`, with a warning.

    Raises `EngineError` when memory ends all the same.
    """
    ways = [offload, "blocks"] if movable and device.type == "cuda" and offload != "blocks" else [offload]
    for way in ways:
        try:
            return make(way)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        release()
        if way != ways[-1]:
            warn(f"the model does not fit into the memory of {device}; its blocks wait on the CPU (offload blocks)")
    hint = "a smaller precision (bf16, fp8) may" if way == "blocks" or device.type == "cpu" else "offload blocks may"
    raise EngineError(f"not enough memory to load the model; {hint} fit")


def give_back_at_once() -> None:
    """Have glibc take every large block from the system and give it back when it is freed, for the whole process.

    Otherwise it keeps blocks of up to 32 MB in its heap, which grew by a half beyond what was alive, and no limit holds.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    except (AttributeError, OSError, TypeError):  # another C library: nothing to be done
        return


def release() -> None:
    """Give back what nothing refers to any more, the device's cached blocks too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Safety:
    """The same backbone in safer precisions, made when the first run needs them; they stay beside it in memory.

    `lead(runner, number)` gives what runs in a runner's place, counted from 0, where other devices take part.
    """

    def __init__(self, backbone: Backbone, offloads: bool = False, lead: Callable[[Runner, int], Runner] | None = None):
        self.backbone, self._lead = backbone, lead
        self._safe = isinstance(backbone.trunk, nn.Module) and not offloads
        self._made: list[Runner] = []

    def run(self, plan: Plan, degraded: Tensor, noise: Tensor, tiling: Tiling | None = None) -> Tensor:
        """The restored latent of a run that was not finite.

        Raises `EngineError` when no precision helps: the picture's own latent is not finite, the transformer is exported or
        float32 already, or float32 overflows too.
        """
        name = precision(self.backbone)
        if not degraded.isfinite().all():
            raise EngineError("the codec made a latent of this picture that is not finite; nothing can be restored from it")
        for runner in self._runners():
            latent = runner.run(plan.with_precision(runner.backbone), degraded, noise, tiling=tiling)
            if latent.isfinite().all():
                warn(f"the result was not finite in {name}; it was made again in {precision(runner.backbone)}")
                return latent
        if not self._safe:
            raise EngineError(f"the result is not finite in {name}, and this transformer cannot change its precision")
        raise EngineError("the result is not finite, in float32 either: the weights, the prompt or t0 are out of bounds")

    def runner(self, number: int) -> Runner:
        """The runner of a number, which there is."""
        return next(islice(self._runners(), number, None))

    def _runners(self) -> Iterator[Runner]:
        """Runs in one safer precision after another."""
        made = 0
        while self._safe:
            if made == len(self._made):
                before = self._made[-1].backbone if self._made else self.backbone
                trunk = safer_trunk(before.trunk)
                if trunk is None:
                    return
                self._made.append(Runner(replace(before, trunk=trunk, dtype=next(trunk.parameters()).dtype), "off"))
            yield self._lead(self._made[made], made) if self._lead else self._made[made]
            made += 1
