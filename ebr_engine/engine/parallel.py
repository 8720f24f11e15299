"""One picture or clip over several devices: rank 0 leads, the others follow.

Rank 0 is the whole command: it reads, plans, draws the noise, writes, and keeps the journal. The others have loaded the same
model and wait for orders: a run of the sampler, a clip through the codec. An order comes with all that it is about, so that
every rank computes the same state, from shards of its tokens (`backbones/sharding.py`) or from some of the codec's tiles.

A rank that fails ends, and the run with it (`ranks.py`); so memory that runs out is not answered by a smaller way to run.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebr_engine import settings
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.sharding import exchanging
from ebr_engine.backbones.vae import VaeCodec
from ebr_engine.backbones.views import View
from ebr_engine.bridge.sampler import Callback, StepTable
from ebr_engine.engine import ranks as processes
from ebr_engine.engine.execute import Runner, Tiling
from ebr_engine.engine.fallback import Safety
from ebr_engine.engine.memory import Fallback
from ebr_engine.engine.offload import inner
from ebr_engine.engine.plan import Plan
from ebr_engine.engine.ranks import Ranks, Stopped
from ebr_engine.errors import EngineError, one_line
from ebr_engine.media.tiling import Tiles
from ebr_engine.request import LOAD, RestoreRequest

if TYPE_CHECKING:
    from ebr_engine.engine.run import Engine

PLANS = 4  # whose tables the other ranks keep


def heads_of(backbone: Backbone) -> int:
    """Heads of a transformer's self-attention; `EngineError` for one whose tokens cannot be shared out."""
    if not isinstance(backbone.trunk, nn.Module):
        raise EngineError("an exported transformer computes on one device; leave devices out")
    return backbone.trunk.config.num_attention_heads


def first_device(request: RestoreRequest) -> str:
    """The device of this process."""
    return processes.devices_of(request.devices, request.device)[0]


@contextmanager
def leading(request: RestoreRequest) -> Iterator[Ranks | None]:
    """The ranks of a request, rank 0 of which is this process; None for one device. They end if the model cannot be loaded."""
    if not request.devices:
        yield None
        return
    names = processes.devices_of(request.devices, request.device)
    if len(names) == 1 and request.devices != processes.TORCHRUN:
        yield None
        return
    loaded = RestoreRequest(**request.part(LOAD)).with_(devices=None).to_json()
    ranks = processes.start(request.devices, names, {"request": loaded})
    try:
        yield ranks
    except BaseException:
        ranks.end()
        raise


class LeadingRunner:
    """A runner that has the other ranks run the same. `level`: 0, or the number of `Safety`'s runner, counted from 1."""

    def __init__(self, runner: Runner, ranks: Ranks, plans: list[Plan], level: int = 0):
        self._runner, self._ranks, self._plans, self._level = runner, ranks, plans, level

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(
        self, plan: Plan, degraded: Tensor, noise: Tensor, callback: Callback | None = None, tiling: Tiling | None = None
    ) -> Tensor:
        """See `Runner.run`; what the callback raises ends the run on all ranks. Raises `DeviceLost` where a rank has ended."""
        order = {"do": "run", "level": self._level, "heard": callback is not None, "tiling": tiling and asdict(tiling)}
        place, tables = self._placed(plan)
        self._ranks.tell(order | place, [degraded, noise, *tables])
        raised: list[BaseException] = []

        def heard(done: int, total: int) -> None:
            try:
                callback(done, total)
            except BaseException as error:
                raised.append(error)
            if self._ranks.word(len(raised)):
                raise Stopped

        try:
            return self._ranks.together(
                lambda: run_shared(self._runner, self._ranks, plan, degraded, noise, callback and heard, tiling)
            )
        except Stopped:
            raise raised[0] from None

    def _placed(self, plan: Plan) -> tuple[dict[str, Any], list[Tensor]]:
        """Where the other ranks keep a plan, and what it is if they do not have it."""
        for place, kept in enumerate(self._plans):
            if kept is plan:
                return {"place": place}, []
        self._plans[:] = [plan, *self._plans][:PLANS]
        about, tensors = packed_plan(plan)
        return {"plan": about}, tensors


