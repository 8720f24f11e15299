"""How the sampler runs on a backbone: plainly, over a compiled transformer, or as one CUDA graph.

| `compile` | CPU | CUDA |
|---|---|---|
| `off` | plain | plain |
| `auto` | plain; the transformer compiled when many pictures are to come (`Runner.expect`) | the same, and in CUDA graphs |
| `on` | the transformer compiled | compiled, and in CUDA graphs |

A CUDA graph holds the whole run of a shape and schedule: all evaluations, table rows and bridge steps. Tables are copied into
it, so that all prompts of a size share it. In a picture of tiles, whose number differs, a graph holds one evaluation of a
group of tiles. What fails to compile or to be captured is done without from then on, and told once.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ebr_engine import settings
from ebr_engine.backbones.loading import Backbone
from ebr_engine.backbones.packed import pack_trunk
from ebr_engine.errors import EngineError, warn
from ebr_engine.graphs import CudaRecorder, GraphError, Graphs
from ebr_engine.media.tiling import Tiles
from ebr_engine.plan import Plan
from ebr_engine.sampler import Callback, Velocity, sample
from ebr_engine.spinning import seen
from ebr_engine.tiled import tiled

COMPILES = ("auto", "off", "on")
MANY = 100  # pictures from which on `auto` compiles; `python -m benchmarks.throughput --compile off on` tells a CPU's break-even
SHAPES = 64  # that one transformer is compiled for, before torch gives up
WARM_STEPS = 3  # that meet every kernel of a run, the solver's differences too


@dataclass(frozen=True)
class Tiling:
    """How a latent is cut into tiles, and how many of them are evaluated together."""

    tiles: Tiles
    at_once: int


class Runner:
    """Runs plans on one backbone. `compile`: see above; `graphs` in place of those of the backbone's device.

    Raises `EngineError` when compiling is asked for, and the backbone's transformer cannot be.
    """

    def __init__(self, parts: Backbone, compile: str = "auto", offloads: bool = False, graphs: Graphs | None = None):
        self.parts, self.compile = parts, compile
        self._refused = ""
        if not isinstance(parts.trunk, nn.Module):
            self._refused = "an exported transformer is compiled already"
        elif offloads:
            self._refused = "blocks that wait in main memory cannot be compiled"
        if self._refused and compile == "on":
            raise EngineError(f"{self._refused}; leave compile at auto")
        possible = compile != "off" and not self._refused
        if graphs is None and possible and parts.device.type == "cuda":
            graphs = Graphs(CudaRecorder(parts.device))
        self.graphs = graphs if possible else None
        self.compiled = self._compiled() if compile == "on" else None
        self._tables: weakref.WeakValueDictionary[Any, _Shared] = weakref.WeakValueDictionary()
        packs = parts.device.type == "cpu" and isinstance(parts.trunk, nn.Module) and not offloads
        self._to_pack = parts.trunk if packs else None

    def expect(self, pictures: int) -> None:
        """Say how many pictures are to come: with `auto`, many are worth compiling for."""
        if self.compile == "auto" and not self._refused and self.compiled is None and pictures >= MANY:
            self.compiled = self._compiled()

    def _compiled(self) -> Backbone:
        return replace(self.parts, trunk=compile_trunk(self.parts.trunk))

    @property
    def static(self) -> bool:
        """Whether every new shape costs something, so that shapes should be few."""
        return self.compiled is not None or self.graphs is not None

    def run(
        self, plan: Plan, degraded: Tensor, noise: Tensor, callback: Callback | None = None, tiling: Tiling | None = None
    ) -> Tensor:
        """The restored latent, float32 on `degraded`'s device; see `sample`.

        `callback` hears of every evaluation, but of a run that is one graph when all of them are done. On a CPU the first run
        lays the transformer's weights out for its products, in place.
        """
        if self._to_pack is not None:
            pack_trunk(self._to_pack)
            self._to_pack = None
        if self.graphs is not None:
            try:
                if tiling is None:
                    return self._replayed(plan, degraded, noise, callback)
                velocity = plan.seen(self._groups(self._step_of(plan), tiling), self.parts.codec, degraded)
                return sample(velocity, seen(range(len(plan.table)), plan.views), degraded, noise, plan.steps, callback)
            except GraphError as error:
                self.graphs = None
                warn(f"CUDA graphs are left out from here on: {error}")
        velocity = plan.averaged(self.velocity)
        velocity = velocity if tiling is None else self._groups(velocity, tiling)
        velocity = plan.seen(velocity, self.parts.codec, degraded)
        return sample(velocity, plan.conditioning, degraded, noise, plan.steps, callback)

    def velocity(self, latent: Tensor, step: Any) -> Tensor:
        """The backbone's velocity, by the compiled transformer if there is one."""
        if self.compiled is None:
            return self.parts.velocity(latent, step)
        self.parts.prepare(latent, step)
        try:
            with torch._dynamo.config.patch(recompile_limit=SHAPES):
                return self.compiled.velocity(latent, step)
        except Exception as error:  # a compiler that is missing or fails raises almost anything
            if capturing(latent):
                raise
            self.compiled = None
            warn(f"the transformer is not compiled: {error}")
            return self.parts.velocity(latent, step)

    def _groups(self, velocity: Velocity, tiling: Tiling) -> Velocity:
        return tiled(velocity, tiling.tiles, tiling.at_once, equal=self.static)

    def _replayed(self, plan: Plan, degraded: Tensor, noise: Tensor, callback: Callback | None) -> Tensor:
        shared = self._shared(plan)

        def run(degraded: Tensor, noise: Tensor, plan: Plan = shared.plan) -> Tensor:
            velocity = plan.seen(plan.averaged(self.velocity), self.parts.codec, degraded)
            return sample(velocity, plan.conditioning, degraded, noise, plan.steps)

        def warm(degraded: Tensor, noise: Tensor) -> Tensor:
            return run(degraded, noise, shared.plan.first(WARM_STEPS))

        shared.plan.steps  # noqa: B018 (placed outside of the graph's memory)
        key = ("run", plan.kind, tuple(degraded.shape))
        result = self.graphs.run(key, (degraded.float(), noise.to(degraded.device)), run, warm, shared)
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
            return self.graphs.run(key, (state,), evaluate, evaluate, shared, part=i)

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
    settings.keep_compiled()
    return torch.compile(trunk, fullgraph=True, dynamic=False)


def capturing(x: Tensor) -> bool:
    """Whether a graph is being recorded on the device of `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
