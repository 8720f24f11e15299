"""A command's options from the fields of `RestoreRequest`, and those that several commands have beside them."""

from collections.abc import Callable
from dataclasses import Field
from functools import partial, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from ebr_engine.errors import EbrError
from ebr_engine.jobs.texts import prompts_of_texts
from ebr_engine.request import FIELDS, RestoreRequest, check_value

PANELS = tuple(dict.fromkeys(one.metadata["panel"] for one in FIELDS.values()))
_file = partial(typer.Option, rich_help_panel="Files")
Overwrite = Annotated[bool, _file("--overwrite", help="Replace outputs that exist; never an input.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON objects, for programs, in place of lines.")]


def takes(
    *names: str, help: dict[str, str] | None = None, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command with options of these fields in the place of its parameter `request`, which it gets whole.

    `defaults` and `help`: other ones than the fields', for this command; what has ... as its default has to be said. A prompt's
    option takes texts FILE[:WEIGHT], whose files exist; `~` is the user's folder in every path.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        given = signature(command)
        parameters = [each for one in given.parameters.values() for each in _parameters(one, names, defaults, help or {})]

        @wraps(command)
        def run(**values: Any) -> None:
            asked = {name: values.pop(name) for name in names}
            for name in names:
                if "switch" in FIELDS[name].metadata:
                    asked[name] = _switched(FIELDS[name], asked[name], values.pop(_switch_name(name)), defaults)
            asked = {name: tuple(value or ()) if FIELDS[name].default == () else value for name, value in asked.items()}
            asked = {name: value.expanduser() if isinstance(value, Path) else value for name, value in asked.items()}
            for name in names:
                check_value(FIELDS[name], asked[name], FIELDS[name].metadata["flags"][0])
            if asked.get("task") and asked.get("prompt"):
                raise EbrError("both --task and --prompt given; say what to repair by one of them, for example --task haze")
            if "prompt" in asked:
                asked["prompt"] = prompts_of_texts(asked["prompt"])
            command(request=RestoreRequest.of(**asked), **values)

        parameters.sort(key=_panel)
        run.__signature__ = given.replace(parameters=parameters)
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _parameters(one: Parameter, names: tuple[str, ...], defaults: dict[str, Any], help: dict[str, str]) -> list[Parameter]:
    if one.name != "request":
        return [one]
    made = []
    for name in names:
        about = FIELDS[name]
        default = defaults.get(name, about.default)
        made.append(
            Parameter(
                name,
                one.kind,
                default=Parameter.empty if default is ... else default or None if default == () else default,
                annotation=_option(about, help.get(name)),
            )
        )
        if "switch" in about.metadata:
            flag, _, text = about.metadata["switch"]
            option = typer.Option(flag, help=text, rich_help_panel=about.metadata["panel"])
            made.append(Parameter(_switch_name(name), one.kind, default=False, annotation=Annotated[bool, option]))
    return made


def _panel(parameter: Parameter) -> int:
    """Where a parameter stands on a help page, by its panel; others come first, in their order."""
    about = parameter.annotation.__metadata__[0]
    panel = getattr(about, "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def _option(one: Field, help: str | None = None) -> Any:
    """The annotation that typer reads."""
    about = one.metadata
    if choices := about.get("choices"):
        kind: Any = Literal[choices]
    elif one.default == ():
        kind = list[str]
    else:
        kinds = [part for part in get_args(one.type) or (one.type,) if part is not type(None)]
        kind = str if len(kinds) > 1 else kinds[0]
    if one.default is None or one.default == ():
        kind = kind | None
    settings: dict[str, Any] = {"help": help or about["help"], "rich_help_panel": about["panel"], "metavar": about["metavar"]}
    if "span" in about and not about.get("open"):
        least, most = about["span"]
        settings |= {"min": least} | ({"max": most} if most != float("inf") else {})
    if "shown" in about:
        settings["show_default"] = about["shown"]
    return Annotated[kind, typer.Option(*about["flags"], **settings)]


def _switch_name(name: str) -> str:
    return f"{name}_switch"


def _switched(one: Field, value: Any, on: bool, defaults: dict[str, Any]) -> Any:
    """The value of an option that has a short form beside it; `EbrError` when they contradict each other."""
    flag, meant, _ = one.metadata["switch"]
    if not on or value == meant:
        return value
    if value != defaults.get(one.name, one.default) and not one.metadata.get("refines"):
        raise EbrError(f"{flag} and {one.metadata['flags'][0]} {value} contradict each other")
    return value if one.metadata.get("refines") and value is not None else meant


def named(panel: str, flags: str, help: str, **more: Any) -> Any:
    """An option's description in a panel; `flags` as in `--out -o FILE`."""
    *names, metavar = flags.split(" ") if not flags.split(" ")[-1].startswith("-") else (*flags.split(" "), None)
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, **more)


def check_target(path: Path, suffix: str, what: str, overwrite: bool) -> None:
    """`EbrError` unless `path` ends in `suffix`, and does not exist or may be replaced."""
    if path.suffix != suffix:
        raise EbrError(f"{path}: {what}'s name ends in {suffix}")
    if path.exists() and not overwrite:
        raise EbrError(f"{path} exists; add --overwrite to replace it")


def prompts_asked(request: RestoreRequest) -> list[str]:
    """The prompts of one run by name; `EbrError` unless the request names some, and each is there; auto is refused."""
    from ebr_engine.jobs.work import prompts_of
    from ebr_engine.prompts.catalogue import AUTO, find_prompts

    if request.task == AUTO:
        find_prompts(request.backbone, AUTO)  # which says why not
    found = prompts_of(request)
    return [request.task] if request.task else [f"{path}:{weight:g}" for path, weight in found]


def about_plan(request: RestoreRequest, names: list[str], steps: int) -> dict[str, Any]:
    """What an engine file says of its run."""
    asked = {name: getattr(request, name) for name in ("precision", "schedule", "mix", "strength")}
    return {"prompts": names, **asked, "steps": steps}


def cluster(panel: str | None) -> Any:
    """The annotation of `--cluster` in a panel."""
    help = "Many workers on Ray: local, auto or ray://HOST:PORT; needs the extra cluster."
    return Annotated[str | None, named(panel, "--cluster WHERE", help)]


def cores(panel: str | None) -> Any:
    """The annotation of `--cluster-cores` in a panel."""
    return Annotated[int, named(panel, "--cluster-cores N", "Cores of each worker, where it has no GPU of its own.", min=1)]