class LeadingCodec:
    """A VAE whose tiles are shared out among the ranks, where a picture has more than one."""

    def __init__(self, codec: Any, ranks: Ranks):
        self._whole = codec._whole if isinstance(codec, LeadingCodec) else codec  # placed anew
        self._ranks = ranks

    @property
    def codec(self) -> Any:
        """What is inside, as of a codec that waits on the CPU."""
        return inner(self._whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `base.Codec`."""
        return self._coded("encode", pixels, [side // self.codec.spatial for side in pixels.shape[-2:]])

    def decode(self, latent: Tensor) -> Tensor:
        """See `base.Codec`."""
        return self._coded("decode", latent, latent.shape[-2:])

    def _coded(self, do: str, x: Tensor, cells: Any) -> Tensor:
        if not self.codec.has_tiles(*cells):
            return getattr(self._whole, do)(x)
        self._ranks.tell({"do": do}, [x])
        return self._ranks.together(lambda: code_shared(self._whole, self._ranks, do, x))


def run_shared(runner: Runner, ranks: Ranks, plan: Plan, *arguments: Any) -> Tensor:
    """`Runner.run` with tokens over the ranks."""
    with exchanging(runner.backbone.trunk, ranks.exchange):
        return runner.run(plan, *arguments)


def code_shared(codec: Any, ranks: Ranks, do: str, x: Tensor) -> Tensor:
    """`encode` or `decode` with tiles over the ranks."""
    with exchanging(inner(codec), ranks.exchange):
        return getattr(codec, do)(x)


def led(ranks: Ranks, backbone: Backbone, runner: Runner, offloads: bool) -> tuple[Backbone, Runner, Safety]:
    """Rank 0's backbone, runner and safer precisions, each of which has the other ranks do the same."""
    plans: list[Plan] = []
    safety = Safety(backbone, offloads, lambda runner, number: LeadingRunner(runner, ranks, plans, 1 + number))
    if isinstance(inner(backbone.codec), VaeCodec):
        backbone = replace(backbone, codec=LeadingCodec(backbone.codec, ranks))
    return backbone, LeadingRunner(runner, ranks, plans), safety


def packed_plan(plan: Plan) -> tuple[dict[str, Any], list[Tensor]]:
    """A plan as JSON and tensors; what it bakes its tables with stays here."""
    tables = [tables.to_tensors() for tables in plan.tables]
    about = {
        "t0": plan.table.t0,
        "times": plan.table.times,
        "views": [tuple(view) for view in plan.views],
        "tables": [list(names) for names in tables],
    }
    return about, [plan.table.coefficients, *(table for names in tables for table in names.values())]


def plan_of(about: dict[str, Any], tensors: list[Tensor], kind: type) -> Plan:
    """The plan of `packed_plan`; `kind`: of its tables."""
    coefficients, *tensors = tensors
    table, left = StepTable(about["t0"], tuple(about["times"]), coefficients.cpu()), iter(tensors)
    views = tuple(View(time, offset and tuple(offset)) for time, offset in about["views"])
    return Plan(table, [kind(**{name: next(left) for name in names}) for names in about["tables"]], views=views)


def tiling_of(about: dict[str, Any] | None) -> Tiling | None:
    """A `Tiling` as it was before it was JSON."""
    if about is None:
        return None
    tiles = {name: _tuples(value) for name, value in about["tiles"].items()}
    return Tiling(Tiles(**tiles), about["at_once"])


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class Following:
    """A rank that does what rank 0 says."""

    def __init__(self, engine: "Engine", ranks: Ranks):
        self.engine, self.ranks = engine, ranks
        self.plans: list[Plan] = []

    @torch.no_grad()
    def serve(self) -> None:
        """Until there is nothing more to do."""
        orders = {"run": self.run, "encode": self.code, "decode": self.code, "apply": self.apply}
        while True:
            order, tensors = self.ranks.hear()
            if order["do"] == "leave":
                return
            orders[order["do"]](order, tensors)

    def run(self, order: dict[str, Any], tensors: list[Tensor]) -> None:
        """A run of the sampler."""
        degraded, noise, *tables = tensors
        if "plan" in order:
            self.plans = [plan_of(order["plan"], tables, self.engine.backbone.spec.conditioning), *self.plans][:PLANS]
        plan = self.plans[order.get("place", 0)]
        runner = self.engine.runner if not order["level"] else self.engine.safety.runner(order["level"] - 1)

        def heard(done: int, total: int) -> None:
            if self.ranks.word():
                raise Stopped

        callback = heard if order["heard"] else None
        try:
            run_shared(runner, self.ranks, plan, degraded, noise, callback, tiling_of(order["tiling"]))
        except Stopped:
            return

    def code(self, order: dict[str, Any], tensors: list[Tensor]) -> None:
        """A clip through the codec."""
        code_shared(self.engine.backbone.codec, self.ranks, order["do"], *tensors)

    def apply(self, order: dict[str, Any], tensors: list[Tensor]) -> None:
        """Another way to run: where the codec and blocks wait, and the codec's tiles."""
        self.engine.apply(Fallback(**order["way"]))


def follow(request: RestoreRequest, ranks: Ranks) -> None:
    """Load what a request names and do what rank 0 says, until it lets go."""
    from ebr_engine.engine.restorer import Restorer

    warnings.simplefilter("ignore")  # rank 0 tells the same
    request = RestoreRequest(**request.part(LOAD)).with_(devices=None, device=str(ranks.device))
    engine = Restorer.from_request(request).engine
    if engine.join(ranks):
        Following(engine, ranks).serve()
        ranks.end()


def torchrun(request: RestoreRequest) -> RestoreRequest:
    """The request of this process, one of `torchrun`'s: rank 0 gets it; the others follow rank 0 here, and leave."""
    request = request.with_(devices=processes.TORCHRUN)
    place = settings.process()
    store = processes.torchrun_store()
    if place[0] == 0:
        return request
    follow(request, Ranks(place[0], place[2], first_device(request), store))
    raise SystemExit


def main(place: dict[str, Any]) -> None:
    """A rank that rank 0 has started; what ends it is told in one line."""
    code = 0
    try:
        follow(RestoreRequest.from_json(place["request"]), processes.started(place))
    except Exception as error:
        print(one_line(error) or f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 1
    os._exit(code)  # what waits for ranks that have ended would wait on


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
