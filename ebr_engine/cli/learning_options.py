"""The options of commands that learn, made from the settings of a learning run: none is listed twice."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, Literal

import typer

from ebr_engine.training.config import SETTINGS

PANELS = ("What to learn", "Model", "Data", "Learning", "Run")
TRAIN = tuple(name for panel in PANELS for name, one in SETTINGS.items() if one.metadata.get("panel") == panel)


def with_settings(*names: str, panels: bool = True, **shown: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: options of the settings `names` in place of the command's first parameter, which gets those that were given.

    `panels`: whether the help page groups them; `shown`: defaults in words that are the command's own.
    """
    options = [_option(name, shown[name] if name in shown else _default(name), panels) for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in list(signature(command).parameters.values())[1:]]

        @wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command({name: value for name, value in given.items() if value is not None}, **values)

        parameters = [*options, *own]
        run.__signature__ = signature(command).replace(parameters=parameters)
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _option(name: str, shown: str, panels: bool) -> Parameter:
    about = SETTINGS[name].metadata
    kind = str if name == "size" else SETTINGS[name].type
    if "choices" in about:
        kind = Literal[about["choices"]]
    flags = (f"--{name.replace('_', '-')}", *([about["short"]] if "short" in about else []))
    panel = about.get("panel") if panels else None
    more = {"metavar": about.get("metavar"), "show_default": shown or False, "rich_help_panel": panel}
    option = typer.Option(*flags, help=about["help"].replace("`", ""), **more)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _default(name: str) -> str:
    """A setting's default in words."""
    one = SETTINGS[name]
    if one.metadata.get("by_backbone"):
        return "by backbone"
    return f"{one.default:g}" if isinstance(one.default, float) else str(one.default)
