"""`ebr-engine build`: an engine file that starts at once, with one prompt and schedule baked in."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli.options import about_plan, check_target, prompts_asked, takes
from ebr_engine.request import RestoreRequest

FIELDS = ("task", "prompt", "mix", "strength", "supersample", "steps", "schedule", "order", "t0")
MODEL = ("backbone", "model", "revision", "offline", "context", "vae")
COMPUTING = ("precision", "fp8_attention", "device")
HELP = {"task": "A bundled or installed prompt, such as haze; several: rain:0.7+haze:0.3."}


@takes(*FIELDS, *MODEL, *COMPUTING, mix="residual", help=HELP)
def build(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.ebr", help="The engine file to write.")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    request: RestoreRequest,
) -> None:
    """Bake one prompt and schedule into a file: the transformer in its final precision, no text encoder, no conditioner.

    [bold]ebr-engine build --backbone wan --task rain --fp8 -o rain.ebr[/]

    [bold]ebr-engine restore clip.mp4 -o clean.mp4 --engine rain.ebr[/]
    """
    names = prompts_asked(request)
    check_target(out, ".ebr", "an engine file", overwrite)

    from ebr_engine.engine.restorer import Restorer

    started = time.perf_counter()
    restorer = Restorer.from_request(request, here=False)
    plan = restorer.plan_for(request)
    restorer.build(out, plan, about_plan(request, names, len(plan.table)))
    size, seconds = out.stat().st_size / 1e6, time.perf_counter() - started
    typer.echo(f"{out}  {request.backbone}, {', '.join(names)}, {len(plan.table)} steps, {size:.0f} MB  {seconds:.1f} s")
