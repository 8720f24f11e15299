"""`ebr-engine build`: an engine file that starts at once, with one prompt and schedule baked in."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli import options
from ebr_engine.cli.loading import BaseModel, spread
from ebr_engine.errors import EbrError


@spread
def build(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.ebr", help="The engine file to write.")],
    *,
    task: options.Task = None,
    prompt: options.Prompts = None,
    mix: options.PromptMix = options.Mix.residual,
    strength: options.Strength = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    steps: options.Steps = None,
    schedule: options.StepSchedule = options.Schedule.fast,
    order: options.Order = None,
    t0: options.T0 = None,
    base: BaseModel,
    precision: options.TrunkPrecision = options.Precision.auto,
    fp8: options.Fp8 = False,
    device: options.Device = "auto",
) -> None:
    """Bake one prompt and schedule into a file: the transformer in its final precision, no text encoder, no conditioner.

    [bold]ebr-engine build --backbone wan --task rain --fp8 -o rain.ebr[/]

    [bold]ebr-engine restore clip.mp4 -o clean.mp4 --engine rain.ebr[/]
    """
    from ebr_engine.jobs.choosing import chosen_prompts, precision_of

    prompts = chosen_prompts(base.backbone, task, prompt or [])
    chosen = precision_of(precision, fp8)
    if out.suffix != ".ebr":
        raise EbrError(f"{out}: an engine file's name ends in .ebr")
    if out.exists() and not overwrite:
        raise EbrError(f"{out} exists; add --overwrite to replace it")

    started = time.perf_counter()
    restorer = base.load(device=device, precision=chosen)
    run = {"steps": steps, "schedule": schedule.value, "order": order, "t0": t0, "mix": mix.value, "strength": strength}
    plan = restorer.plan(task, prompts or None, **run)
    names = [task] if task else [f"{path}:{weight:g}" for path, weight in prompts]
    about = {"prompts": names, "precision": chosen, "schedule": schedule.value, "steps": len(plan.table)}
    about |= {"mix": mix.value, "strength": strength}
    restorer.build(out, plan, about)
    size, seconds = out.stat().st_size / 1e6, time.perf_counter() - started
    typer.echo(f"{out}  {base.backbone}, {', '.join(names)}, {len(plan.table)} steps, {size:.0f} MB  {seconds:.1f} s")
