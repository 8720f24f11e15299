"""What of a run does not depend on a pixel."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone, Codec
from ebr_engine.backbones.views import View, seen, spun, views
from ebr_engine.bridge.sampler import Steps, StepTable, Velocity, make_table, mean_velocity, place
from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.errors import EngineError, check_choice
from ebr_engine.prompts.mixing import chosen_prompts, evaluations, mixed_weights
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.request import RestoreRequest

FINE_PIXELS = 1 << 20  # of the largest picture that is seen finer where nothing is said: four times the tokens


class MixedFineness(EngineError):
    """Prompts of one run that see pictures at different finenesses."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The sampler's steps, and the transformer's tables for them."""

    table: StepTable
    tables: list[Any]  # a conditioning for every velocity that is averaged: one, unless prompts are mixed by velocity
    bake: Callable[[Backbone], list[Any]] | None = None  # the tables for the same backbone in another precision
    views: tuple[View, ...] = ()  # how the transformer sees the state in each step
    detail: str = "model"  # whose detail the result has, where the request leaves it open: the model's or the input's
    deconvolve: bool = False  # whether pictures are deconvolved first, where the request leaves it open
    supersample: int = 1  # how many times finer than its pixels the transformer sees a picture, either way
    fine: "Plan | None" = None  # the run that a small picture has in place of this one, with prompts that see it finer
    following: tuple["Plan", ...] = ()  # runs of their own, each over the result of the one before

    @property
    def stages(self) -> list["Plan"]:
        """The runs, one over the result of the other."""
        return [self, *self.following]

    def stages_for(self, height: int, width: int) -> list["Plan"]:
        """The runs of a picture of that size: those that see it finer, where there are any and it is small."""
        small = height * width <= FINE_PIXELS
        return [stage.fine if small and stage.fine else stage for stage in self.stages]

    def check_single(self) -> None:
        """Raise `EngineError` where more than one run is planned."""
        if self.following:
            raise EngineError("a file holds one run; make one for each prompt, or mix them with --mix residual")

    def by_input(self, detail: str = "auto") -> bool:
        """Whether this run takes the detail of its result from its input, `detail` being what the request says."""
        return (self.detail if detail == "auto" else detail) == "input"

    def any_by_input(self, detail: str = "auto") -> bool:
        """Whether any of the runs does."""
        return any(stage.by_input(detail) for stage in self.stages)

    def deconvolves(self, deconvolve: str = "auto") -> bool:
        """Whether the blur that its input shows is taken out first, `deconvolve` being what the request says."""
        return self.deconvolve if deconvolve == "auto" else deconvolve == "on"

    @property
    def facts(self) -> dict[str, Any]:
        """What an engine file tells of it beside its tables."""
        others = {"supersample": (self.supersample, 1), "deconvolve": (self.deconvolve, False)}
        return {"detail": self.detail} | {name: value for name, (value, usual) in others.items() if value != usual}

    @property
    def entries(self) -> Sequence:
        """What the averaged velocity takes: an entry a step."""
        return self.tables[0] if len(self.tables) == 1 else list(zip(*self.tables))

    @property
    def conditioning(self) -> Sequence:
        """What `sample` takes: an entry a step."""
        return seen(self.entries, self.views)

    @cached_property
    def steps(self) -> Steps:
        """The step table's numbers where the tables are."""
        return place(self.table, self.tables[0].head.device)

    @cached_property
    def kind(self) -> Hashable:
        """Equal for plans whose runs are the same work on other numbers: schedule, and shapes and dtypes of the tables."""
        shapes = tuple((tuple(x.shape), x.dtype) for tables in self.tables for x in tables.to_tensors().values())
        coefficients = tuple(map(tuple, self.table.coefficients.tolist()))
        return self.table.t0, self.table.times, coefficients, self.views, len(self.tables), shapes

    def averaged(self, velocity: Velocity) -> Velocity:
        """The transformer's own velocity function, over all tables."""
        return velocity if len(self.tables) == 1 else mean_velocity(velocity)

    def seen(self, velocity: Velocity, codec: Codec, degraded: Tensor) -> Velocity:
        """The velocity function of a run that restores the latent `degraded`, of the averaged one."""
        return spun(velocity, codec, degraded) if self.views else velocity

    def first(self, count: int) -> "Plan":
        """The first steps alone: enough to have met every kernel, not a restoration."""
        steps = StepTable(self.table.t0, self.table.times[: count + 1], self.table.coefficients[:count])
        return Plan(steps, [_Part(tables, len(steps)) for tables in self.tables], views=self.views[: len(steps)])

    def with_precision(self, backbone: Backbone) -> "Plan":
        """The same run on the same backbone in another precision."""
        tables = self.bake(backbone) if self.bake else [tables.to(backbone.device, backbone.dtype) for tables in self.tables]
        return replace(self, tables=tables)

    def copy(self) -> "Plan":
        """The same run with tables of its own, whose numbers `load` replaces."""
        return replace(self, tables=[tables.map(torch.clone) for tables in self.tables])

    def load(self, other: "Plan") -> None:
        """Take the numbers of another plan of the same kind, in place."""
        for own, new in zip(self.tables, other.tables):
            for name, table in own.to_tensors().items():
                table.copy_(getattr(new, name))


