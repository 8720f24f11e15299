"""A trunk compiled ahead of time by torch (AOTInductor): one file that C++ programs can run without Python."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, _inductor, nn

from ebr_engine.errors import EngineError
from ebr_engine.export.graph import Step
from ebr_engine.export.trace import TrunkGraph, quiet, trace

SHAPES = "ebr_engine.shapes"  # in the package's metadata: compiled code does not look at what it is given
DEVICE = "AOTI_DEVICE_KEY"


class AotiRunner:
    """A loaded package."""

    def __init__(self, path: Path, device: torch.device):
        try:
            self.package = _inductor.aoti_load_package(str(path))
            made = self.package.get_metadata()
            self.shapes = json.loads(made[SHAPES])
        except (RuntimeError, KeyError, json.JSONDecodeError) as error:
            raise EngineError(f"torch cannot load {path}: {' '.join(str(error).split())}") from error
        if made[DEVICE] != device.type:
            raise EngineError(f"{path} was compiled for {made[DEVICE]}, not for {device.type}; use --device {made[DEVICE]}")

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Velocity of `inputs["latent"]`; the others are cos, sin and a step's fields, in this order."""
        latent, cos, sin, *fields = (tensor.contiguous() for tensor in inputs.values())
        return self.package(latent, cos, sin, fields)


def load_runner(path: Path, device: torch.device) -> AotiRunner:
    """The package at `path`, to run on `device`; `EngineError` when torch cannot load it, or it is for another kind of device."""
    return AotiRunner(path, device)


def write_package(
    path: Path,
    trunk: nn.Module,
    step: Step,
    latent: tuple[int, ...] | None,
    frames: bool = False,
    side: tuple[int, int] | None = None,
) -> None:
    """Compile a trunk on its own device into the file at `path`; needs a C++ compiler.

    `latent`, `frames`, `side`: see `trace.trace`.
    """
    program = trace(TrunkGraph(trunk, step), step, latent, frames, side)
    shapes = {name: list(table.shape) for name, table in step._asdict().items()}
    about = {"aot_inductor.metadata": {SHAPES: json.dumps(shapes)}}
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        with quiet():
            _inductor.aoti_compile_and_package(program, package_path=str(partial), inductor_configs=about)
        partial.replace(path)
