"""`python docs/make_tables.py`: makes the tables of the pages anew, from the code and from results; the text between them stays.

A table lies between `<!-- made: NAME -->` and `<!-- end -->`; `PARTS` has the function for each name.
"""

import re
from collections.abc import Callable
from enum import Enum
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from result_tables import RESULTS, ROOT

from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.cli.group import COMMANDS
from ebr_engine.evaluation.tables import table
from ebr_engine.jobs.manifest import COLUMNS
from ebr_engine.media.encoding import SUFFIXES
from ebr_engine.media.holdings import fates_table
from ebr_engine.media.video.formats import CONTAINERS
from ebr_engine.prompts.catalogue import ASSETS
from ebr_engine.request import FIELDS
from ebr_engine.training.config import LearnConfig

PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("reference", "research"))]
PAGES += [ASSETS / name / "MODEL_CARD.md" for name in ("mini", "mini-audio")]
PART = re.compile(r"(<!-- made: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NUMBERS = {int: "n", float: "x", str: "text", Path: "path"}


def filled(text: str) -> str:
    """The page with every table made anew; KeyError for a name that there is no function for."""
    return PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]().strip()}\n\n{found[4]}", text)


def code(text: Any) -> str:
    return f"`{text}`" if text not in ("", None) else ""


def commands() -> dict[str, Callable[..., None]]:
    """The function of every command by the command's words, as in `prompts add`."""
    found = {}
    for name, (where, _) in COMMANDS.items():
        module, attribute = where.split(":")
        target = getattr(import_module(f"ebr_engine.cli.{module}"), attribute)
        if isinstance(target, typer.Typer):
            found |= {f"{name} {one.name or one.callback.__name__}": one.callback for one in target.registered_commands}
        else:
            found[name] = target
    return found


def first_sentence(command: Callable[..., None]) -> str:
    return plain((command.__doc__ or "").split("\n\n")[0])


def plain(help: str | None) -> str:
    """Help without its markup."""
    return re.sub(r"\[/?\w*\]", "", " ".join((help or "").split()))


def commands_table() -> str:
    """Commands with what they do."""
    return table(
        ("command", "what it does"), [(code(words), first_sentence(one)) for words, one in commands().items()]
    ).markdown()


def request_tables() -> str:
    """The fields of `RestoreRequest`, a table a panel of the help page."""
    parts = []
    for panel in dict.fromkeys(one.metadata["panel"] for one in FIELDS.values()):
        rows = [field_row(one) for one in FIELDS.values() if one.metadata["panel"] == panel]
        parts.append(f"### {panel}\n\n" + table(("option", "Python", "values", "default", "meaning"), rows).markdown())
    return "\n\n".join(parts)


def field_row(one: Any) -> tuple[str, ...]:
    about = one.metadata
    flags = ", ".join(code(flag) for flag in about["flags"])
    help = about["help"] + (" \\*" if one.name in COLUMNS else "")
    if "switch" in about:
        flag, _, text = about["switch"]
        flags, help = f"{flags}, {code(flag)}", f"{help} {code(flag)}: {text[0].lower()}{text[1:]}"
    return flags, code(one.name), values_of(one), default_of(one), help


def values_of(one: Any) -> str:
    about = one.metadata
    if about.get("choices"):
        return ", ".join(map(code, about["choices"]))
    if "span" in about:
        least, most = about["span"]
        if about.get("open"):
            return f"above {least:g}, below {most:g}"
        return f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
    return "yes or no" if isinstance(one.default, bool) else (about["metavar"] or "").lower()


def default_of(one: Any) -> str:
    if shown := one.metadata.get("shown"):
        return shown
    if isinstance(one.default, bool):
        return "yes" if one.default else "no"
    return "" if one.default in (None, ()) else code(one.default)


