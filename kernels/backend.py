"""Which implementation serves an operation: decided once, here; the only module of the kernels that reads the environment.

`EBR_KERNELS` asks for one: `auto` (Triton on a CUDA device; on a CPU native code where it is built, for the operations that it
has, through their registrations where something is learned; plain torch elsewhere), `torch`, `triton`, `cuda` (the extension
for the operations it has, Triton for the rest). With `triton` or `cuda` every operation goes through its torch.library
registration on any device; on a CPU that runs Triton's interpreter if `TRITON_INTERPRET=1` is set, the reference otherwise.
`EBR_CPU_LEVEL` names the instructions that native code may use, of those that this CPU has; `EBR_CPU_TUNE` says whether one of
several ways is chosen by timing them (`tune.py`).

`EBR_VERIFY` asks when a kernel is compared with its reference (`gate.py`): `first`, on its first use; `always`; or `off`.
"""

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.nn import Parameter

from ebr_engine import settings

CHOICES = ("auto", "torch", "triton", "cuda")
ASKED = os.environ.get("EBR_KERNELS", "auto")
CPU_LEVEL = os.environ.get("EBR_CPU_LEVEL", "auto")
CPU_LEVELS = ("auto", "baseline", "avx2", "avx512", "avx512_bf16", "amx")
TUNE = os.environ.get("EBR_CPU_TUNE", "on")
TUNES = ("off", "on", "again")
VERIFY_CHOICES = {"off": "never compared", "first": "compared on first use", "always": "compared at every call"}  # as told
VERIFY = os.environ.get("EBR_VERIFY", "first")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
HAS_TRITON = find_spec("triton") is not None
HAS_NATIVE = find_spec("ebr_engine._cpu") is not None
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
FORCED = ASKED in ("triton", "cuda")

distrusted: dict[str, str] = {}  # operations whose kernel was found wrong in this process, and how; see `gate.py`
_asked = threading.local()

if HAS_TRITON and (FORCED or INTERPRETED or torch.version.cuda):
    import triton
    import triton.language as tl
else:  # kernels are defined, never launched; a start on a CPU is spared the import
    triton, tl = SimpleNamespace(jit=lambda function: function, cdiv=None), SimpleNamespace(constexpr=None)


@dataclass(frozen=True)
class Backend:
    """A way to run the operations: its name, whether this installation can use it, and why (not)."""

    name: str
    available: bool
    reason: str


def registered(x: Tensor) -> bool:
    """Whether an operation on `x` goes through its registration; if not, its reference runs in place, open to the compiler."""
    return FORCED or (x.is_cuda and HAS_TRITON and ASKED == "auto")


@contextmanager
def in_place() -> Iterator[None]:
    """Within it, operations of this process run their formulas in place of registrations, unless some are asked for: for who
    learns a model's own weights on a GPU, for which kernels there have no gradients."""
    global ASKED
    before, ASKED = ASKED, "torch" if ASKED == "auto" else ASKED
    try:
        yield
    finally:
        ASKED = before


def launches(x: Tensor) -> bool:
    """Whether Triton kernels can run on `x`: on a CUDA device, or anywhere in the interpreter."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and not by_reference()


def by_reference() -> bool:
    """Whether this thread's operations run their references whatever there is."""
    return getattr(_asked, "references", False)


@contextmanager
def references() -> Iterator[None]:
    """Within it, this thread's operations run their references."""
    before, _asked.references = by_reference(), True
    try:
        yield
    finally:
        _asked.references = before


def extension() -> ModuleType | None:
    """The launchers of the CUDA extension (`kernels/cuda.py`) if it is asked for and built, else None."""
    return None if by_reference() else _extension()


@functools.cache
def _extension() -> ModuleType | None:
    if ASKED != "cuda" or find_spec("ebr_engine._csrc") is None:
        return None
    return import_module("ebr_engine.kernels.cuda")


def native(*tensors: Tensor | None) -> ModuleType | None:
    """The launchers of the native code for CPUs (`kernels/cpu.py`) if it may serve these tensors, else None.

    It may not where a gradient is asked for, where a compiler traces (which fuses row-wise references itself), nor where the
    tensors are no memory (a subclass's).
    """
    if torch.compiler.is_compiling() or learned(*tensors):
        return None
    return _serving(tensors)


