"""What of a run does not depend on a pixel."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.loading import Backbone
from ebr_engine.bridge import StepTable
from ebr_engine.codecs import Codec
from ebr_engine.errors import EngineError
from ebr_engine.sampler import Steps, Velocity, mean_velocity, place
from ebr_engine.spinning import View, seen, spun


@dataclass(frozen=True, eq=False)
class Plan:
    """The sampler's steps, and the transformer's tables for them."""

    table: StepTable
    tables: list[Any]  # a conditioning for every velocity that is averaged: one, unless prompts are mixed by velocity
    bake: Callable[[Backbone], list[Any]] | None = None  # the tables for the same backbone in another precision
    views: tuple[View, ...] = ()  # how the transformer sees the state in each step
    then: "Plan | None" = None  # a run of its own over the result

    @property
    def stages(self) -> list["Plan"]:
        """The runs, one over the result of the other."""
        return [self, *(self.then.stages if self.then else [])]

    def check_single(self) -> None:
        """Raise `EngineError` where more than one run is planned."""
        if self.then:
            raise EngineError("a file holds one run; make one for each prompt, or mix them with --mix residual")

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
        shapes = tuple((tuple(x.shape), x.dtype) for tables in self.tables for x in tensors_of(tables))
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

    def with_precision(self, parts: Backbone) -> "Plan":
        """The same run on the same backbone in another precision."""
        tables = self.bake(parts) if self.bake else [tables.to(parts.device, parts.dtype) for tables in self.tables]
        return replace(self, tables=tables)

    def copy(self) -> "Plan":
        """The same run with tables of its own, whose numbers `load` replaces."""
        return replace(self, tables=[_mapped(torch.clone, tables) for tables in self.tables])

    def load(self, other: "Plan") -> None:
        """Take the numbers of another plan of the same kind, in place."""
        for own, new in zip(self.tables, other.tables):
            for target, source in zip(tensors_of(own), tensors_of(new)):
                target.copy_(source)


def chained(first: Plan, others: Sequence[Plan]) -> Plan:
    """One run after the other."""
    return replace(first, then=chained(others[0], others[1:])) if others else first


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


def tensors_of(conditioning: Any) -> list[Tensor]:
    """All tensors of a backbone's tables, in order."""
    values = (getattr(conditioning, field.name) for field in fields(conditioning))
    return [x for value in values for x in (value if isinstance(value, tuple) else (value,))]


def _mapped(function: Callable[[Tensor], Tensor], conditioning: Any) -> Any:
    """The same tables with `function` of every tensor."""
    values = {field.name: getattr(conditioning, field.name) for field in fields(conditioning)}
    return replace(
        conditioning,
        **{name: tuple(map(function, value)) if isinstance(value, tuple) else function(value) for name, value in values.items()},
    )
