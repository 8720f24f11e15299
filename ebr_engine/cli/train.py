"""`ebr-engine train`: learn a prompt on the frozen backbone."""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.errors import EbrError


class Loss(str, Enum):
    pixel = "pixel"
    x0 = "x0"
    velocity = "velocity"


class Bridge(str, Enum):
    ebr = "ebr"
    naive = "naive"
    ddbm = "ddbm"


def train(
    task: Annotated[str, typer.Option("--task", "-t", metavar="NAME", help="haze, rain, snow, blur or lowlight.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.safetensors", help="The prompt to write.")],
    backbone: Annotated[str, typer.Option("--backbone", help="The frozen backbone; this version has: mini.")] = "mini",
    model: Annotated[Path | None, typer.Option("--model", help="Another weights file of that backbone.")] = None,
    bridge: Annotated[
        Bridge, typer.Option("--bridge", help="The process to learn by; naive and ddbm for comparison.")
    ] = Bridge.ebr,
    loss: Annotated[
        Loss, typer.Option("--loss", help="Error of the clean estimate in pixels or latents, or velocity.")
    ] = Loss.pixel,
    t0: Annotated[float, typer.Option("--t0", help="Where the bridge starts, between 0 and 1.")] = 0.4,
    power: Annotated[float, typer.Option("--power", help="Times are T0·u^power; below 1 favours early steps.")] = 1.0,
    tokens: Annotated[int, typer.Option("--tokens", help="Rows of the prompt.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="Initial strength in every block.")] = 0.1,
    iterations: Annotated[int, typer.Option("--iterations", "-n", help="Steps of Adam.")] = 300,
    batch: Annotated[int, typer.Option("--batch", help="Crops an iteration.")] = 32,
    size: Annotated[int, typer.Option("--size", help="Side of the crops in pixels.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of Adam, for the prompt and α.")] = 0.03,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from an interrupted run's checkpoint.")] = True,
) -> None:
    """Learn a prompt: procedural scenes, degraded on the fly, pairs on the bridge, Adam on the prompt and its α only.

    Ctrl-C keeps a checkpoint; the same command goes on.

    [bold]ebr-engine train --task haze -o haze.safetensors[/]
    """
    if backbone != "mini":
        raise EbrError(f"unknown backbone {backbone!r}; this version learns on: mini")
    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a prompt file's name ends in .safetensors")

    from ebr_engine.engine import choose_device
    from ebr_engine.training.learning import LearnConfig, learn

    config = LearnConfig(
        task=task,
        bridge=bridge.value,
        loss=loss.value,
        t0=t0,
        power=power,
        tokens=tokens,
        alpha=alpha,
        iterations=iterations,
        batch=batch,
        size=size,
        learning_rate=learning_rate,
        seed=seed,
    )
    chosen = str(choose_device(device))
    typer.echo("rendering scenes …", err=True)
    with LossProgress() as progress:
        learn(config, out, model=model, device=chosen, resume=resume, callback=progress.step)
    typer.echo(f"{out}  {task}, {config.bridge}, {iterations} iterations, loss {progress.smooth:.5g}")


class LossProgress:
    """A bar with the smoothed loss on a terminal; a line every tenth of the run anywhere else."""

    def __enter__(self) -> "LossProgress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn())
        console = Console(stderr=True)
        self.smooth = float("nan")
        self.started = time.monotonic()
        self.bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.task = self.bar.add_task("", total=None, loss="") if self.bar else None
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, iteration: int, iterations: int, loss: float) -> None:
        """`iteration` of `iterations` is done."""
        self.smooth = loss if self.smooth != self.smooth else 0.95 * self.smooth + 0.05 * loss
        if self.bar:
            self.bar.update(self.task, completed=iteration, total=iterations, loss=f"{self.smooth:.5f}")
        elif iteration % max(1, iterations // 10) == 0:
            seconds = time.monotonic() - self.started
            typer.echo(f"iteration {iteration}/{iterations}  loss {self.smooth:.5f}  {seconds:.0f} s", err=True)
