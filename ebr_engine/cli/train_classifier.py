"""`ebr-engine train-classifier`: learn to see what is wrong with a picture, for `--task auto`."""

from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.errors import EbrError


def train_classifier(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.safetensors", help="The classifier to write.")],
    iterations: Annotated[int, typer.Option("--iterations", "-n", min=1, help="Steps of AdamW.")] = 800,
    scenes: Annotated[int, typer.Option("--scenes", min=1, help="Procedural scenes to learn from.")] = 800,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
) -> None:
    """Learn the classifier behind --task auto: procedural scenes, clean, degraded once or twice; a few minutes on one core.

    [bold]ebr-engine train-classifier -o classifier.safetensors[/]
    """
    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a classifier's name ends in .safetensors")

    from ebr_engine.cli.train import LossProgress
    from ebr_engine.training.classifier import ClassifierConfig, train

    typer.echo("rendering scenes …", err=True)
    with LossProgress() as progress:
        train(out, ClassifierConfig(iterations=iterations, scenes=scenes, seed=seed), progress.step)
    typer.echo(f"{out}  {iterations} iterations, loss {progress.smooth:.4f}")
