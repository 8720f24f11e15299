"""`ebr-engine train-backbone`: pre-train `mini` from nothing."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.errors import EbrError


class Trainable(str, Enum):
    mini = "mini"


def train_backbone(
    backbone: Annotated[Trainable, typer.Argument(help="The backbone to train.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.safetensors", help="The weights to write.")],
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, help="Wall-clock budget; the schedule fits it.")] = 90.0,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="FILE.safetensors", help="Begin with these weights, not random ones.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of weights, scenes and noise.")] = 0,
    compile_blocks: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the blocks (needs a C++ compiler).")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from FILE.ckpt if it is there.")] = True,
) -> None:
    """Pre-train mini by flow matching on procedural images; a log is kept in FILE.log.jsonl, a checkpoint in FILE.ckpt.

    [bold]ebr-engine train-backbone mini -o mini.safetensors --minutes 90[/]
    """
    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a weights file's name ends in .safetensors")

    from ebr_engine.training.pretrain import PretrainConfig, pretrain

    typer.echo(f"pre-training {backbone.value} for {minutes:g} minutes; see {out.with_suffix('.log.jsonl')}", err=True)
    pretrain(out, PretrainConfig(minutes=minutes, seed=seed, compile=compile_blocks), resume, start=start)
    typer.echo(str(out))
