"""A trunk as an ONNX graph of standard operators.

fp8 layers become QuantizeLinear and DequantizeLinear pairs (e4m3): weights scaled by output channel, activations by token.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.layers import Fp8Linear
from ebr_engine.errors import EngineError
from ebr_engine.export.graph import OUTPUT, Step, input_names, needed
from ebr_engine.export.trace import TrunkGraph, quiet, trace
from ebr_engine.kernels.quantize_fp8 import E4M3_MAX, SMALLEST_SCALE
from ebr_engine.version import __version__

OPSET = 20  # Gelu and LayerNormalization are operators of their own
LEAST_OPSET = 18
LEAST_OPSET_FP8 = 21  # QuantizeLinear names its output type
LARGEST_FILE = 2**30  # bytes of weights above which they lie in a file of their own; protobuf ends at 2 GiB
FLOAT8E4M3FN = 17  # onnx.TensorProto.FLOAT8E4M3FN


class QdqLinear(nn.Module):
    """An `Fp8Linear` in ONNX's words; runs nowhere but in a graph."""

    def __init__(self, layer: Fp8Linear):
        super().__init__()
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scale", layer.scale.flatten())
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in `x.dtype`."""
        rows = x.flatten(0, -2).float()
        scale = (rows.abs().amax(-1) * (1 / E4M3_MAX)).clamp(min=SMALLEST_SCALE)
        e4m3 = {"axis": 0, "output_dtype": FLOAT8E4M3FN}
        values = _node("QuantizeLinear", (rows, scale), torch.float8_e4m3fn, e4m3)
        rounded = _node("DequantizeLinear", (values, scale), torch.float32, {"axis": 0})
        weight = _node("DequantizeLinear", (self.weight, self.scale), torch.float32, {"axis": 0})
        return F.linear(rounded.to(x.dtype), weight.to(x.dtype), self.bias.to(x.dtype)).unflatten(0, x.shape[:-1])


def _node(operator: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, attributes: dict[str, int]) -> Tensor:
    return torch.onnx.ops.symbolic(
        operator, inputs, attributes, dtype=dtype, shape=tuple(inputs[0].shape), version=LEAST_OPSET_FP8
    )


def with_qdq(trunk: nn.Module) -> int:
    """Replace the fp8 layers of a trunk in place; how many there were."""
    layers = [(owner, name, layer) for owner in trunk.modules() for name, layer in owner.named_children()]
    layers = [found for found in layers if isinstance(found[2], Fp8Linear)]
    for owner, name, layer in layers:
        setattr(owner, name, QdqLinear(layer))
    return len(layers)


def write_onnx(
    path: Path,
    trunk: nn.Module,
    step: Step,
    latent: tuple[int, ...] | None,
    frames: bool = False,
    opset: int | None = None,
    side: tuple[int, int] | None = None,
) -> None:
    """Write a trunk as `path`, and beside it as `path` + `.data` the weights if they are large; neither is left half-written.

    `latent`, `frames`, `side`: see `trace.trace`. `opset` is 20 by default, 21 with fp8 layers. Raises `EngineError` for an opset
    that is too low or that the installed onnx does not know, and when onnx's checker refuses the graph.
    """
    onnx = needed("onnx", "onnx")
    graph = TrunkGraph(trunk, step)
    fp8 = with_qdq(graph.trunk)
    least = LEAST_OPSET_FP8 if fp8 else LEAST_OPSET
    opset = max(OPSET, least) if opset is None else opset
    if not least <= opset <= onnx.defs.onnx_opset_version():
        raise EngineError(f"the opset must be {least} to {onnx.defs.onnx_opset_version()}, not {opset}")
    program = trace(graph, step, latent, frames, side)
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=input_names(step),
            output_names=[OUTPUT],
            opset_version=opset,
        )
    exported.model.producer_name, exported.model.producer_version = "ebr-engine", __version__
    large = sum(tensor.nbytes for tensor in graph.state_dict().values()) > LARGEST_FILE
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name  # under its final name: the graph names the file of its weights
        exported.save(partial, external_data=large)
        check(partial, opset)
        for file in sorted(partial.parent.iterdir(), reverse=True):  # the weights first
            file.replace(path.with_name(file.name))
        if not large:
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # of a larger graph that was here before


def check(path: Path, opset: int) -> None:
    """`EngineError` unless onnx's checker passes the file, its shapes too, and all its operators are ONNX's own of `opset`."""
    onnx = needed("onnx", "onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"onnx refuses the graph: {' '.join(str(error).split())}") from error
    model = onnx.load(str(path), load_external_data=False)
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if found != {"ai.onnx": opset} or foreign or model.functions:
        raise EngineError(f"the graph is not made of operators of opset {opset} alone: it has {found}, {sorted(foreign)}")
