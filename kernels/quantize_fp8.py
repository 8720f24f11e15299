"""Quantisation to fp8 by row.

scale_r = max(|x_r|) / 448,   q_r = round_e4m3(x_r / scale_r)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.rows import launches_fp8, load_row, store_row, tile

E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-12  # a row of zeros keeps a scale that can be divided by


class Quantized(NamedTuple):
    """A tensor quantised by row: `values` [..., K] float8_e4m3fn and `scale` [..., 1] float32; x ≈ values · scale."""

    values: Tensor
    scale: Tensor


def quantize_fp8_ref(x: Tensor) -> Quantized:
    """The formula in float32; see `quantize_fp8`.

    Both divisions are products with a reciprocal rounded to float32, as the kernels do them: torch's own division by a
    number is one on a CPU and the other on a GPU.
    """
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) * (1 / E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    return Quantized((wide * scale.reciprocal()).to(torch.float8_e4m3fn), scale)


@triton.jit
def quantize_fp8_kernel(x, values, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = cols < WIDTH
    store_row(values, scale, row, cols, mask, load_row(x, row * WIDTH + cols, mask), WIDTH)


def empty_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the values and the scale of a tensor like `x`."""
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return values, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def quantize_fp8_launch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel; any shape."""
    x = x.contiguous()
    values, scale = empty_quantized(x)
    if x.numel():
        with backend.on(x):
            quantize_fp8_kernel[(scale.numel(),)](x, values, scale, **tile(x.shape[-1]))
    return values, scale


@torch.library.custom_op("ebr::quantize_fp8", mutates_args=())
@gated({"x": -2}, (-2, -2))
def quantize_fp8_op(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_cuda and (cuda := backend.extension()):
        return cuda.quantize_fp8(x)
    return quantize_fp8_launch(x) if launches_fp8(x) else tuple(t.contiguous() for t in quantize_fp8_ref(x))


@quantize_fp8_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_quantized(x)


def quantize_fp8(x: Tensor) -> Quantized:
    """Quantise rows: `x` [..., K] → values [..., K] float8_e4m3fn and scales [..., 1] float32, with x ≈ values · scales."""
    return Quantized(*quantize_fp8_op(x)) if backend.registered(x) else quantize_fp8_ref(x)