def command_tables() -> str:
    """Every command's own options, and those of a request that it takes."""
    parts = []
    for words, command in commands().items():
        parameters = signature(command).parameters.values()
        own = [one for one in parameters if field_of(one) is None]
        common = [field_of(one) for one in parameters if field_of(one) and not one.name.endswith("_switch")]
        text = f"### ebr-engine {words}\n\n{first_sentence(command)}\n"
        if own:
            text += "\n" + table(("option", "values", "default", "meaning"), [option_row(one) for one in own]).markdown() + "\n"
        if len(common) == len(FIELDS):
            text += "\nAnd all options of a request.\n"
        elif common:
            text += f"\nAnd of a request's options: {', '.join(code(one.metadata['flags'][0]) for one in common)}.\n"
        parts.append(text)
    return "\n".join(parts)


def flags_of(about: Any) -> list[str]:
    """The flags of an option as they were declared; typer takes the first one of an annotation for a default."""
    return [flag for flag in (about.default, *(about.param_decls or ())) if isinstance(flag, str) and flag.startswith("-")]


def field_of(parameter: Parameter) -> Any:
    """The request's field that an option is of, or None for one of the command's own, or with a meaning of its own."""
    one, help = FIELDS.get(parameter.name.removesuffix("_switch")), parameter.annotation.__metadata__[0].help
    return one if one and help in (one.metadata["help"], *one.metadata.get("switch", ())[2:]) else None


def option_row(parameter: Parameter) -> tuple[str, str, str, str]:
    """Names, values, default and meaning of a command's own option or argument."""
    kind, about = get_args(parameter.annotation)[:2]
    kinds = [one for one in (get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)) if one is not type(None)]
    argument = isinstance(about, typer.models.ArgumentInfo)
    names = [about.metavar or parameter.name] if argument else flags_of(about) or [f"--{parameter.name.replace('_', '-')}"]
    if get_origin(kinds[0]) is Literal:
        values = ", ".join(map(code, get_args(kinds[0])))
    elif isinstance(kinds[0], type) and issubclass(kinds[0], Enum):
        values = ", ".join(code(one.value) for one in kinds[0])
    elif kinds[0] is bool:
        values = "yes or no"
    else:
        values = "" if argument else (about.metavar or NUMBERS.get(kinds[0], "")).lower()
    return ", ".join(map(code, names)), values, own_default(parameter, about), plain(about.help)


def own_default(parameter: Parameter, about: Any) -> str:
    value = parameter.default
    if value is Parameter.empty:
        return "required"
    if isinstance(about.show_default, str):
        return about.show_default
    if isinstance(value, bool):
        return "yes" if value else "no"
    value = value.value if isinstance(value, Enum) else value
    return code(value) if isinstance(value, (str, int, float, Path)) else ""


def settings_table() -> str:
    """The settings of a learning run."""
    rows = []
    for one in LearnConfig.__dataclass_fields__.values():
        default = {True: "true", False: "false"}.get(one.default, one.default) if isinstance(one.default, bool) else one.default
        by = " (by backbone)" if one.metadata.get("by_backbone") else ""
        rows.append((one.metadata["group"], code(one.name), code(default) + by, one.metadata["help"]))
    return table(("group", "setting", "default", "meaning"), rows).markdown()


def schedules_table() -> str:
    """The schedules by name."""
    rows = [(code(name), one.steps, one.order, "yes" if one.released else "no") for name, one in SCHEDULES.items()]
    return table(("schedule", "evaluations", "order", "times as the released code tells them"), rows).markdown()


def columns_list() -> str:
    """The columns of a manifest."""
    return ", ".join(map(code, COLUMNS)) + "."


def formats_list() -> str:
    """What is written."""
    return f"* Pictures: {', '.join(map(code, SUFFIXES))}.\n* Clips: {', '.join(map(code, CONTAINERS))}; and frames, one a file."


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands_table,
    "request": request_tables,
    "options": command_tables,
    "settings": settings_table,
    "schedules": schedules_table,
    "columns": columns_list,
    "formats": formats_list,
    "fates": fates_table,
    **RESULTS,
}


def main() -> None:
    """Write the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
