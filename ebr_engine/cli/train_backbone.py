"""`ebr-engine train-backbone`: pre-train a bundled backbone from nothing."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.errors import EbrError


class Trainable(str, Enum):
    mini = "mini"
    mini_audio = "mini-audio"


def train_backbone(
    backbone: Annotated[Trainable, typer.Argument(help="The backbone to train.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.safetensors", help="The weights to write.")],
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, help="Wall-clock budget; the schedule fits it.")] = 90.0,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="FILE.safetensors", help="Begin with these weights, not random ones.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="Your own pictures and clips in place of procedural images.")
    ] = None,
    scenes: Annotated[
        Path | None, typer.Option("--scenes", metavar="FILE.safetensors", help="Keep the first images here for the next run.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Crops of 64×64 a step, or as many pixels in larger ones; 96, on a GPU 384."),
    ] = None,
    size_odds: Annotated[
        str, typer.Option("--size-odds", metavar="A,B,C", help="How often crops are of size 64, 128 and 256.")
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
    """Pre-train a bundled backbone by flow matching on material that is made on the fly; a log is kept in FILE.log.jsonl.

    mini learns from procedural images, crops of 64, 128 or 256 pixels a side. mini-audio learns from synthesised speech, music
    and noises (espeak-ng has to be installed, and ebr-engine\\[audio,train]), crops of as many frames of 16 ms. A checkpoint is
    kept in FILE.ckpt. With --from, mini's weights over the block codec (files of its first format) are turned to the lapped
    codec to begin with.

    [bold]ebr-engine train-backbone mini -o mini.safetensors --minutes 90[/]

    [bold]ebr-engine train-backbone mini-audio -o mini-audio.safetensors --minutes 50 --batch 24[/]
    """
    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a weights file's name ends in .safetensors")

    try:
        odds = tuple(float(part) for part in size_odds.split(","))
    except ValueError:
        odds = ()
    if len(odds) != 3 or not all(0 <= part < float("inf") for part in odds) or not sum(odds):
        raise EbrError(f"--size-odds takes three numbers such as 0.4,0.4,0.2, not {size_odds}")

    from importlib import import_module

    from ebr_engine.backbones.registry import spec
    from ebr_engine.training.pretrain import PretrainConfig, batch_for, line, pretrain

    course = import_module(spec(backbone.value).learning.course).COURSE
    rates = {"learning_rate": learning_rate, "decay": decay, "ema": ema}
    crops = batch_for(device) if batch is None else {"batch": batch}
    config = PretrainConfig(minutes=minutes, seed=seed, size_odds=odds, compile=compile_blocks, **crops, **rates)
    typer.echo(f"pre-training {backbone.value} for {minutes:g} minutes; see {out.with_suffix('.log.jsonl')}", err=True)
    where = {"device": device, "data": data, "scenes": scenes, "course": course}
    pretrain(out, config, resume, start=start, **where, tell=lambda progress: typer.echo(line(progress), err=True))
    typer.echo(str(out))
