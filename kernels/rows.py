"""What the row-wise operations share: how a row is laid out on threads, and its arithmetic once it is in registers."""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton

ELEMENTS = 16  # of a row a thread: two 16-byte loads of bf16 in flight, and few enough registers for a full processor
LARGEST_WARPS = 16


def wide(x: Tensor) -> Tensor:
    """`x` in the precision of a reference's arithmetic: float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def launches(x: Tensor) -> bool:
    """Whether the row-wise kernels serve `x`; their arithmetic is float32, so float64 is left to the reference."""
    return backend.launches(x) and x.dtype != torch.float64


def launches_fp8(x: Tensor) -> bool:
    """Whether the kernels that write e4m3 serve `x`: a device has to cast to it; Triton's interpreter does."""
    return launches(x) and (not x.is_cuda or backend.has_fp8(x.device))


def warps(elements: int) -> int:
    """Warps of a program that holds `elements` of every operand."""
    return min(max(elements // (32 * ELEMENTS), 1), LARGEST_WARPS)


def tile(width: int) -> dict:
    """Compile-time values of a kernel whose program holds one row of `width` elements."""
    block = triton.next_power_of_2(width)
    # Whether products and sums fuse is pinned: its default differs between Triton versions.
    return {"WIDTH": width, "BLOCK": block, "num_warps": warps(block), "enable_fp_fusion": True}


def dense(x: Tensor) -> Tensor:
    """`x` if elements of its last dimension lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def batch_stride(name: str, table: Tensor, batch: int, width: int) -> int:
    """Elements from one sample's row of `table` [batch or 1, width] to the next one's, 0 if they share it."""
    if table.shape not in ((batch, width), (1, width)):
        raise ValueError(f"{name} has shape {tuple(table.shape)}; [{batch} or 1, {width}] was expected")
    return table.stride(0) if table.shape[0] > 1 else 0


def refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    """ValueError if a gradient through an operation that ends in e4m3 is asked for."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(f"{name} has no gradient: run it under torch.no_grad(), or use the operation without fp8")


@triton.jit
def load_row(x, offsets, mask):
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def layer_norm_row(b_x, mask, eps, WIDTH: tl.constexpr):
    """The row without mean and deviation, and one over its deviation."""
    b_x = tl.where(mask, b_x - tl.sum(b_x, 0) / WIDTH, 0.0)
    inverse = tl.rsqrt(tl.sum(b_x * b_x, 0) / WIDTH + eps)
    return b_x * inverse, inverse


@triton.jit
def layer_norm_row_gradient(b_g, b_n, inverse, WIDTH: tl.constexpr):
    """From the gradient of the normed row `b_n` to that of the row."""
    return inverse * (b_g - tl.sum(b_g, 0) / WIDTH - b_n * (tl.sum(b_g * b_n, 0) / WIDTH))


@triton.jit
def store_row(out, scale, row, cols, mask, b_y, WIDTH: tl.constexpr):
    """Write a row rounded to the output's dtype; with `scale`, quantised as `quantize_fp8_ref` does it, bit for bit."""
    if scale is not None:
        size = tl.maximum(tl.max(tl.abs(b_y), 0) * (1.0 / 448.0), 1e-12)
        tl.store(scale + row, size)
        b_y = b_y * tl.div_rn(1.0, size)  # at most 448 and its rounding, which the cast takes back to 448
    tl.store(out + row * WIDTH + cols, b_y.to(out.dtype.element_ty), mask=mask)
