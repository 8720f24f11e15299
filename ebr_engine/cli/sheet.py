"""`ebr-engine sheet`: one picture restored by every task, on one sheet to choose from."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli import options
from ebr_engine.cli.options import takes
from ebr_engine.cli.progress import Display
from ebr_engine.errors import EbrError
from ebr_engine.jobs.sheet import FIELDS, SIDE
from ebr_engine.request import RestoreRequest

MODEL = ("backbone", "model", "revision", "offline", "context", "vae")


@takes(*FIELDS, *MODEL, "device", "precision", "offload")
def sheet(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A picture, or a clip, of which one frame is taken.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="SHEET.png", help="The picture to write.")],
    *,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="NAME", show_default="all there are", help="Only this one (repeatable)."),
    ] = None,
    side: Annotated[int, typer.Option("--side", metavar="PIXELS", min=32, help="A larger picture is reduced to this.")] = SIDE,
    start: Annotated[float | None, typer.Option("--start", metavar="SECONDS", min=0, help="Which frame of a clip.")] = None,
    overwrite: options.Overwrite = False,
    request: RestoreRequest,
) -> None:
    """Restore one picture by every task of a backbone, and show the results beside the input; what auto would choose is marked.

    The percentages tell how sure auto is of each.

    [bold]ebr-engine sheet photo.jpg -o sheet.png[/]

    [bold]ebr-engine sheet photo.jpg -o sheet.png -t haze -t rain+haze -t rain+haze:0.5[/]
    """
    from ebr_engine.backbones.registry import BACKBONES
    from ebr_engine.jobs.sheet import make_sheet, read_whole, tasks_of_sheet

    if request.backbone not in BACKBONES:
        raise EbrError(f"unknown backbone {request.backbone!r}; choose one of {', '.join(BACKBONES)}")
    named = task or []
    tasks_of_sheet(request.backbone, named)  # before the model is loaded
    _check(source, out, overwrite)
    whole = read_whole(source, start)

    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.media.images import write_image

    started = time.perf_counter()
    restorer = Restorer.from_request(request)
    with Display(1) as progress:
        progress.start(source.name)
        sheet = make_sheet(restorer, whole, request, named, side, progress.share)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image(out, sheet.pixels)
    size = "{2} x {3}".format(*sheet.places[0])
    seen, seconds = sheet.diagnosis, time.perf_counter() - started
    typer.echo(f"{source} -> {out}  {size}, {', '.join(sheet.tasks)}; auto: {seen}  {seconds:.1f} s")


def _check(source: Path, out: Path, overwrite: bool) -> None:
    from ebr_engine.media.decoding import MediaError
    from ebr_engine.media.images import SUFFIXES

    if not source.exists():
        raise MediaError(f"{source}: no such file or folder")
    if out.suffix.lower() not in SUFFIXES:
        raise MediaError(f"{out}: a sheet is a picture; its name ends in one of {' '.join(SUFFIXES)}")
    if out.exists() and out.samefile(source):
        raise MediaError(f"{out}: is the input; it is never overwritten, choose another output")
    if out.exists() and not overwrite:
        raise MediaError(f"{out}: exists; replace it with --overwrite")
