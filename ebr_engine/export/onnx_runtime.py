"""Running an exported trunk with ONNX Runtime."""

from pathlib import Path

import torch
from torch import Tensor

from ebr_engine.errors import EngineError
from ebr_engine.export.graph import OUTPUT, needed

ELEMENTS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}  # onnx.TensorProto's numbers
DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}


class OnnxRunner:
    """A session over torch's own memory: inputs and output are bound by address, on a CPU and on a CUDA device."""

    def __init__(self, path: Path, device: torch.device):
        runtime = needed("onnxruntime", "onnx")
        self.path, self.device = path, device
        providers: list = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in runtime.get_available_providers():
                raise EngineError("this onnxruntime knows no CUDA; pip install onnxruntime-gpu in its place, or use --device cpu")
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its errors have no class in common but this
            raise EngineError(f"onnxruntime cannot run {path}: {_reason(error)}") from error
        self.inputs = {entry.name: DTYPES[entry.type] for entry in self.session.get_inputs()}
        self.shapes = {entry.name: entry.shape for entry in self.session.get_inputs()}

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Velocity of `inputs["latent"]`; the graph's other inputs are tables by name."""
        binding = self.session.io_binding()
        velocity = torch.empty_like(inputs["latent"], memory_format=torch.contiguous_format)
        given = {name: inputs[name].to(self.device, dtype).contiguous() for name, dtype in self.inputs.items()}
        for name, tensor in given.items():
            binding.bind_input(name, *self._memory(tensor))
        binding.bind_output(OUTPUT, *self._memory(velocity))
        if self.device.type == "cuda":  # the session has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed on {self.path}: {_reason(error)}") from error
        binding.synchronize_outputs()
        return velocity

    def _memory(self, tensor: Tensor) -> tuple:
        return self.device.type, self.device.index or 0, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def load_runner(path: Path, device: torch.device) -> OnnxRunner:
    """The graph in the file at `path`, to run on `device`; `EngineError` when it cannot be."""
    return OnnxRunner(path, device)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
