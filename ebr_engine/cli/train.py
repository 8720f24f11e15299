"""`ebr-engine train`: learn a prompt on the frozen backbone."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ebr_engine.cli.learning_options import TRAIN, with_settings
from ebr_engine.cli.telling import warnings_told
from ebr_engine.errors import EbrError

_what = partial(typer.Option, rich_help_panel="What to learn")


@with_settings(*TRAIN)
def train(
    given: dict[str, Any],
    out: Annotated[
        Path | None, _what("--out", "-o", metavar="FILE.safetensors", help="The prompt to write; its run lies beside it.")
    ] = None,
    config: Annotated[
        Path | None, _what("--config", "-c", metavar="FILE.toml", help="Settings; what the command line says comes first.")
    ] = None,
    settings: Annotated[
        list[str] | None, _what("--set", "-s", metavar="KEY=VALUE...", help="Any setting; --settings lists them.")
    ] = None,
    list_settings: Annotated[bool, _what("--settings", help="Print every setting with its meaning, as TOML, and leave.")] = False,
    overwrite: Annotated[bool, _what("--overwrite", help="Replace a prompt that exists.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", rich_help_panel="Run", help="Go on from an interrupted run's checkpoint.")
    ] = True,
) -> None:
    """Learn a prompt: pairs on the bridge, Adam on the prompt and its α only; nothing of the transformer changes.

    Without --data, mini learns from procedural scenes that are degraded on the fly. Ctrl-C keeps a checkpoint; the same
    command goes on. torchrun shares each batch among processes.

    [bold]ebr-engine train --task haze -o haze.safetensors[/]

    [bold]ebr-engine train --task fog --data pairs/ -o fog.safetensors --backbone wan --set checkpointing=true[/]
    """
    from ebr_engine.training.config import LearnConfig, described, to_toml

    if list_settings:
        typer.echo(to_toml(LearnConfig(task="haze")), nl=False)
        return
    chosen = configured(config, settings, given)
    if out is None:
        raise EbrError("name the prompt to write with --out FILE.safetensors")

    from ebr_engine.engine.devices import choose_device
    from ebr_engine.settings import process
    from ebr_engine.training.loop import check_request, learn, run_folder

    check_request(chosen, out, overwrite)
    choose_device(chosen.device)
    if process()[0]:  # another one of these processes tells
        learn(chosen, out, resume=resume, overwrite=overwrite)
        return
    for line in described(chosen):
        typer.echo(line, err=True)
    if not chosen.data:
        typer.echo("rendering scenes …", err=True)

    def tell_resumed(iteration: int, checkpoint: Path) -> None:
        line = f"going on after iteration {iteration} of {chosen.iterations}, from {checkpoint}; --no-resume starts anew"
        typer.echo(line, err=True)

    with warnings_told(), LossProgress() as progress:
        learn(chosen, out, resume=resume, overwrite=overwrite, callback=progress.step, on_resume=tell_resumed)
    report = run_folder(out) / "report.md"
    typer.echo(f"{out}  {chosen.task}, {chosen.bridge}, {chosen.iterations} iterations, loss {progress.smooth:.5g}; see {report}")


def configured(config: Path | None, assignments: list[str] | None, given: dict[str, Any]) -> Any:
    """The settings of a file, of `--set`, and of options that were given, the later ones first; `EbrError` without a task."""
    from ebr_engine.training.config import read_assignments, read_toml, resolve

    values = (read_toml(config) if config else {}) | read_assignments(assignments or []) | given
    if not values.get("task"):
        raise EbrError("name what the prompt is for with --task")
    return resolve(values)


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
