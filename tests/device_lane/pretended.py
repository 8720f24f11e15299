"""A pretended CUDA device: its tensors say that they are there, hold their numbers on the CPU, and do what CUDA tensors may.

What torch and CUDA would refuse raises `DeviceFault`: tensors of two devices in one operation, fp8 products whose operands are
not laid out as cuBLASLt takes them (`torch._scaled_mm`'s own meta function says so), and while a CUDA graph would be recorded,
every read of a value by the host and every copy from it. Else the numbers are those of the CPU.

To torch's C++ parts, which ask the driver about a CUDA tensor wherever they can, these are tensors of Python on the CPU; only
Python sees another device. So indexing and gradients work on any build of torch, and what C++ decides by device is not seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")
TO_HOST = (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__)
SET_DATA = Tensor.data.__set__
INDEXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # take indices from the host, by a copy


class DeviceFault(RuntimeError):
    """What a CUDA device would refuse."""


class Pretended(Tensor):
    """A tensor on the pretended device; `value` holds its numbers."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "Pretended":
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        return Tensor._make_wrapper_subclass(cls, value.size(), device="cpu", **layout)

    def __init__(self, value: Tensor):
        self.value = value.detach()

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def record_stream(self, _: Any) -> None:
        """Nothing runs beside."""

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.value})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise DeviceFault(f"{func} outside of the pretended device")


class _Move(torch.autograd.Function):
    """A copy from one device to the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.value.clone() if isinstance(x, Pretended) else Pretended(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.value.clone() if isinstance(gradient, Pretended) else Pretended(gradient.clone())


class Device:
    """The rules, and what was seen: `reads` and `copies` of the host, and `products` in fp8."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.copies = self.products = self.recorded = 0
        self.recording = self.running = False
        self.dispatching, self.calling = _Dispatch(self), _Calls(self)

    @contextmanager
    def strictly(self, copies: bool = False) -> Iterator[None]:
        """Within it the host must not read; nor may it copy to the device, as in a graph, unless `copies`."""
        before = self.running, self.recording
        self.running, self.recording = True, not copies
        try:
            yield
        finally:
            self.running, self.recording = before

    def read(self, what: str) -> None:
        """The host reads a value."""
        if self.running:
            raise DeviceFault(f"the host reads a value of the device where it must not wait ({what})")
        self.reads.append(what)

    def copy(self, what: str) -> None:
        """The host copies to the device."""
        if self.recording:
            raise DeviceFault(f"a copy from the host cannot be recorded ({what})")
        self.copies += 1

    def move(self, x: Tensor, there: bool) -> Tensor:
        """`x` on the device, or on the host."""
        if isinstance(x, Pretended) == there:
            return x
        self.copy("to") if there else self.read("to")
        return _Move.apply(x)

    def record(self, function: Callable[[], Tensor], warm: Callable[[], object]) -> tuple[Callable[[], None], Tensor]:
        """In `CudaRecorder`'s place: what is recorded, and what is replayed, runs under a recording's rules."""
        warm()
        with self.strictly():
            result = function()
        self.recorded += 1

        def replay() -> None:
            with self.strictly():
                result.copy_(function())

        return replay, result


class Stream:
    """Work in the order in which it is given."""

    def __init__(self, *_: Any):
        pass

    def wait_stream(self, _: "Stream") -> None:
        """Nothing runs beside."""


