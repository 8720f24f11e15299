"""`ebr-engine prompts`: look at prompt files and import released ones."""

from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.errors import EbrError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look at prompt files, and import released ones.")


@app.command("list")
def list_prompts() -> None:
    """The prompts that --task finds: bundled ones, and those in your prompt folder."""
    from rich.console import Console
    from rich.table import Table

    from ebr_engine.catalogue import BACKBONES, prompt_files
    from ebr_engine.prompts import load_prompt

    table = Table("backbone", "task", "T0", "steps", "tokens", "file", box=None, header_style="bold", pad_edge=False)
    for backbone in BACKBONES:
        for task, file in prompt_files(backbone).items():
            prompt = load_prompt(file)
            table.add_row(backbone, task, f"{prompt.t0:g}", str(prompt.steps), str(len(prompt.residual)), str(file))
    Console(soft_wrap=True).print(table)


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A prompt: .safetensors, or a released .pt.")],
) -> None:
    """What a prompt file holds: backbone, task, sizes, schedule, strength and how it was learned."""
    from rich.console import Console
    from rich.table import Table

    from ebr_engine.prompts import load_prompt

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
    from ebr_engine.prompts import load_prompt

    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a prompt file's name ends in .safetensors")
    if out.exists() and not overwrite:
        raise EbrError(f"{out} exists; add --overwrite to replace it")
    prompt = load_prompt(file)
    prompt.save(out)
    typer.echo(f"{file} -> {out}  {prompt.backbone}, task {prompt.task}, {tuple(prompt.residual.shape)}")
