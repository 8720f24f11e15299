"""`ebr-engine eval`: measure the quality of the bundled prompts on real photos."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.errors import EbrError


def evaluate(
    task: Annotated[list[str] | None, typer.Option("--task", "-t", metavar="NAME", help="Only these tasks (repeatable).")] = None,
    size: Annotated[str, typer.Option("--size", metavar="N|full", help="Side of the square photos in pixels, or full.")] = "256",
    backbone: Annotated[str, typer.Option("--backbone", help="This version measures: mini.")] = "mini",
    model: Annotated[Path | None, typer.Option("--model", help="Another weights file of that backbone.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A folder of prompts in place of the bundled ones.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="auto, bf16, fp32 or fp8.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Also write every score.")] = None,
) -> None:
    """Degrade four real photos, never seen in training, and restore them: PSNR and SSIM against three other ways.

    Rows: the degraded input, the same frozen backbone with the empty prompt, a prompt learned by the naive process, and
    the prompt learned by EBR. Needs the extra: pip install 'ebr-engine[train]'.
    """
    if size != "full" and not (size.isdigit() and int(size) >= 64 and int(size) % 8 == 0):
        raise EbrError(f"--size must be full, or a multiple of 8 of at least 64, not {size}")

    import torch

    from ebr_engine.catalogue import TASKS
    from ebr_engine.engine import Restorer
    from ebr_engine.evaluation import quality
    from ebr_engine.evaluation.photos import STRENGTH
    from ebr_engine.version import __version__

    if wrong := [name for name in task or [] if name not in TASKS]:
        raise EbrError(f"unknown task {', '.join(wrong)}; there is: {', '.join(TASKS)}")
    restorer = Restorer(backbone, model=model, device=device, precision=precision)
    started = time.monotonic()

    def tell(record: dict) -> None:
        typer.echo(f"{record['task']:9} {record['photo']:11} {record['row']:13} {record['psnr']:6.2f} dB", err=True)

    pixels = None if size == "full" else int(size)
    scores = quality.measure(restorer, task or TASKS, size=pixels, callback=tell, prompts=prompts)
    where = {
        "device": str(restorer.device),
        "dtype": str(restorer.dtype),
        "torch": torch.__version__,
        "version": __version__,
    }
    typer.echo(
        f"Degradation strength {STRENGTH} of 1, photos {'whole' if pixels is None else f'{size} x {size}'}, "
        f"mean of four, 5 steps; {where['device']}, {where['dtype']}, {time.monotonic() - started:.0f} s\n"
    )
    for value, title, digits in (("psnr", "PSNR in dB", 2), ("ssim", "SSIM", 3)):
        typer.echo(f"{title}\n\n{quality.markdown(scores, value, digits)}\n")
    if out is not None:
        out.write_text(json.dumps({"size": size, "strength": STRENGTH, **where, "scores": scores}, indent=1) + "\n")
