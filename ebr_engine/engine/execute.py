"""How the sampler runs on a backbone: plainly, over a compiled transformer, or as one CUDA graph.

| `compile` | CPU | CUDA |
|---|---|---|
| `off` | plain | plain |
| `auto` | plain; compiled for a size that comes so often that it pays (`Runner.expect`) | the same, and in CUDA graphs |
| `on` | the transformer compiled | compiled, and in CUDA graphs |

A CUDA graph holds the whole run of a shape and schedule: all evaluations, table rows and bridge steps. Tables are copied into
it, so that all prompts of a size share it. In a picture of tiles, whose number differs, a graph holds one evaluation of a
group of tiles. What fails to compile or to be captured is done without from then on, and told once.
"""

import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.layers import pack_trunk
from ebr_engine.backbones.views import room_of, seen
from ebr_engine.bridge.sampler import Callback, Velocity, sample
from ebr_engine.engine.devices import synchronise
from ebr_engine.engine.layout import tiled
from ebr_engine.engine.plan import Plan
from ebr_engine.engine.warm import compile_seconds
from ebr_engine.errors import EngineError, warn
from ebr_engine.kernels import backend
from ebr_engine.media.tiling import Tiles

COMPILE_SHARE = 0.1  # of the time that the expected pictures of a size take: `auto` compiles where that is no less
COMPILE_SECONDS = 45.0  # that compiling for a size takes, until one has been measured
SHAPES = 64  # that one transformer is compiled for, before torch gives up
WARM_STEPS = 3  # that meet every kernel of a run, the solver's differences too


KEPT = 8  # graphs; a shape that comes back later is recorded again


class GraphError(RuntimeError):
    """A function that could not be recorded; the cause is what it failed with."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A recorded function: where its inputs lie, what it leaves its result in, and what else it reads."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    result: Tensor
    reads: object  # kept alive with the graph


class Recorder(Protocol):
    """Records `function()`; `warm()` meets every kernel of it first. Gives the replay and the tensor that it writes."""

    def __call__(self, function: Callable[[], Tensor], warm: Callable[[], object]) -> tuple[Callable[[], None], Tensor]: ...


class Graphs:
    """Recorded functions by key; those of at most `most` keys are kept, and the least recently used go first."""

    def __init__(self, record: Recorder, most: int = KEPT):
        self.record, self.most = record, most
        self._kept: OrderedDict[Hashable, dict[Hashable, Graph]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def run(
        self,
        key: Hashable,
        inputs: Sequence[Tensor],
        function: Callable[..., Tensor],
        warm: Callable[..., object],
        reads: object = None,
        part: Hashable = None,
    ) -> Tensor:
        """`function(*inputs)`, recorded when key and part are new: together they mean one function and one shape for ever.

        The parts of a key are kept and dropped together. `warm(*inputs)` runs the same kernels, if fewer of them; `reads` is
        kept as long as the graph. The result is a tensor of the caller's own. Raises `GraphError` when recording fails.
        """
        graph = self._kept.get(key, {}).get(part)
        if graph is None:
            graph = self._recorded(inputs, function, warm, reads, key, part)
        else:
            self._kept.move_to_end(key)
            for place, value in zip(graph.inputs, inputs):
                place.copy_(value)
        graph.replay()
        return graph.result.clone()

    def _recorded(
        self,
        inputs: Sequence[Tensor],
        function: Callable[..., Tensor],
        warm: Callable[..., object],
        reads: object,
        key: Hashable,
        part: Hashable,
    ) -> Graph:
        while key not in self._kept and len(self._kept) >= self.most:  # before the new one needs the memory
            self._kept.popitem(last=False)
        places = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in inputs)
        try:
            replay, result = self.record(lambda: function(*places), lambda: warm(*places))
        except Exception as error:  # a capture can fail in as many ways as there are kernels
            raise GraphError(str(error)) from error
        graph = Graph(places, replay, result, reads)
        self._kept.setdefault(key, {})[part] = graph
        self._kept.move_to_end(key)
        return graph


class CudaRecorder:
    """Records on a CUDA device; all graphs of a recorder allocate from one pool, and must not run at the same time.

    The pool may be shared although graphs are replayed in any order: inputs lie outside of it, results are kept by their
    graphs, and what is between is written anew by each replay.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = None

    def __call__(self, function: Callable[[], Tensor], warm: Callable[[], object]) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):  # kernels are compiled, libraries set up: what no capture may hold
                warm()
            current.wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = function()
        return graph.replay, result


Cells = tuple[int, int]  # height and width of a latent


@dataclass(frozen=True)
class Tiling:
    """How a latent is cut into tiles, and how many of them are evaluated together."""

    tiles: Tiles
    at_once: int


