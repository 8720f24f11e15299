"""`ebr-engine sheet`: one picture restored by every task, on one sheet to choose from."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ebr_engine.cli import options
from ebr_engine.cli.options import takes
from ebr_engine.cli.progress import Display
from ebr_engine.errors import EbrError
from ebr_engine.request import RestoreRequest

if TYPE_CHECKING:
    import numpy as np

    from ebr_engine.engine.classify import Diagnosis


MODEL = ("backbone", "model", "revision", "offline", "context", "vae")


@takes("strength", "steps", "schedule", "seed", *MODEL, "device", "precision", "offload")
def sheet(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A picture, or a clip, of which one frame is taken.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="SHEET.png", help="The picture to write.")],
    *,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="NAME", show_default="all there are", help="Only this one (repeatable)."),
    ] = None,
    side: Annotated[int, typer.Option("--side", metavar="PIXELS", min=32, help="A larger picture is reduced to this.")] = 512,
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
    from ebr_engine.prompts.catalogue import find_prompts, prompt_files

    if request.backbone not in BACKBONES:
        raise EbrError(f"unknown backbone {request.backbone!r}; choose one of {', '.join(BACKBONES)}")
    tasks = task or sorted(prompt_files(request.backbone), key=_usual)
    for name in tasks or ["haze"]:  # tells how to get prompts where there are none
        find_prompts(request.backbone, name)
    _check(source, out, overwrite)
    whole = _read(source, start)
    pixels = _reduced(whole, side)

    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.media.images import write_image
    from ebr_engine.media.sheet import SheetTile, contact_sheet

    started = time.perf_counter()
    restorer = Restorer.from_request(request)
    diagnosis = _diagnosis(whole)
    chosen = "+".join(diagnosis.tasks)
    if task is None and len(diagnosis.tasks) > 1 and set(diagnosis.tasks) <= set(tasks):
        tasks = [*tasks, chosen]
    tiles = [SheetTile(pixels, "input" if chosen else "input · auto sees nothing to repair", not chosen)]
    with Display(1) as progress:
        progress.start(source.name)
        for index, name in enumerate(tasks):
            progress.share(index / len(tasks), name)
            plan = restorer.plan_for(request.with_(task=name))
            restored = restorer.restore(pixels, plan=plan, seed=request.seed)
            tiles.append(SheetTile(restored, _label(name, diagnosis, name == chosen), name == chosen))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image(out, contact_sheet(tiles))
    size = f"{pixels.shape[1]} x {pixels.shape[0]}"
    typer.echo(f"{source} -> {out}  {size}, {', '.join(tasks)}; auto: {diagnosis}  {time.perf_counter() - started:.1f} s")


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


def _read(source: Path, start: float | None) -> "np.ndarray":
    from ebr_engine.media.images import read_image
    from ebr_engine.media.kinds import is_clip
    from ebr_engine.media.video import open_video

    if not (is_clip(source) or source.is_dir()):
        return read_image(source).pixels
    with open_video(source, start=start, frames=1) as reader:
        return next(iter(reader)).pixels


def _reduced(pixels: "np.ndarray", side: int) -> "np.ndarray":
    from ebr_engine.media.images import resize_picture
    from ebr_engine.media.picture import Picture

    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    return resize_picture(Picture(pixels), *(max(1, round(length * scale)) for length in pixels.shape[:2])).pixels


def _diagnosis(pixels: "np.ndarray") -> "Diagnosis":
    import torch

    from ebr_engine.engine.classify import diagnose

    return diagnose([torch.tensor(pixels).permute(2, 0, 1)])


def _label(name: str, diagnosis: "Diagnosis", chosen: bool) -> str:
    known = f" {diagnosis.probability[name]:.0%}" if name in diagnosis.probability else ""
    return f"{name}{known}{' · auto' if chosen else ''}"


def _usual(task: str) -> tuple[int, str]:
    """The tasks that everybody knows first, in their order."""
    from ebr_engine.prompts.catalogue import TASKS

    return (TASKS.index(task) if task in TASKS else len(TASKS), task)
