"""`ebr-engine warm`: compiled code and choices for common sizes, made once, before they are needed."""

from typing import Annotated

import typer

from ebr_engine.cli.options import takes
from ebr_engine.request import RestoreRequest

COMPUTING = ("device", "precision", "offload", "compile")
HELP = {"task": "The prompt to restore with; code serves all prompts of a length.", "compile": "off: choices by timing alone."}
SIZES = (256, 512)


@takes("task", "backbone", "model", "revision", "offline", "context", "vae", *COMPUTING, task="haze", compile="on", help=HELP)
def warm(
    *,
    size: Annotated[list[int], typer.Option("--size", metavar="PIXELS", min=16, help="Sides of square pictures.")] = SIZES,
    request: RestoreRequest,
) -> None:
    """Prepare this machine: compile for common sizes, time the ways that serve, and keep both for later runs.

    `info` lists what was prepared; `restore` then compiles from what is kept, and `--compile auto` knows that it is short.

    [bold]ebr-engine warm[/]

    [bold]ebr-engine warm --size 512 --precision bf16[/]
    """
    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.engine.warm import prepare

    restorer = Restorer.from_request(request)
    for side in size:
        found = prepare(restorer, request.task, side)
        if found["compiled"] is None:
            typer.echo(f"{side} x {side}: ways chosen, nothing compiled, in {found['first']:.1f} s")
        else:
            typer.echo(f"{side} x {side}: compiled in {found['compiled']:.1f} s, from what is kept in {found['kept']:.1f} s")