@dataclass(frozen=True)
class _Part:
    """The first steps of a conditioning."""

    whole: Any
    count: int

    @property
    def head(self) -> Tensor:
        return self.whole.head

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Any:
        return self.whole[step]

    def __iter__(self) -> Iterator[Any]:
        return (self.whole[step] for step in range(self.count))


def make_plan(backbone: Backbone, request: RestoreRequest) -> Plan:
    """The plan of a request, whose task is not auto; errors as those of `Restorer.restore`."""
    if request.task is None or request.supersample is not None:
        return _plan_of(backbone, request, request.supersample == 2)
    plain = _plan_of(backbone, request, False)
    try:
        fine = _plan_of(backbone, request, True)
    except MixedFineness:
        return plain
    if all(stage.supersample == 1 for stage in fine.stages):
        return plain
    first, *others = [
        replace(one, following=(), fine=replace(other, following=()) if other.supersample > 1 else None)
        for one, other in zip(plain.stages, fine.stages)
    ]
    return replace(first, following=tuple(others))


def _plan_of(backbone: Backbone, request: RestoreRequest, fine: bool) -> Plan:
    """The plan of a request with its fine prompts, where its tasks have any, or with the others."""
    chosen = chosen_prompts(backbone, request.task, request.prompt, fine)
    asked = request.supersample if request.task is None else None  # a task's prompts are chosen by it
    if asked and (other := [one.supersample for one, _ in chosen if one.supersample != asked]):
        raise EngineError(f"a prompt was learned for supersample {other[0]}, not for {asked}: leave it out, or give a task")
    prompts = [(one, weight * request.strength) for one, weight in chosen]
    if not prompts and request.t0 is None:
        raise EngineError(f"say what to repair: a task ({', '.join(backbone.spec.tasks)}) or a prompt")
    looked_up = backbone.spec.released_timesteps if SCHEDULES[request.schedule].released else None

    def run_of(prompts: list[tuple[Prompt, float]], mix: str) -> Plan:
        table = run_table(request, [one for one, _ in prompts])
        return bake(backbone, prompts, table, mix, looked_up(table.times) if looked_up else None)

    mix = backbone.spec.mix if request.mix == "auto" else request.mix
    if mix != "turn":
        return run_of(prompts, mix)
    first, *others = [run_of([one], "residual") for one in prompts] or [run_of([], "residual")]
    return replace(first, following=tuple(others))


def run_table(request: RestoreRequest, prompts: Sequence[Prompt]) -> StepTable:
    """The sampler's steps for a run with these prompts; `EngineError` for numbers that no run can have."""
    t0 = prompts[0].t0 if request.t0 is None else request.t0
    try:
        return make_table(request.schedule, t0, request.steps or evaluations(prompts, request.schedule), request.order)
    except ValueError as error:
        raise EngineError(str(error)) from error


def of_file(file: Any, device: torch.device) -> Plan:
    """The plan that an engine file holds, its conditioning on `device`."""
    tables = [tables.to(device, file.backbone.dtype) for tables in file.tables]
    detail = file.about.get("detail", "model")
    how = {"detail": detail, "deconvolve": file.about.get("deconvolve", False), "supersample": file.about.get("supersample", 1)}
    return Plan(file.table, tables, views=views(file.backbone, file.table.times[:-1]), **how)


def released_size(backbone: Backbone) -> tuple[int, int]:
    """Height and width of the published protocol; `EngineError` for a backbone that has none."""
    if backbone.spec.released_size is None:
        raise EngineError(f"{backbone.name} has no published size; leave the size at native")
    return backbone.spec.released_size


@torch.no_grad()
def bake(
    backbone: Backbone,
    prompts: list[tuple[Prompt, float]],
    table: StepTable,
    mix: str = "residual",
    timesteps: Tensor | None = None,
) -> Plan:
    """The plan of a run with these prompts along a step table.

    `timesteps` [N]: what the transformer is told at each step, 1000 times the table's times by default.
    """
    check_choice("mix", mix, ("residual", "velocity"))
    backbone.check_start(table.t0)
    if timesteps is None:
        timesteps = torch.tensor(table.times[:-1]) * 1000
    groups = [[pair] for pair in prompts] if mix == "velocity" and len(prompts) > 1 else [prompts]

    def tables(backbone: Backbone) -> list[Any]:
        return [backbone.bake(timesteps, mixed_weights(group)) for group in groups]

    detail = "input" if prompts and all(prompt.detail == "input" for prompt, _ in prompts) else "model"
    deconvolve = bool(prompts) and all(prompt.deconvolve for prompt, _ in prompts)
    finenesses = {prompt.supersample for prompt, _ in prompts} or {1}
    if len(finenesses) > 1:
        raise MixedFineness("these prompts see pictures at other finenesses: take --mix turn, or --supersample 1 with tasks")
    return Plan(table, tables(backbone), tables, views(backbone, table.times[:-1]), detail, deconvolve, *finenesses)
