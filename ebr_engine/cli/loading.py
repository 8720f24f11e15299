"""Which model a command loads: options that several commands have, as one parameter of theirs."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.cli import options

if TYPE_CHECKING:
    from ebr_engine.engine.restorer import Restorer

_PLACED = ("device", "offload", "compile", "max_memory", "low_memory")  # what an engine file leaves open


@dataclass(frozen=True)
class BaseModel:
    """The options that say which backbone, and where its weights come from."""

    backbone: options.Backbone = "mini"
    model: options.Model = None
    revision: options.Revision = None
    offline: options.Offline = False
    context: options.Context = None
    vae: options.Vae = None

    def load(self, engine: Path | None = None, **asked: Any) -> "Restorer":
        """Load it, or an engine file in its place; `asked` are more options under their names, as `Restorer` takes them."""
        from ebr_engine.engine.restorer import Restorer

        asked = {name: plain(value) for name, value in asked.items()}
        if engine:
            return Restorer.from_engine(engine, vae=self.vae, **{name: asked[name] for name in _PLACED if name in asked})
        return Restorer(**vars(self), **asked)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: the fields of its parameters that are dataclasses are options among the others."""
    given = signature(command)
    groups = {name: one.annotation for name, one in given.parameters.items() if is_dataclass(one.annotation)}
    parameters: list[Parameter] = []
    for name, one in given.parameters.items():
        inside = fields(groups[name]) if name in groups else ()
        parameters += [Parameter(x.name, one.kind, default=x.default, annotation=x.type) for x in inside] or [one]

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})
        command(**values)

    run.__signature__ = given.replace(parameters=parameters)
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def plain(option: Any) -> Any:
    """What an option says: a choice's value."""
    return option.value if isinstance(option, Enum) else option