def native_learning(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for of these tensors, and native code serves it, through an operation's registration.

    Under a compiler too: what it fuses is slower than this code, gradients and all.
    """
    if not learned(*tensors):
        return False
    if torch.compiler.is_compiling():
        return native_kind(tensors[0])
    module = _serving(tensors)
    if module is None or not module.takes(*tensors):
        return False
    module.learns()
    return True


def native_kind(x: Tensor) -> bool:
    """Whether native code is there for tensors such as `x`, real or not."""
    return HAS_NATIVE and ASKED == "auto" and x.is_cpu and x.dtype in NATIVE_DTYPES


def learned(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for of any of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _serving(tensors: Sequence[Tensor | None]) -> ModuleType | None:
    if ASKED != "auto" or by_reference() or not tensors[0].is_cpu:
        return None
    return _native() if real(*tensors) else None


def real(*tensors: Tensor | None) -> bool:
    """Whether tensors are memory, none a subclass's, such as those that only count."""
    return all(x is None or type(x) in (Tensor, Parameter) for x in tensors)


def return_memory() -> None:
    """Give memory that was freed in this process back to the system, where native code is built; a few milliseconds."""
    if (module := _native()) is not None:
        module.return_memory()


def native_level() -> str:
    """The level of instructions that native code runs at, as `info` tells it; `no native code` where there is none."""
    module = _native()
    return "no native code" if module is None or ASKED != "auto" else module.levels()[module.level()]


@functools.cache
def native_build() -> str:
    """Tells one build of the native code from another; empty where there is none."""
    return sha256(Path(_native()._cpu.__file__).read_bytes()).hexdigest()[:8] if HAS_NATIVE else ""


def keep_compiled() -> None:
    """Have torch's compiler keep what it makes for this state of the operations in our cache folder, unless
    `TORCHINDUCTOR_CACHE_DIR` names another.

    An operation's gradient and arguments are in a compiled graph, but not in what torch finds that by: without a tag those of an
    older state would go on (seen with torch 2.13; `findings/torch_compile_keeps_old_gradients.sh`).
    """
    import torch.compiler.config as config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.cache_dir() / "inductor"))
    if operations_tag() not in config.cache_key_tag:
        config.cache_key_tag += operations_tag()


@functools.cache
def operations_tag() -> str:
    """Tells one state of the operations' Python code from another."""
    digest = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f" ebr-engine {digest.hexdigest()[:12]}"


@functools.cache
def _native() -> ModuleType | None:
    return import_module("ebr_engine.kernels.cpu") if HAS_NATIVE else None


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies and casts e4m3 in hardware: CUDA from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def capability(x: Tensor) -> int:
    """The major compute capability that tiles and forms are chosen by; 0 in the interpreter."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def processors(x: Tensor) -> int:
    """How many programs run at once, one on each multiprocessor; 3 in the interpreter, which runs one after the other."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def scratch(x: Tensor) -> None:
    """From here on Triton takes what kernels need beside their arguments (for descriptors) from torch, on the device of `x`.

    A graph that is being recorded gets it from its own pool.
    """
    if x.is_cuda:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))


def on(x: Tensor) -> AbstractContextManager:
    """The context to launch a kernel on `x` in: its own CUDA device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def backends() -> list[Backend]:
    """The kernel backends in order of preference, with the reason for each that is not there."""
    device = torch.cuda.is_available()
    built = find_spec("ebr_engine._csrc") is not None
    cuda = "built; used with EBR_KERNELS=cuda" if built else "not built: EBR_BUILD_CUDA=1 pip install . tells why"
    if not HAS_TRITON:
        triton_reason = "not installed: pip install triton"
    elif INTERPRETED:
        triton_reason = "runs in its interpreter (TRITON_INTERPRET=1)"
    else:
        triton_reason = "used on CUDA devices" if device else "needs a CUDA device"
    if HAS_TRITON and (device or INTERPRETED):
        triton_reason += f", {VERIFY_CHOICES.get(VERIFY, VERIFY)} with torch"
    triton_reason += "".join(f"; {name} is left to torch: {fault}" for name, fault in distrusted.items())
    module = _native()
    if module is None:
        cpu_reason = "not built: EBR_BUILD_CPU=1 pip install . tells why"
    else:
        unused = "" if ASKED == "auto" else "; not used with EBR_KERNELS=" + ASKED
        cpu_reason = f"used on CPUs, at the level {module.levels()[module.level()]}" + unused
    return [
        Backend("cuda", built and device, cuda if device or not built else "built, but there is no CUDA device"),
        Backend("triton", HAS_TRITON and (device or INTERPRETED), triton_reason),
        Backend("cpu", module is not None and ASKED == "auto", cpu_reason),
        Backend("torch", True, "plain torch operations (the references), on any device"),
    ]
