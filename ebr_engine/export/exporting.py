"""Writing a trunk in another runtime's format, and the tables of a run beside it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ebr_engine.backbones.base import Backbone
from ebr_engine.errors import EngineError
from ebr_engine.export import aoti, onnx, tensorrt
from ebr_engine.export.engine_file import save_engine
from ebr_engine.export.graph import SUFFIXES, TABLES, Graph, needed, rotary_grid, token_grid

if TYPE_CHECKING:
    from ebr_engine.engine.plan import Plan

WRITE_ONNX = (("onnx", "onnx"), ("onnxscript", "onnx"))  # packages and the extras that bring them
PACKAGES = {"onnx": WRITE_ONNX, "tensorrt": (*WRITE_ONNX, ("tensorrt", "tensorrt")), "aoti": ()}


@dataclass(frozen=True)
class ExportOptions:
    """What an exported graph takes, and how it is written."""

    clip: tuple[int, int, int]  # frames, height and width in pixels; without `fixed` the largest that TensorRT tunes for
    fixed: bool = False  # that size only
    opset: int | None = None  # of ONNX
    workspace: float | None = None  # GiB that TensorRT may take while it builds


def export_trunk(path: Path, backbone: Backbone, plan: "Plan", format: str, options: ExportOptions, about: dict) -> list[Path]:
    """Write the trunk of a backbone in `format` (onnx, tensorrt, aoti), and the tables of `plan` beside it; the files written.

    `path` and `format` have passed `check_request`. Raises `EngineError` for a size that the backbone does not take, and for
    whatever the format cannot express.
    """
    latent = latent_size(backbone, options.clip)
    plan.check_single()
    steps = [conditioning[0] for conditioning in plan.tables]
    if any(a.shape != b.shape for step in steps for a, b in zip(step, steps[0])):
        raise EngineError("prompts of several lengths cannot share a graph; export with --mix residual, or one by one")
    fp8 = any(tensor.dtype.itemsize == 1 for tensor in backbone.trunk.state_dict().values())
    if fp8 and format != "onnx":
        raise EngineError(f"fp8 layers scale their activations by token, which {format} is not given; use bf16 or fp16")
    path.parent.mkdir(parents=True, exist_ok=True)
    frames, cells = backbone.spec.knows_time, latent[-2:] if backbone.spec.side else None
    exact = latent if options.fixed else None
    if format == "onnx":
        onnx.write_onnx(path, backbone.trunk, steps[0], exact, frames, options.opset, cells)
    elif format == "aoti":
        aoti.write_package(path, backbone.trunk, steps[0], exact, frames, cells)
    else:
        sizes = None if options.fixed else tensorrt.open_sizes(_shapes(backbone), _shapes(backbone, latent))
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            file = Path(folder) / "trunk.onnx"
            onnx.write_onnx(file, backbone.trunk, steps[0], exact, frames, options.opset, cells)
            tensorrt.write_plan(path, file, tensorrt.PlanOptions(options.workspace, sizes))
    clip = options.clip if options.fixed else None
    graph = Graph(format, str(backbone.dtype).removeprefix("torch."), exact, clip)
    tables = path.with_name(path.name + TABLES)
    save_engine(tables, backbone, plan.table, plan.tables, about | plan.facts, asdict(graph))
    weights = path.with_name(f"{path.name}.data")
    return [path, *([weights] if format == "onnx" and weights.is_file() else []), tables]


def check_request(path: Path, format: str) -> None:
    """`EngineError` unless a file's name ends as those of its format do, and the packages that write it are there."""
    suffix = next(suffix for suffix, name in SUFFIXES.items() if name == format)
    if path.suffix != suffix:
        raise EngineError(f"{path}: the name of a file in the format {format} ends in {suffix}")
    for package, extra in PACKAGES[format]:
        needed(package, extra)


def latent_size(backbone: Backbone, clip: tuple[int, int, int]) -> tuple[int, ...]:
    """The latent, without a batch, of a clip of (frames, height, width); `EngineError` for what the backbone does not take."""
    frames, *sides = clip
    codec, multiple = backbone.codec, backbone.multiple
    if any(side <= 0 or side % multiple for side in sides):
        height, width = (max(multiple, -(-side // multiple) * multiple) for side in sides)
        found = "x".join(map(str, sides))
        raise EngineError(f"{backbone.name} takes sizes in multiples of {multiple} pixels, not {found}; use {height}x{width}")
    if not backbone.spec.knows_time and frames != 1:
        raise EngineError(f"{backbone.name} takes one frame at a time, not {frames}")
    if codec.frames(frames) != frames:
        raise EngineError(f"{backbone.name} takes clips of 4n + 1 frames, not {frames}; use {codec.frames(frames)}")
    cells = [side // codec.spatial for side in sides]
    return codec.channels, 1 + (frames - 1) // codec.temporal, *cells


def _shapes(backbone: Backbone, latent: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes, without a batch, of the inputs that depend on the size, for a latent; by default the smallest."""
    config = backbone.trunk.config
    side = backbone.spec.side or config.patch[1:]
    latent = latent or (backbone.codec.channels, config.patch[0], *side)
    table = tuple(rotary_grid(config, token_grid(config, (1, *latent)))[0].shape)
    return {"latent": latent, "cos": table, "sin": table}
