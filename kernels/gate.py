"""A gate on first use: before a kernel is trusted it is compared with its reference on the run's own tensors.

A kernel that is right on one GPU, driver and compiler can be wrong on the next, and a picture seldom shows it. The first call
of every operation, data type and class of shapes is therefore compared, on its first few tokens and all of their channels, in
three ways: the kernel, the reference as it is ("eager"), and the reference in float64. The kernel may be off by

    error(kernel, float64) ≤ 2 · error(eager, float64) + floor

in relative root mean square. An operation that is further off, or whose kernel fails, runs its reference for the rest of the
process, which one warning tells. `EBR_VERIFY` (`backend.VERIFY`): `first` as said, `always` at every call, `off` never.

The gate lies inside of the registered operations: a compiler that traces one never sees it. While a CUDA graph is recorded
nothing is compared, since that reads a value; the warm-up before it has met all of its operations.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebr_engine.kernels import backend

logger = logging.getLogger("ebr_engine")

TOKENS = 8  # of the first that are compared
# What rounding alone may add. e4m3: a value near the middle of two may be rounded to either, an eighth apart.
FLOORS = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float8_e4m3fn: 1e-2}
USERS = (ValueError, torch.OutOfMemoryError)  # a fault of the call's, not of the kernel's

_compared: set[tuple] = set()


def gated(tokens: dict[str, int], results: Sequence[int] | None) -> Callable[[Callable], Callable]:
    """Put the gate before an operation whose kernels `backend.launches` and `backend.extension` choose.

    `tokens`: the arguments that have tokens, and in which dimension; `results`: that of every result. None where results sum
    over tokens: then the kernel itself is run on the few.
    """

    def decorate(operation: Callable) -> Callable:
        name = operation.__name__.removesuffix("_op")
        dims = [tokens.get(argument) for argument in inspect.signature(operation).parameters]

        @functools.wraps(operation)
        def call(*args: Any) -> Any:
            fused = args[0].is_cuda or backend.INTERPRETED
            if backend.VERIFY == "off" or not fused or backend.by_reference():
                return operation(*args)
            if name in backend.distrusted:
                return referred(operation, args)
            key = (name, *_kind(args))
            if (key in _compared and backend.VERIFY != "always") or recorded(args[0]):
                return operation(*args)
            try:
                result = operation(*args)
                fault = compared(operation, args, result, dims, results)
            except USERS:
                raise
            except Exception as error:  # a compiler or a driver that cannot run it raises almost anything
                fault = f"it failed ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
            if not fault:
                if fault is None:
                    _compared.add(key)
                return result
            backend.distrusted[name] = fault
            logger.warning("the kernel of %s is not used from here on, plain torch is: %s", name, fault)
            return referred(operation, args)

        return call

    return decorate


def recorded(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded on the device of `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def referred(operation: Callable, args: Sequence[Any]) -> Any:
    """The operation by its reference."""
    with backend.references():
        return operation(*args)


def compared(operation: Callable, args: Sequence[Any], result: Any, dims: Sequence, results: Sequence[int] | None) -> str | None:
    """What is wrong with a result, in words; None if it is as near to the float64 reference as it should be.

    Empty where that is not known: no input, or one whose exact result is not finite.
    """
    few = [_first(x, dim) for x, dim in zip(args, dims)]
    eager, exact = (_values(referred(operation, inputs)) for inputs in (few, [*map(_widened, few)]))
    found = _listed(result if results is not None else operation(*few))
    if results is not None:
        found = [_first(x, dim) for x, dim in zip(found, results)]
    rounded = {x.dtype for x in found} | {x.dtype for x in few if isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn}
    floor = max(FLOORS.get(dtype, 0.0) for dtype in rounded)
    rows = [
        torch.stack((_distance(value, true), _distance(plain, true), true.abs().sum()))
        for value, plain, true in zip(_values(found), eager, exact)
        if true.numel()
    ]
    errors = torch.stack(rows).tolist() if rows else []
    if not errors or not all(math.isfinite(size) for *_, size in errors):
        return ""
    for error, usual, _ in errors:
        allowed = 2 * usual + floor
        if not error <= allowed:  # a NaN is no error that is allowed
            return f"its relative error is {error:.2g}, at most {allowed:.2g} is allowed"
    return None


def _kind(args: Sequence[Any]) -> tuple:
    """Data types, the width, and how many rows there are to a power of two."""
    x = args[0]
    rows = x.shape[:-1].numel().bit_length()
    return x.device, x.shape[-1], rows, *(one.dtype if isinstance(one, Tensor) else one is None for one in args)


def _first(x: Any, dim: int | None) -> Any:
    if dim is None or not isinstance(x, Tensor) or not -x.dim() <= dim < x.dim():
        return x
    return x.narrow(dim, 0, min(TOKENS, x.shape[dim])).contiguous()  # as what a kernel wrote is where it comes from


def _widened(x: Any) -> Any:
    """In float64; values in e4m3 are exact as they are, and references read them as they are."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() and x.dtype != torch.float8_e4m3fn else x
    return torch.float64 if isinstance(x, torch.dtype) else x


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _values(result: Any) -> list[Tensor]:
    """Results in float64, those in e4m3 times the scales that follow them."""
    values: list[Tensor] = []
    quantized = None
    for x in _listed(result):
        if x.dtype == torch.float8_e4m3fn:
            quantized = x.float().double()
        else:
            values.append(x.double() if quantized is None else quantized * x.double())
            quantized = None
    return values


def _distance(value: Tensor, true: Tensor) -> Tensor:
    """Root mean square of the difference, relative to that of `true`."""
    return (value - true).norm() / true.norm().clamp(min=1e-30)