class _Calls(TorchFunctionMode):
    """What names a device, or takes values, before torch's dispatcher is asked."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return self.device.move(func(*args, **kwargs | {"device": "cpu"}), True)
        if x is None:
            return func(*args, **kwargs)
        if func is Tensor.to or func is Tensor.cpu or func is Tensor.cuda:
            return self._to(func, x, args[1:], kwargs)
        if func is Tensor.pin_memory:
            return x
        if func == SET_DATA:  # a new object every time
            return _replace(x, args[1])
        if not isinstance(x, Pretended):
            return func(*args, **kwargs)
        if func in TO_HOST:
            self.device.read(func.__name__)
            return func(x.value, *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _to(self, func: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        if func is not Tensor.to:
            return self.device.move(x, func is Tensor.cuda)
        device, dtype, copies = None, None, kwargs.get("copy", False)
        for one in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(one, Tensor):
                device, dtype = one.device, one.dtype
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, (str, torch.device)):
                device = torch.device(one)
        moved = x if device is None else self.device.move(x, device.type == "cuda")
        if dtype is not None and moved.dtype != dtype:
            return moved.type(dtype) if not isinstance(moved, Pretended) else torch.ops.aten._to_copy(moved, dtype=dtype)
        return moved.clone() if copies and moved is x else moved


class _Dispatch(TorchDispatchMode):
    """Every operation that reaches a kernel: checked, then done on the CPU."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name
        asked = kwargs.get("device")
        there = asked is not None and torch.device(asked).type == "cuda"
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not there and not any(isinstance(x, Pretended) for x in tensors):
            result = func(*args, **kwargs)
            # Gradients that nobody gave are made by C++, for which these tensors are on the CPU.
            return Pretended(result) if name == "aten::zeros" and torch._C._current_graph_task_id() >= 0 else result
        if name in READS:
            self.device.read(name)
        elif name == "aten::_fused_sdp_choice":
            return torch.nn.attention.SDPBackend.MATH.value
        elif name == "aten::copy_":
            self._copied(*args[:2])
        elif there and tensors:
            self.device.copy(name)
        else:
            self._check(name, tensors)
        if name in OPDEFS:  # the engine's own operations are bodies of Python, which run on the device
            with self, self.device.calling:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        plain = tree_map(lambda x: x.value if isinstance(x, Pretended) else x, (args, kwargs))
        if there:
            plain[1]["device"] = "cpu"
        if name == "aten::_scaled_mm":
            result = self._product(*plain)
        elif func is torch.ops.aten.mm.dtype:  # which a CPU does not have
            result = torch.mm(*(x.to(plain[0][2]) for x in plain[0][:2]))
        else:
            result = func(*plain[0], **plain[1])
        if not isinstance(result, (Tensor, tuple, list)):
            return result
        if func._schema.is_mutable:
            return kwargs["out"] if "out" in kwargs else args[0]
        return tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, result)

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        if name in INDEXED:
            for x in tensors[1:]:
                if not isinstance(x, Pretended):
                    self.device.copy(name)
                elif x.dtype == torch.bool:  # how many there are is a value
                    self.device.read(name)
            tensors = tensors[:1]
        if name == "aten::lift_fresh":
            return
        strangers = [x for x in tensors if not isinstance(x, Pretended) and (x.dim() or name.startswith("ebr::"))]
        if strangers:
            shapes = ", ".join(str(tuple(x.shape)) for x in strangers)
            raise DeviceFault(f"{name}: tensors on the device and on the host (of shape {shapes})")

    def _copied(self, to: Tensor, source: Tensor) -> None:
        if isinstance(to, Pretended) and not isinstance(source, Pretended):
            self.device.copy("copy_")
        elif not isinstance(to, Pretended):
            self.device.read("copy_")

    def _product(self, args: tuple, kwargs: dict) -> Tensor:
        """`torch._scaled_mm` by its meta function, for what it refuses, and in float32."""
        self.device.products += 1
        with FakeTensorMode(), _quiet():
            try:
                torch._scaled_mm(*tree_map(_faked, args), **tree_map(_faked, kwargs))
            except RuntimeError as error:
                raise DeviceFault(f"_scaled_mm: {error}") from error
        x, weight, x_scale, weight_scale, bias, _, dtype, *_ = (*args, *[None] * 4)
        y = (x.float() * x_scale) @ (weight.float() * weight_scale)
        return (y if bias is None else y + bias).to(kwargs.get("out_dtype") or dtype)


def _faked(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) if isinstance(x, Tensor) else x


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what its meta functions refuse."""
    import logging

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _replace(x: Tensor, value: Tensor) -> None:
    """`x.data = value`, across devices too, as CUDA tensors allow it."""
    torch.utils.swap_tensors(x, torch.nn.Parameter(value.detach(), requires_grad=x.requires_grad))


def _grouped(groups: dict) -> dict:
    """Lists of tensors by device and dtype, as C++ makes them, with the devices that Python sees."""
    return {(lists[0][0].device, dtype): (lists, where) for (_, dtype), (lists, where) in groups.items()}


def _strict(device: Device, sample: Callable) -> Callable:
    """The sampler, whose loop must never wait for the device, recorded or not; blocks that wait on the CPU may be copied."""

    def strict(*args: Any) -> Tensor:
        with device.strictly(copies=not device.recording):
            return sample(*args)

    return strict


def _by_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """In `scaled_linear_launch`'s place."""
    from ebr_engine.kernels.scaled_linear import scaled_linear_fp8_ref, scaled_linear_ref

    *layer, bound, gelu, dtype, _ = args
    return scaled_linear_fp8_ref(*layer, bound, gelu) if bound is not None else (scaled_linear_ref(*layer, gelu, dtype), None)


@contextmanager
def pretended(monkeypatch: Any) -> Iterator[Device]:
    """A process with one such device, an H200 by what it says of itself."""
    from ebr_engine.engine import execute
    from ebr_engine.kernels import attention, backend, scaled_linear

    device = Device()
    driver = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "NVIDIA H200",
        "mem_get_info": lambda *_: (2**37, 2**37),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: device.recording,
        "device": lambda *_: nullcontext(),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda *_: nullcontext(),
    }
    for name, stand_in in driver.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(execute, "CudaRecorder", lambda _: device.record)
    monkeypatch.setattr(execute, "sample", _strict(device, execute.sample))
    monkeypatch.setattr(attention, "served_by", lambda *_: None)
    monkeypatch.setattr(backend, "HAS_TRITON", True)  # operations take the way that they take on a device
    monkeypatch.setattr(backend, "VERIFY", "off")
    monkeypatch.setattr(backend, "launches", lambda _: False)  # with references in the kernels' place
    monkeypatch.setattr(scaled_linear, "launches_fp8", lambda x: x.is_cuda)  # but the library's fp8 products, and their rules
    monkeypatch.setattr(scaled_linear, "scaled_linear_launch", _by_reference)
    grouping = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", lambda x: _grouped(grouping(x)))
    with torch.autograd.set_multithreading_enabled(False), device.dispatching, device.calling:
        yield device
