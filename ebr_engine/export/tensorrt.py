"""TensorRT: a plan built from the ONNX graph, run over torch's memory on torch's stream.

The network is strongly typed: precisions are those of the graph. A plan is good for the GPU and the TensorRT version that it
was built with.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ebr_engine import settings
from ebr_engine.errors import EngineError
from ebr_engine.export.graph import LARGEST_BATCH, OUTPUT, needed

Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, usual and largest shape of an input


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is built; `workspace` in GiB, None: all of the GPU's memory."""

    workspace: float | None = None
    open_sizes: dict[str, Sizes] | None = None  # of the inputs whose size is open


def write_plan(path: Path, graph: Path, options: PlanOptions) -> None:
    """Build the plan of the ONNX file `graph` on the current GPU and write it to `path`.

    Timings of kernels are kept in our cache folder, so that the next build is quicker. Raises `EngineError` when TensorRT is
    missing, or cannot parse or build the graph; nothing is written then.
    """
    trt = needed("tensorrt", "tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"TensorRT cannot read the graph: {reasons}")
    config = builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * 2**30))
    if options.open_sizes:
        profile = builder.create_optimization_profile()
        for name, sizes in options.open_sizes.items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
    timings = _timing_file(trt)
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError("TensorRT could not build the plan; its reasons are above")
    _write(path, plan)
    _write(timings, config.get_timing_cache().serialize())


def open_sizes(least: dict[str, tuple[int, ...]], largest: dict[str, tuple[int, ...]]) -> dict[str, Sizes]:
    """The sizes to tune for, from the shapes without a batch: one latent of the largest size is the usual case."""
    sizes = {name: (least[name], largest[name], largest[name]) for name in largest}
    small, usual, big = sizes["latent"]
    return sizes | {"latent": ((1, *small), (1, *usual), (LARGEST_BATCH, *big))}


class PlanRunner:
    """A deserialised plan and its context."""

    def __init__(self, path: Path, device: torch.device):
        trt = needed("tensorrt", "tensorrt")
        if device.type != "cuda":
            raise EngineError(f"{path} runs on CUDA devices only, not on {device}")
        self.path, self.device = path, device
        with torch.cuda.device(device):
            self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
            if self.engine is None:
                raise EngineError(f"{path} was built for another GPU or TensorRT version; export it again on this machine")
            self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.shapes = {name: tuple(self.engine.get_tensor_shape(name)) for name in names if name != OUTPUT}

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Velocity of `inputs["latent"]`; the graph's other inputs are tables by name."""
        velocity = torch.empty_like(inputs["latent"], memory_format=torch.contiguous_format)
        given = {name: inputs[name].contiguous() for name in self.shapes}
        for name, tensor in given.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"{self.path} was not built for {name} of {list(tensor.shape)}")
            self.context.set_tensor_address(name, tensor.data_ptr())
        self.context.set_tensor_address(OUTPUT, velocity.data_ptr())
        # Memory that is freed after this call is used again on the same stream only, so that nothing has to wait.
        if not self.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError(f"TensorRT failed on {self.path}")
        return velocity


def load_runner(path: Path, device: torch.device) -> PlanRunner:
    """The plan at `path`, to run on `device`; `EngineError` when TensorRT is missing or the plan is another machine's."""
    return PlanRunner(path, device)


def _timing_file(trt: ModuleType) -> Path:
    return settings.cache_dir() / "tensorrt" / f"{trt.__version__}.timing"


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(memoryview(content))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
