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
    batch: Annotated[int, typer.Option("--batch", min=1, help="Crops of 64×64 a step, or as many pixels in larger ones.")] = 96,
    size_odds: Annotated[
        str, typer.Option("--size-odds", metavar="A,B,C", help="How often crops are 64, 128 and 256 pixels a side.")
    ] = "0.4,0.4,0.2",
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0, help="Of Muon; the rest has half of it.")] = 2e-3,
    decay: Annotated[float, typer.Option("--decay", min=0.01, max=1.0, help="Share of the run in which it falls to 0.")] = 0.35,
    ema: Annotated[float, typer.Option("--ema", min=0.0, max=0.9999, help="Decay of the average that is written.")] = 0.999,
    seed: Annotated[int, typer.Option("--seed", help="Of weights, scenes and noise.")] = 0,
    compile_blocks: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the blocks (needs a C++ compiler).")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from FILE.ckpt if it is there.")] = True,
) -> None:
    """Pre-train mini by flow matching on procedural images; a log is kept in FILE.log.jsonl, a checkpoint in FILE.ckpt.

    With --from, weights over the block codec (files of mini's first format) are turned to the lapped codec to begin with.

    [bold]ebr-engine train-backbone mini -o mini.safetensors --minutes 90[/]
    """
    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a weights file's name ends in .safetensors")

    try:
        odds = tuple(float(part) for part in size_odds.split(","))
    except ValueError:
        odds = ()
    if len(odds) != 3 or not all(0 <= part < float("inf") for part in odds) or not sum(odds):
        raise EbrError(f"--size-odds takes three numbers such as 0.4,0.4,0.2, not {size_odds}")

    from ebr_engine.training.pretrain import PretrainConfig, pretrain

    rates = {"learning_rate": learning_rate, "decay": decay, "ema": ema}
    config = PretrainConfig(minutes=minutes, seed=seed, batch=batch, size_odds=odds, compile=compile_blocks, **rates)
    typer.echo(f"pre-training {backbone.value} for {minutes:g} minutes; see {out.with_suffix('.log.jsonl')}", err=True)
    pretrain(out, config, resume, start=start)
    typer.echo(str(out))
