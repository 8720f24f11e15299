"""`python docs/make_tables.py`: makes the tables of the pages anew, from the code and from results; the text between them stays.

A table lies between `<!-- made: NAME -->` and `<!-- end -->`; `PARTS` has the function for each name.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from statistics import fmean
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.cli.group import COMMANDS
from ebr_engine.jobs.manifest import COLUMNS
from ebr_engine.media.encoding import SUFFIXES
from ebr_engine.media.holdings import fates_table
from ebr_engine.media.video.formats import CONTAINERS
from ebr_engine.request import FIELDS
from ebr_engine.training.config import LearnConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("reference", "research"))]
PART = re.compile(r"(<!-- made: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CLAIMS = (
    "a_space",
    "b_process",
    "c_secretly_knows",
    "d_schedule",
    "e_prompt",
    "f_mixtures",
    "g_baselines",
    "h_adaptive",
)
NUMBERS = {int: "n", float: "x", str: "text", Path: "path"}


def filled(text: str) -> str:
    """The page with every table made anew; KeyError for a name that there is no function for."""
    return PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]().strip()}\n\n{found[4]}", text)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


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
    return table(("command", "what it does"), ((code(words), first_sentence(one)) for words, one in commands().items()))


def request_tables() -> str:
    """The fields of `RestoreRequest`, a table a panel of the help page."""
    parts = []
    for panel in dict.fromkeys(one.metadata["panel"] for one in FIELDS.values()):
        rows = [field_row(one) for one in FIELDS.values() if one.metadata["panel"] == panel]
        parts.append(f"### {panel}\n\n" + table(("option", "Python", "values", "default", "meaning"), rows))
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
            text += "\n" + table(("option", "values", "default", "meaning"), map(option_row, own)) + "\n"
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
    return table(("group", "setting", "default", "meaning"), rows)


def schedules_table() -> str:
    """The schedules by name."""
    rows = ((code(name), one.steps, one.order, "yes" if one.released else "no") for name, one in SCHEDULES.items())
    return table(("schedule", "evaluations", "order", "times as the released code tells them"), rows)


def columns_list() -> str:
    """The columns of a manifest."""
    return ", ".join(map(code, COLUMNS)) + "."


def formats_list() -> str:
    """What is written."""
    return f"* Pictures: {', '.join(map(code, SUFFIXES))}.\n* Clips: {', '.join(map(code, CONTAINERS))}; and frames, one a file."


def quality_scores() -> list[dict[str, Any]]:
    """Every score of `mini` on the photos, as `ebr-engine eval` wrote them."""
    return json.loads((ROOT / "ebr_engine/assets/mini/quality.json").read_text(encoding="utf-8"))["scores"]


def quality_brief() -> str:
    """PSNR of the inputs and of what the prompts restore, a task a column."""
    scores = quality_scores()
    tasks, rows = (list(dict.fromkeys(one[key] for one in scores)) for key in ("task", "row"))
    means = {(one["task"], one["row"]): [] for one in scores}
    for one in scores:
        means[one["task"], one["row"]].append(one["psnr"])
    before, after = ([fmean(means[task, row]) for task in tasks] for row in (rows[0], rows[-1]))
    gains = [new - old for old, new in zip(before, after)]
    lines = [("degraded", before, "{:.2f}"), ("restored", after, "{:.2f}"), ("gain", gains, "{:+.2f}")]
    return table(("PSNR in dB", *tasks), ((name, *map(form.format, values)) for name, values, form in lines))


def quality_table(value: str, digits: int) -> str:
    """Means by task of the input, the empty prompt, the naive prompt and the prompt."""
    from ebr_engine.evaluation.quality import markdown

    return markdown(quality_scores(), value, digits)


def claim_table(name: str) -> str:
    """The table of an experiment on the method's claims as it stands in its results, how much it has seen, and its command."""
    lines = (ROOT / f"benchmarks/results/claims/{name}.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    seen = next(line for line in lines if line.startswith("* ") and " photos of " in line)
    photos, seeds = re.search(r"(\d+ photos of \d+ x \d+) pixels", seen)[1], re.search(r"\d+ seeds?", seen)[0]
    command = next(line.strip() for line in lines if line.startswith("    python -m "))
    plot = f"[plot](../benchmarks/results/claims/{name}.svg)"
    return "\n".join((*rows, "", f"{photos.replace(' x ', '×')}, {seeds}, {plot}: `{command}`"))


def backbones_table() -> str:
    """Sizes, costs and licences of the backbones, and what has been run of them."""
    import torch

    from ebr_engine.backbones.registry import named_configs

    head = ("model", "`--backbone`", "on the device", "in bf16", "in fp8", "never there", "a step", "licence", "run so far")
    flop, rows = step_flop(), []
    for name, (spec, config) in named_configs().items():
        parts = spec.parameters(config, torch.bfloat16)
        trunk, conditioner = (rounded(parts[f"{half}_parameters"], "B") for half in ("trunk", "conditioner"))
        sizes = (rounded(size, "GB") for size in (parts["trunk_bytes"], fp8_bytes(spec, config)))
        step = f"{flop[name] / 1e12:.3g} TFLOP, {described(spec)}" if name in flop else ""
        rows.append((name, code(spec.name), trunk, *sizes, conditioner, step, spec.licences.get(name, ""), spec.ran))
    return table(head, rows)


def rounded(count: int, billions: str) -> str:
    """A number of parameters (`billions` is B) or bytes (GB), with three digits."""
    return f"{count / 1e9:.3g} {billions}" if count >= 1e9 else f"{count / 1e6:.3g} M{billions[1:]}"


def fp8_bytes(spec: Any, config: Any) -> int:
    """Bytes of a trunk in fp8."""
    import torch

    from ebr_engine.backbones.layers import quantize_trunk

    with torch.device("meta"):
        trunk = spec.trunk(config).to(torch.bfloat16)
    quantize_trunk(trunk)
    return sum(tensor.nbytes for tensor in trunk.state_dict().values())


def described(spec: Any) -> str:
    """The size of picture or clip that a backbone's numbers are of."""
    height, width = spec.native_size
    return f"{width}×{height}" + (f", {spec.chunk[0]} frames" if spec.knows_time else "")


def step_flop() -> dict[str, float]:
    """Operations of one step at a backbone's own size with one prompt, by the name of its size."""
    from ebr_engine.backbones.registry import BACKBONES, spec
    from ebr_engine.backbones.views import room_of
    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.prompts.catalogue import prompt_files

    works = json.loads((ROOT / "benchmarks/results/roofline.json").read_text(encoding="utf-8"))["workloads"]
    found = {work["backbone"]: work["totals"]["flop"] for work in works}
    for one in map(spec, BACKBONES):
        if one.bundled:  # it is here, and can be asked
            backbone = (restorer := Restorer(one.name, device="cpu", precision="fp32")).backbone
            plan = restorer.plan(next(iter(prompt_files(one.name))))
            room, config = room_of(backbone.codec, plan.views), backbone.trunk.config
            cells = (side // backbone.codec.spatial + room for side in one.native_size)
            found[next(iter(one.configs))] = one.flop(config, (1, config.latent_channels, 1, *cells), plan.entries[0])
    return found


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands_table,
    "request": request_tables,
    "options": command_tables,
    "settings": settings_table,
    "schedules": schedules_table,
    "columns": columns_list,
    "formats": formats_list,
    "fates": fates_table,
    "backbones": backbones_table,
    "quality": quality_brief,
    "psnr": partial(quality_table, "psnr", 2),
    "ssim": partial(quality_table, "ssim", 3),
    **{f"claim-{name[0]}": partial(claim_table, name) for name in CLAIMS},
}


def main() -> None:
    """Write the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
