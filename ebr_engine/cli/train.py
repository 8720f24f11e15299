"""`ebr-engine train`: learn a prompt on the frozen backbone."""

import time
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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


class BadData(str, Enum):
    refuse = "refuse"
    skip = "skip"


_what = partial(typer.Option, rich_help_panel="What to learn")
_model = partial(typer.Option, rich_help_panel="Model")
_data = partial(typer.Option, rich_help_panel="Data")
_learning = partial(typer.Option, rich_help_panel="Learning")
_run = partial(typer.Option, rich_help_panel="Run")


def train(
    task: Annotated[
        str | None,
        _what("--task", "-t", metavar="NAME", help="haze, rain, snow, blur or lowlight; with --data any name."),
    ] = None,
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
    backbone: Annotated[
        str | None, _model("--backbone", "-b", metavar="NAME", show_default="mini", help="mini, wan or flux.")
    ] = None,
    model: Annotated[
        str | None, _model("--model", "-m", metavar="SOURCE", show_default="the backbone's own", help="Other weights of it.")
    ] = None,
    context: Annotated[
        str | None, _model("--context", metavar="FILE", help="The empty text, from ebr-engine cache-text.")
    ] = None,
    precision: Annotated[
        str | None,
        _model("--precision", metavar="NAME", show_default="auto", help="Of the transformer: auto, bf16, fp32 or fp8."),
    ] = None,
    data: Annotated[
        str | None,
        _data(
            "--data",
            "-d",
            metavar="PATH",
            show_default="procedural scenes",
            help="A folder with input/ and target/ (or another known layout), or a JSON list.",
        ),
    ] = None,
    bad_data: Annotated[
        BadData | None,
        _data("--bad-data", show_default="refuse", help="A pair that cannot be used: refuse, or skip and name it."),
    ] = None,
    size: Annotated[
        str | None, _data("--size", metavar="N or HxW", show_default="by backbone", help="Height and width of the crops.")
    ] = None,
    frames: Annotated[
        int | None, _data("--frames", metavar="N", show_default="by backbone", help="Frames of a crop (wan: 4n + 1).")
    ] = None,
    validation: Annotated[
        str | None, _data("--validation", metavar="PATH", help="Pairs to validate on; see also --set validate_every=N.")
    ] = None,
    bridge: Annotated[
        Bridge | None,
        _learning("--bridge", show_default="ebr", help="The process to learn by; naive and ddbm for comparison."),
    ] = None,
    loss: Annotated[
        Loss | None,
        _learning("--loss", show_default="by backbone", help="Error of the clean estimate in pixels or latents, or velocity."),
    ] = None,
    t0: Annotated[float | None, _learning("--t0", show_default="0.4", help="Where the bridge starts, between 0 and 1.")] = None,
    power: Annotated[
        float | None, _learning("--power", show_default="1", help="Times are T0·u^power; below 1 favours early steps.")
    ] = None,
    tokens: Annotated[int | None, _learning("--tokens", show_default="by backbone", help="Rows of the prompt.")] = None,
    alpha: Annotated[float | None, _learning("--alpha", show_default="0.1", help="Initial strength in every block.")] = None,
    iterations: Annotated[int | None, _learning("--iterations", "-n", show_default="300", help="Steps of the optimizer.")] = None,
    batch: Annotated[int | None, _learning("--batch", show_default="by backbone", help="Crops an iteration.")] = None,
    learning_rate: Annotated[
        float | None, _learning("--learning-rate", show_default="by backbone", help="For the prompt and α.")
    ] = None,
    seed: Annotated[int | None, _learning("--seed", show_default="0", help="Of everything random.")] = None,
    device: Annotated[
        str | None, _run("--device", metavar="NAME", show_default="auto", help="auto, cpu, cuda or cuda:N.")
    ] = None,
    resume: Annotated[bool, _run("--resume/--no-resume", help="Go on from an interrupted run's checkpoint.")] = True,
) -> None:
    """Learn a prompt: pairs on the bridge, Adam on the prompt and its α only; nothing of the transformer changes.

    Without --data, mini learns from procedural scenes that are degraded on the fly. Ctrl-C keeps a checkpoint; the same
    command goes on. torchrun shares each batch among processes.

    [bold]ebr-engine train --task haze -o haze.safetensors[/]

    [bold]ebr-engine train --task fog --data pairs/ -o fog.safetensors --backbone wan --set checkpointing=true[/]
    """
    from ebr_engine.training.config import LearnConfig, to_toml, told

    if list_settings:
        typer.echo(to_toml(LearnConfig(task="haze")), nl=False)
        return
    given = {
        "task": task,
        "backbone": backbone,
        "model": model,
        "context": context,
        "precision": precision,
        "data": data,
        "bad_data": bad_data,
        "size": size,
        "frames": frames,
        "validation": validation,
        "bridge": bridge,
        "loss": loss,
        "t0": t0,
        "power": power,
        "tokens": tokens,
        "alpha": alpha,
        "iterations": iterations,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "device": device,
    }
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
    for line in told(chosen):
        typer.echo(line, err=True)
    if not chosen.data:
        typer.echo("rendering scenes …", err=True)
    with LossProgress() as progress:
        learn(chosen, out, resume=resume, overwrite=overwrite, callback=progress.step)
    report = run_folder(out) / "report.md"
    typer.echo(f"{out}  {chosen.task}, {chosen.bridge}, {chosen.iterations} iterations, loss {progress.smooth:.5g}; see {report}")


def configured(config: Path | None, assignments: list[str] | None, given: dict[str, Any]) -> Any:
    """The settings of a file, of `--set`, and of options that were given, the later ones first; `EbrError` without a task."""
    from ebr_engine.training.config import read_assignments, read_toml, resolve

    values = read_toml(config) if config else {}
    values |= read_assignments(assignments or [])
    values |= {name: getattr(value, "value", value) for name, value in given.items() if value is not None}
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
