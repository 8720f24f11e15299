"""An exported trunk: what its graph takes and gives, and the stand-in that runs such a graph in the trunk's place.

A graph maps `latent`, `cos`, `sin` (the rotary tables on the latent's token grid) and the fields of one step of the tables to
`velocity`, so that one graph serves all steps and all prompts of one shape. The tables lie beside it: `haze.onnx.tables`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.base import Config
from ebr_engine.backbones.layers import RotaryCache, kept_rotary
from ebr_engine.errors import EngineError

TABLES = ".tables"  # follows the name of a graph's file
RUNNERS = {"onnx": "onnx_runtime", "tensorrt": "tensorrt", "aoti": "aoti"}  # format: module with a `load_runner`
SUFFIXES = {".onnx": "onnx", ".plan": "tensorrt", ".pt2": "aoti"}
LARGEST_BATCH = 4  # of a graph of dynamic size
OUTPUT = "velocity"

Step = Any  # one step of a backbone's tables, a named tuple
Runner = Callable[[dict[str, Tensor]], Tensor]  # the graph's inputs by name → velocity


@dataclass(frozen=True)
class Graph:
    """What an exported trunk is, as the file of its tables says it; None as size: any."""

    format: str
    dtype: str  # of the layers, as torch names it
    latent: tuple[int, ...] | None  # without the batch, which is 1
    clip: tuple[int, int, int] | None  # the same in frames, height and width of pixels

    @classmethod
    def from_json(cls, content: dict) -> "Graph":
        """Read what `dataclasses.asdict` and JSON made of it."""
        latent, clip = (tuple(content[name]) if content[name] else None for name in ("latent", "clip"))
        return cls(str(content["format"]), str(content["dtype"]), latent, clip)


def input_names(step: Step) -> list[str]:
    """Names of a graph's inputs, in order."""
    return ["latent", "cos", "sin", *step._fields]


def token_grid(config: Config, shape: Sequence[int]) -> tuple[int, int, int]:
    """The tokens of a latent of `shape` [B, C, F, H, W] along frames, height and width."""
    return tuple(size // patch for size, patch in zip(shape[2:], config.patch))


def rotary_grid(config: Config, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin [*grid, head_dim/2] float32 of the latent's tokens."""
    return tuple(table.unflatten(0, grid) for table in config.rotary(grid))


class ExportedTrunk:
    """Stands in a `Backbone` for the trunk and runs its graph: `trunk(latent, conditioning[i])`."""

    def __init__(self, run: Runner, config: Config, graph: Graph):
        self.run, self.config, self.graph = run, config, graph
        self._rotary: RotaryCache = {}

    def __call__(self, latent: Tensor, step: Step) -> Tensor:
        """Velocity of `latent` [B, C, F, H, W], float32; `EngineError` for a size that the graph does not take."""
        if self.graph.latent and latent.shape[1:] != self.graph.latent:
            made, found = (" x ".join(map(str, size)) for size in (self.graph.latent, latent.shape[1:]))
            raise EngineError(f"the graph was made for latents of {made}, not {found}")
        grid, device = token_grid(self.config, latent.shape), latent.device
        tables = kept_rotary(
            self._rotary, (grid, device), lambda: tuple(table.to(device) for table in rotary_grid(self.config, grid))
        )
        given = dict(zip(("cos", "sin"), tables)) | step._asdict()
        parts = latent.float().split(1 if self.graph.latent else LARGEST_BATCH)
        return torch.cat([self.run({"latent": part} | given) for part in parts])


def load_trunk(path: Path, graph: Graph, config: Config, step: Step, device: torch.device) -> ExportedTrunk:
    """The trunk whose graph is the file at `path`, to run on `device` over tables like `step`.

    Raises `EngineError` for a file that cannot be run, or that was made for tables of other shapes.
    """
    if not path.is_file():
        raise EngineError(f"no such graph: {path}")
    run = import_module(f"ebr_engine.export.{RUNNERS[graph.format]}").load_runner(path, device)
    check_tables(run.shapes, step, path)
    return ExportedTrunk(run, config, graph)


def check_tables(shapes: dict[str, Sequence[Any]], step: Step, path: Path) -> None:
    """`EngineError` unless a step's fields have the shapes that a graph's inputs of their names say."""
    for name, table in step._asdict().items():
        expected = tuple(shapes.get(name, table.shape))  # what a graph does not read it does not list
        if tuple(table.shape) != expected:
            found = f"{name} is {list(table.shape)}, the graph takes {list(expected)}"
            raise EngineError(f"{path} and {path.name}{TABLES} do not belong together: {found}; export again")


def needed(module: str, extra: str) -> ModuleType:
    """An optional package, imported; `EngineError` with the install line when it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise EngineError(f"this needs the package {module}: pip install 'ebr-engine[{extra}]'") from error
