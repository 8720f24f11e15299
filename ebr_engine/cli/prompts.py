"""`ebr-engine prompts`: look at prompt files, convert released ones, and install them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ebr_engine.errors import EbrError, PromptError

if TYPE_CHECKING:
    from ebr_engine.prompts.prompt import Prompt

WIDE = 10_000  # columns: what a program reads is not cut into lines
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, show, average, add and import prompts.")


@app.command("list")
def list_prompts() -> None:
    """The prompts that --task finds: bundled ones, and yours, which go before them; fine/ones see small pictures finer."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ebr_engine.backbones.registry import BACKBONES
    from ebr_engine.prompts.catalogue import ASSETS, FINE, prompt_files, with_fine

    columns = ("backbone", "task", "T0", "steps", "tokens", "origin", "file")
    table, damaged = Table(*columns, box=None, header_style="bold", pad_edge=False), False
    table.columns[-1].overflow = "fold"
    for backbone in BACKBONES:
        for file, _ in with_fine((file, 1.0) for file in prompt_files(backbone).values()):
            task = f"{FINE}/{file.stem}" if file.parent.name == FINE else file.stem
            origin = "bundled" if file.is_relative_to(ASSETS) else "yours"
            try:
                prompt = _load(file, backbone)
                facts = (f"{prompt.t0:g}", str(prompt.steps), str(prompt.residual.shape[-2]))
            except PromptError:  # one bad file must not hide the others
                facts, damaged = ("[red]damaged[/]", "", ""), True
            table.add_row(backbone, escape(task), *facts, origin, escape(str(file)))
    console = Console()
    console.width = console.width if console.is_terminal else WIDE
    console.print(table)
    if damaged:
        typer.echo("What is wrong with a damaged one: ebr-engine prompts show FILE")


@app.command("add")
def add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A prompt: .safetensors, or a released .pt.")],
    task: Annotated[
        str | None, typer.Option("--task", "-t", metavar="NAME", show_default="the file's", help="The name to find it by.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", "-b", metavar="NAME", show_default="the file's", help="Install it for this one."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace your prompt of that name.")] = False,
) -> None:
    """Check a prompt and install it in your prompt folder, so that restore --task finds it.

    [bold]ebr-engine prompts add wan_rain.pt[/], then [bold]ebr-engine restore clip.mp4 --backbone wan --task rain[/]
    """
    from ebr_engine.prompts.catalogue import installed_file

    prompt = _load(file, backbone)
    task = prompt.task or file.stem if task is None else task
    if not TASK_NAME.fullmatch(task):
        raise EbrError(f"{task!r} cannot name a task: use letters, digits, - and _ (give the name with --task)")
    backbone = backbone or prompt.backbone
    target = installed_file(backbone, task)
    if target.exists() and not overwrite:
        raise EbrError(f"{target} exists; add --overwrite to replace it, or give another name with --task")
    replace(prompt, task=task).save(target)
    if (model := _model(prompt, backbone)) is None:
        sizes = f"width {prompt.residual.shape[-1]} and {len(prompt.alpha)} blocks"
        typer.echo(f"note: no published {backbone} model has {sizes}; it fits a model of these sizes only", err=True)
    typer.echo(f"{file} -> {target}  {model or backbone}, T0 {prompt.t0:g}, {prompt.steps} steps")
    typer.echo(f"Use it: ebr-engine restore INPUT --backbone {backbone} --task {task}")


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A prompt: .safetensors, or a released .pt.")],
) -> None:
    """What a prompt file holds: backbone, task, sizes, schedule, strength and how it was learned."""
    from rich.console import Console
    from rich.table import Table

    from ebr_engine.prompts.prompt import load_prompt

    prompt = load_prompt(file)
    alpha = prompt.alpha
    rows = {
        "file": str(file),
        "backbone": prompt.backbone + (f" ({prompt.base_model})" if prompt.base_model else ""),
        "task": prompt.task or "not said",
        "injection": prompt.injection,
        "residual": f"{tuple(prompt.residual.shape)}  std {prompt.residual.std():.4g}",
        "alpha": f"{tuple(alpha.shape)}  mean {alpha.mean():.4g}, {alpha.min():.4g} to {alpha.max():.4g}",
        "schedule": f"T0 {prompt.t0:g}, t_min {prompt.t_min:g}, {prompt.steps} steps",
    }
    if prompt.supersample > 1:
        rows["sees"] = f"pictures {prompt.supersample} times finer than their pixels"
    if prompt.deconvolve:
        rows["before"] = "the blur that a picture shows is taken out"
    rows |= {f"training: {name}": str(value) for name, value in prompt.training.items()}
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(soft_wrap=True).print(table)


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="A prompt as the authors released it.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.safetensors", help="Where to write ours.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Convert a released .pt prompt to .safetensors; the file is read without running any code in it."""
    from ebr_engine.prompts.prompt import load_prompt

    _check_target(out, overwrite)
    prompt = load_prompt(file)
    prompt.save(out)
    typer.echo(f"{file} -> {out}  {prompt.backbone}, task {prompt.task}, {tuple(prompt.residual.shape)}")


@app.command("average")
def average(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A prompt.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="One that went on from it, or was learned as it was.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.safetensors", help="Where to write the prompt between them.")],
    share: Annotated[float, typer.Option("--share", metavar="X", help="How much of the second, from 0 to 1.")] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """The prompt between two of a task: what went on from the first on other damage often serves both, averaged with it."""
    from ebr_engine.prompts.mixing import averaged

    _check_target(out, overwrite)
    prompt = averaged(_load(first, None), _load(second, None), share)
    prompt.save(out)
    typer.echo(f"{first} and {second} -> {out}  {prompt.backbone}, task {prompt.task}, {share:g} of the second")


def _check_target(out: Path, overwrite: bool) -> None:
    """`EbrError` where no prompt can be written to `out`."""
    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a prompt file's name ends in .safetensors")
    if out.exists() and not overwrite:
        raise EbrError(f"{out} exists; add --overwrite to replace it")


def _load(file: Path, backbone: str | None) -> "Prompt":
    """A prompt, checked to be taken by `backbone` if one is given."""
    from ebr_engine.prompts.prompt import load_prompt

    prompt = load_prompt(file)
    if backbone is not None and not prompt.is_for(backbone):
        raise PromptError(f"{file} is for the {prompt.backbone} backbone, not for {backbone}")
    return prompt


def _model(prompt: "Prompt", backbone: str) -> str | None:
    """The published model of a backbone that a prompt's sizes fit; None if there is no such."""
    from ebr_engine.backbones.registry import spec

    sizes = prompt.residual.shape[-1], len(prompt.alpha)
    named = spec(backbone).configs.items()
    return next((name for name, config in named if (config.width, config.blocks) == sizes), None)
