"""`ebr-engine export`: the transformer for another runtime (ONNX, TensorRT, AOTInductor), one prompt's tables beside it."""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli.build import FIELDS, MODEL
from ebr_engine.cli.options import about_plan, prompts_asked, takes
from ebr_engine.errors import EbrError
from ebr_engine.request import RestoreRequest


class Format(str, Enum):
    onnx = "onnx"
    tensorrt = "tensorrt"
    aoti = "aoti"


class GraphPrecision(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    fp8 = "fp8"


@takes(
    *FIELDS,
    *MODEL,
    mix="residual",
    help={"task": "A bundled or installed prompt, such as haze; several: rain:0.7+haze:0.3."},
)
def export(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write: .onnx, .plan or .pt2.")],
    *,
    format: Annotated[
        Format | None, typer.Option("--format", show_default="by the file's name", help="tensorrt builds on this machine's GPU.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="HxW", show_default="by backbone", help="Pixels; the only size, unless --dynamic."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", metavar="N", min=1, show_default="by backbone", help="Frames beside --size.")
    ] = None,
    dynamic: Annotated[
        bool | None,
        typer.Option(
            "--dynamic/--fixed",
            show_default="dynamic without --size",
            help="Any size (with tensorrt up to --size), or a single one.",
        ),
    ] = None,
    precision: Annotated[
        GraphPrecision, typer.Option("--precision", help="Of the layers; fp8: QuantizeLinear pairs, onnx only.")
    ] = GraphPrecision.fp32,
    opset: Annotated[
        int | None, typer.Option("--opset", metavar="N", show_default="20; fp8: 21", help="Version of ONNX's operators.")
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option(
            "--workspace", metavar="GB", min=0, show_default="all there is", help="Memory for tensorrt while it builds."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="That aoti compiles for: cpu, cuda or cuda:N.")] = "cpu",
    request: RestoreRequest,
) -> None:
    """Write the transformer as one graph for another runtime, with what its steps take beside it (FILE.tables).

    [bold]ebr-engine export --backbone wan --task rain -o rain.onnx --precision fp16[/]

    [bold]ebr-engine restore clip.mp4 -o clean.mp4 --engine rain.onnx[/]
    """
    names = prompts_asked(request)
    sides = side_lengths(size)

    from ebr_engine.export.graph import SUFFIXES

    if format is None and out.suffix not in SUFFIXES:
        raise EbrError(f"{out}: the name ends in {', '.join(SUFFIXES)}; it says the format")
    chosen = format.value if format else SUFFIXES[out.suffix]
    if device != "cpu" and chosen != "aoti":
        raise EbrError(f"--device is for --format aoti; {chosen} is exported on the CPU")
    if out.exists() and not overwrite:
        raise EbrError(f"{out} exists; add --overwrite to replace it")

    from ebr_engine.export.exporting import ExportOptions, check_request, export_trunk

    check_request(out, chosen)
    from ebr_engine.engine.restorer import Restorer

    started = time.perf_counter()
    request = request.with_(device=device, precision=precision.value)
    restorer = Restorer.from_request(request, here=False)
    plan = restorer.plan_for(request)
    spec = restorer.backbone.spec
    height, width = sides or spec.side or spec.released_size or (spec.tile, spec.tile)
    length = frames or (spec.chunk[0] if spec.knows_time else 1)
    fixed = bool(sides) if dynamic is None else not dynamic
    taken = ExportOptions((length, height, width), fixed, opset, workspace)
    files = export_trunk(out, restorer.backbone, plan, chosen, taken, about_plan(request, names, len(plan.table)))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    what = f"{length} frame(s) of {height}x{width}" if fixed else "any size"
    typer.echo(
        f"{out}  {chosen}, {request.backbone}, {precision.value}, {what}, {', '.join(names)}, {len(plan.table)} steps  "
        f"{megabytes:.0f} MB  {time.perf_counter() - started:.1f} s"
    )
    typer.echo(f"keep beside it: {', '.join(file.name for file in files[1:])}")


def side_lengths(text: str | None) -> tuple[int, int] | None:
    """Height and width of HxW; `EbrError` for anything else."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise EbrError(f"--size {text}: height and width in pixels are written HxW, for example 480x832")
    return int(height), int(width)