class Counted:
    """Adds up what is done, and tells a callback."""

    def __init__(self, callback: Callback, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        self.callback(self.done, self.total)


class Runner:
    """Runs plans on one backbone. `compile`: see above; `graphs` in place of those of the backbone's device.

    Raises `EngineError` when compiling is asked for, and the backbone's transformer cannot be.
    """

    def __init__(self, backbone: Backbone, compile: str = "auto", offloads: bool = False, graphs: Graphs | None = None):
        self.backbone, self.compile = backbone, compile
        self._refused = ""
        if not isinstance(backbone.trunk, nn.Module):
            self._refused = "an exported transformer is compiled already"
        elif offloads:
            self._refused = "blocks that wait in main memory cannot be compiled"
        if self._refused and compile == "on":
            raise EngineError(f"{self._refused}; leave compile at auto")
        possible = compile != "off" and not self._refused
        if graphs is None and possible and backbone.device.type == "cuda":
            graphs = Graphs(CudaRecorder(backbone.device))
        self.graphs = graphs if possible else None
        self.compiled = self._compiled() if compile == "on" else None
        self.expected: Counter[Cells] = Counter()  # pictures that are to come, by the size of their latents
        self.compile_seconds = COMPILE_SECONDS
        self._plain: dict[Cells, float] = {}  # seconds of an evaluation, of sizes that may be worth compiling for
        self._to_compile: float | None = None  # those of a size whose first compiled evaluation is to come
        self._worth: dict[Cells, bool] = {}
        self._tables: weakref.WeakValueDictionary[Any, _Shared] = weakref.WeakValueDictionary()
        packs = backbone.device.type == "cpu" and isinstance(backbone.trunk, nn.Module) and not offloads
        self._to_pack = backbone.trunk if packs else None

    def expect(self, sizes: Iterable[Cells]) -> None:
        """Say which sizes of latents (height, width) are to come, each as often as it comes.

        With `auto`, a size is compiled for where that takes no more than `COMPILE_SHARE` of the time of its pictures: before
        the first of them one evaluation is timed, so that all pictures of a size are treated alike.
        """
        if self.compile == "auto" and not self._refused:
            self.expected.update(sizes)

    def pack(self) -> bool:
        """Lay the weights out for a CPU's products, unless that is done; whether it was done now."""
        if self._to_pack is None:
            return False
        pack_trunk(self._to_pack)
        self._to_pack = None
        return True

    def _compiled(self) -> Backbone:
        return replace(self.backbone, trunk=compile_trunk(self.backbone.trunk))

    def static(self, cells: Cells, plan: Plan) -> bool:
        """Whether a new shape near this size of latents costs something, so that shapes should be few."""
        return self.graphs is not None or self._compiles(cells, plan)

    def _compiles(self, cells: Cells, plan: Plan) -> bool:
        """Whether a run at this size is compiled."""
        if self.compile == "on" or self.expected[cells] < 2:
            return self.compile == "on" and self.compiled is not None
        if cells not in self._worth:
            self._plain[cells] = self._evaluation_seconds(cells, plan)
            seconds = self.expected[cells] * self._plain[cells] * len(plan.table) * len(plan.stages)
            kept = compile_seconds(self.backbone, cells)
            self._worth[cells] = (self.compile_seconds if kept is None else kept) <= COMPILE_SHARE * seconds
            if self._worth[cells] and self.compiled is None:
                self.compiled = self._compiled()
        return self._worth[cells] and self.compiled is not None

    def _evaluation_seconds(self, cells: Cells, plan: Plan) -> float:
        """Seconds of an evaluation of the transformer, the better of two."""
        backbone = self.backbone
        latent, step = torch.zeros(1, backbone.codec.channels, 1, *cells, device=backbone.device), plan.tables[0][0]
        taken = []
        for _ in range(2):
            synchronise(backbone.device)
            started = time.perf_counter()
            backbone.velocity(latent, step)
            synchronise(backbone.device)
            taken.append(time.perf_counter() - started)
        return min(taken)

    def run(
        self, plan: Plan, degraded: Tensor, noise: Tensor, callback: Callback | None = None, tiling: Tiling | None = None
    ) -> Tensor:
        """The restored latent, float32 on `degraded`'s device; see `sample`.

        `callback` hears of every evaluation, of tiles of every group, but of a run that is one graph when all of them are done.
        On a CPU the first run lays the transformer's weights out for its products, in place.
        """
        first = self.pack()
        cells = tuple(degraded.shape[-2:]) if tiling is None else (tiling.tiles.tile_height, tiling.tiles.tile_width)
        if self.graphs is not None:
            try:
                if tiling is None:
                    return self._replayed(plan, degraded, noise, callback)
                groups = self._groups(self._step_of(plan), tiling, plan, callback)
                velocity = plan.seen(groups, self.backbone.codec, degraded)
                return sample(velocity, seen(range(len(plan.table)), plan.views), degraded, noise, plan.steps)
            except GraphError as error:
                self.graphs = None
                warn(f"CUDA graphs are left out from here on: {error}")
        compiles = self._compiles(cells, plan)
        self._to_compile = self._plain.pop(cells, None) if compiles else None
        velocity = plan.averaged(self.velocity if compiles else self.backbone.velocity)
        if tiling is not None:
            velocity, callback = self._groups(velocity, tiling, plan, callback), None
        velocity = plan.seen(velocity, self.backbone.codec, degraded)
        if first:  # what loading, laying out and the codec left is in pieces too small for the transformer, and here is the peak
            backend.return_memory()
        return sample(velocity, plan.conditioning, degraded, noise, plan.steps, callback)

    def velocity(self, latent: Tensor, step: Any) -> Tensor:
        """The backbone's velocity, by the compiled transformer if there is one."""
        if self.compiled is None:
            return self.backbone.velocity(latent, step)
        self.backbone.prepare(latent, step)
        started = time.perf_counter()
        try:
            with torch._dynamo.config.patch(recompile_limit=SHAPES):
                result = self.compiled.velocity(latent, step)
        except Exception as error:  # a compiler that is missing or fails raises almost anything
            if capturing(latent):
                raise
            self.compiled = None
            warn(f"the transformer is not compiled: {error}")
            return self.backbone.velocity(latent, step)
        if self._to_compile is not None:  # this evaluation compiled for a new size
            self.compile_seconds = max(0.0, time.perf_counter() - started - self._to_compile)
            self._to_compile = None
        return result

    def _groups(self, velocity: Velocity, tiling: Tiling, plan: Plan, callback: Callback | None) -> Velocity:
        cells = tiling.tiles.tile_height, tiling.tiles.tile_width
        heard = callback and Counted(callback, len(tiling.tiles) * len(plan.table))
        return tiled(velocity, tiling.tiles, tiling.at_once, equal=self.static(cells, plan), heard=heard)

    def _replayed(self, plan: Plan, degraded: Tensor, noise: Tensor, callback: Callback | None) -> Tensor:
        shared = self._shared(plan)

        def run(degraded: Tensor, noise: Tensor, plan: Plan = shared.plan) -> Tensor:
            velocity = plan.seen(plan.averaged(self.velocity), self.backbone.codec, degraded)
            return sample(velocity, plan.conditioning, degraded, noise, plan.steps)

        def warm(degraded: Tensor, noise: Tensor) -> Tensor:
            return run(degraded, noise, shared.plan.first(WARM_STEPS))

        shared.plan.steps  # noqa: B018 (placed outside of the graph's memory)
        key = ("run", plan.kind, tuple(degraded.shape))
        room = room_of(self.backbone.codec, plan.views)  # the grid that is seen is larger than the picture's
        reads = shared, self.backbone.prepare(F.pad(degraded, (0, room, 0, room)), shared.plan.tables[0][0])
        result = self.graphs.run(key, (degraded.float(), noise.to(degraded.device)), run, warm, reads)
        if callback is not None:
            callback(len(plan.table), len(plan.table))
        return result

    def _step_of(self, plan: Plan) -> Velocity:
        """The velocity at the step of a number, each a graph of its own."""
        shared = self._shared(plan)

        def velocity(state: Tensor, i: int) -> Tensor:
            step = shared.plan.entries[i]

            def evaluate(state: Tensor) -> Tensor:
                return shared.plan.averaged(self.velocity)(state, step)

            key = ("steps", plan.kind, tuple(state.shape))
            reads = shared, self.backbone.prepare(state, shared.plan.tables[0][0])
            return self.graphs.run(key, (state,), evaluate, evaluate, reads, part=i)

        return velocity

    def _shared(self, plan: Plan) -> "_Shared":
        """The tables that graphs of this kind of plan read, filled with the plan's."""
        shared = self._tables.get(plan.kind)
        if shared is None:
            shared = self._tables[plan.kind] = _Shared(plan.copy(), weakref.ref(plan))
        elif shared.loaded() is not plan:
            shared.plan.load(plan)
            shared.loaded = weakref.ref(plan)
        return shared


@dataclass(eq=False)
class _Shared:
    """Tables that graphs read, and whose numbers are in them."""

    plan: Plan
    loaded: Any  # a weak reference to a plan


def compile_trunk(trunk: nn.Module) -> Any:
    """A transformer to be compiled, once a shape, when it first runs; call it as the transformer."""
    backend.keep_compiled()
    return torch.compile(trunk, fullgraph=True, dynamic=False)


def capturing(x: Tensor) -> bool:
    """Whether a graph is being recorded on the device of `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
