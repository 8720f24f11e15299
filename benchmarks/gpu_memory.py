"""Memory of the GPU check's sections on paper: each section's own code at the real sizes, over tensors that are shapes alone.

Nothing is computed: every operation gives a tensor of the right shape, and the bytes of all storages that are alive are followed
to their peak. Operations go through their registrations, as on a GPU, so what a kernel fuses is not there in between. What a
graph keeps is counted once more, as its private pool: all that was alive beside the weights when it was captured. Not counted:
what a library or a compiled block needs for a moment inside an operation, and the driver's context; `MARGIN` is for these.
"""

import gc
import io
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks import clock, gpu_codecs, gpu_kernels, gpu_models
from benchmarks.gpu import SECTIONS
from benchmarks.gpus import GPUS
from benchmarks.memory import Memory
from benchmarks.roofline import WAN_DISTINCT
from ebr_engine.backbones import layers
from ebr_engine.backbones.wan import live as wan_live
from ebr_engine.backbones.wan import model as wan_model
from ebr_engine.bridge import sampler
from ebr_engine.bridge.sampler import make_table
from ebr_engine.engine import plan
from ebr_engine.kernels import backend

CARD, MARGIN = 80e9, 6e9  # bytes: an 80 GB card, and what is not counted
# No tensors; those of `kernels`, by the extension; small ones of many tests; a model of 7 million parameters.
NOT_COUNTED = ("build", "cuda", "tests", "pretrain")


class Alive(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.follow(tensor.untyped_storage())
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it goes."""
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        """A storage went."""
        self.now -= self.sizes.pop(key)

    def during(self, function: Callable[[], Any]) -> tuple[Any, int]:
        """The result of a function, and how far the bytes rose above what there was before."""
        before, peak = self.now, self.peak
        self.peak = before
        result = function()
        rose = self.peak - before
        self.peak = max(self.peak, peak)
        return result, rose


def peak(section: str) -> int:
    """Bytes that a section needs at its worst moment."""
    about = SECTIONS[section]
    module = {"gpu_codecs": gpu_codecs, "gpu_kernels": gpu_kernels, "gpu_models": gpu_models}[about.module]
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), on_paper() as alive:
        run = clock.Run(torch.device("cpu"), False, time.monotonic() + 3600, io.StringIO(), Path(folder), Path(folder))
        getattr(module, about.function)(run, *about.arguments)
    gc.collect()
    errors = [line for line in run.file.getvalue().splitlines() if '"error": "' in line and '"left out' not in line]
    if errors:
        raise RuntimeError(f"{section}: {errors[0]}")
    return alive.peak


@contextmanager
def on_paper() -> Iterator[Alive]:
    """Sections run over shapes: values are made up where they ask for one, times and compilers are left out."""
    alive = Alive()
    pools: list[Tensor] = []

    def recorded(function: Callable[[], Tensor], warm: Callable[[], object] = lambda: None) -> tuple[Callable[[], None], Tensor]:
        warm()
        result, rose = alive.during(function)
        pools.append(torch.empty(max(rose - result.nbytes, 0), dtype=torch.uint8))
        return lambda: None, result

    def captured(function: Callable[[], Tensor], _: torch.device) -> Callable[[], Tensor]:
        result = recorded(function)[1]
        return lambda: result

    def once(function: Callable[[], Any], _: torch.device) -> dict[str, Any]:
        function()
        return {"median": 1.0, "quartiles": [1.0, 1.0]}

    def two_rows(context: Tensor) -> tuple[Tensor, Tensor]:
        return context[:WAN_DISTINCT], context.new_ones(WAN_DISTINCT)

    modules = (clock, gpu_codecs, gpu_kernels, gpu_models)
    made_up = {
        "milliseconds": once,
        "relative_rms": lambda *_: 0.0,
        "captured": captured,
        "ceilings": lambda _: GPUS["h200"],
        "compile_blocks": lambda *_: None,
        "CudaRecorder": lambda _: recorded,
        "free": lambda _: pools.clear(),
        "learning_memory": lambda _: Memory(0, 0, 0, 0, 0),
        "make_table": real(make_table),
    }
    with ExitStack() as stack:
        for name, value in made_up.items():
            for module in modules:
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        for module in (sampler, plan):
            stack.enter_context(patch.object(module, "place", real(sampler.place)))
        stack.enter_context(patch.object(layers, "can_pack", lambda _: False))
        stack.enter_context(patch.object(torch, "compile", lambda module, **_: module))
        stack.enter_context(patch.object(torch, "equal", lambda *_: False))
        stack.enter_context(patch.object(Tensor, "item", lambda _: 1.0))
        stack.enter_context(patch.object(Tensor, "__bool__", lambda _: True))
        for module in (wan_model, wan_live):
            stack.enter_context(patch.object(module, "merge_equal_rows", two_rows))
        stack.enter_context(patch.object(nn.Module, "_apply", applied))
        stack.enter_context(patch.object(backend, "FORCED", True))
        stack.enter_context(patch.object(backend, "has_fp8", lambda _: True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(alive)
        yield alive
        pools.clear()


def real(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose tensors have values: what the host reads of a schedule."""

    def call(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)

    return call


def applied(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply`, by new parameters: torch swaps those that are shapes, which nothing may refer to meanwhile."""
    for child in module.children() if recurse else ():
        applied(child, function)
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(function(parameter), requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = function(buffer)
    return module
