"""A gated residual and the norm that follows it, in one pass.

x' = x + gate · y
n  = LayerNorm(x') · weight + bias          affine weights, or a modulation with weight = 1 + scale, bias = shift

Gradients:   dx = dx' + (gradient of the norm, see norm_gradients),   dy = gate · dx
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.layer_norm_modulate import modulated_ref
from ebr_engine.kernels.norm_gradients import like, norm_gradient_ref, norm_gradients, table_gradients
from ebr_engine.kernels.quantize_fp8 import Quantized, empty_quantized, quantize_fp8_ref
from ebr_engine.kernels.rows import (
    batch_stride,
    dense,
    launches,
    launches_fp8,
    layer_norm_row,
    layer_norm_row_gradient,
    load_row,
    refuse_gradient,
    store_row,
    tile,
    wide,
)


def gated_sum_ref(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """The new residual stream in float32 (or float64), unrounded."""
    return wide(x) + wide(y) if gate is None else torch.addcmul(wide(x), wide(y), wide(gate).unsqueeze(-2))


def gated_residual_norm_ref(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The formulas in float32; see `gated_residual_norm`."""
    total = gated_sum_ref(x, y, gate)
    return total.to(x.dtype), modulated_ref(total, weight, bias, eps).to(x.dtype)


def gated_residual_norm_fp8_ref(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Quantized]:
    """The formulas with the norm quantised before it is rounded; see `gated_residual_norm_fp8`."""
    total = gated_sum_ref(x, y, gate)
    return total.to(x.dtype), quantize_fp8_ref(modulated_ref(total, weight, bias, eps))


def gated_residual_norm_backward_ref(
    sum_gradient: Tensor, norm_gradient: Tensor, total: Tensor, gate: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients' formulas in float32: of x, and of y (empty without a gate, where it is that of x)."""
    dx = wide(sum_gradient) + norm_gradient_ref(norm_gradient, total, weight, eps)
    dy = dx.new_empty(0) if gate is None else dx * wide(gate).unsqueeze(-2)
    return dx.to(total.dtype), dy.to(total.dtype)


@triton.jit
def gated_residual_norm_kernel(
    x, y, gate, weight, bias, total, out, scale,
    x_batch, x_token, y_batch, y_token, gate_batch, weight_batch, bias_batch, tokens, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    b, n = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    mask = cols < WIDTH
    b_x = load_row(x, b * x_batch + n * x_token + cols, mask)
    b_y = load_row(y, b * y_batch + n * y_token + cols, mask)
    if gate is not None:
        b_y *= load_row(gate, b * gate_batch + cols, mask)
    b_x += b_y
    store_row(total, None, row.to(tl.int64), cols, mask, b_x, WIDTH)
    b_n, _ = layer_norm_row(b_x, mask, eps, WIDTH)
    b_n = b_n * load_row(weight, b * weight_batch + cols, mask) + load_row(bias, b * bias_batch + cols, mask)
    store_row(out, scale, row.to(tl.int64), cols, mask, b_n, WIDTH)


@triton.jit
def gated_residual_norm_backward_kernel(
    sum_gradient, norm_gradient, total, gate, weight, dx, dy,
    s_batch, s_token, g_batch, g_token, gate_batch, weight_batch, tokens, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    b, n = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    mask = cols < WIDTH
    b_g = load_row(norm_gradient, b * g_batch + n * g_token + cols, mask) * load_row(weight, b * weight_batch + cols, mask)
    b_n, inverse = layer_norm_row(load_row(total, row.to(tl.int64) * WIDTH + cols, mask), mask, eps, WIDTH)
    b_dx = load_row(sum_gradient, b * s_batch + n * s_token + cols, mask)
    b_dx += layer_norm_row_gradient(b_g, b_n, inverse, WIDTH)
    store_row(dx, None, row.to(tl.int64), cols, mask, b_dx, WIDTH)
    if gate is not None:
        store_row(dy, None, row.to(tl.int64), cols, mask, b_dx * load_row(gate, b * gate_batch + cols, mask), WIDTH)


def gated_residual_norm_launch(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Run the kernel, the norm into `out`, contiguous; with `scale`, quantised. Returns the new residual stream."""
    batch, tokens, width = x.shape
    if y.shape != x.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}; that of x, {tuple(x.shape)}, was expected")
    x, y, weight, bias = dense(x), dense(y), dense(weight), dense(bias)
    gate = None if gate is None else dense(gate)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    tables = (
        0 if gate is None else batch_stride("gate", gate, batch, width),
        batch_stride("weight", weight, batch, width),
        batch_stride("bias", bias, batch, width),
    )
    if x.numel():
        with backend.on(x):
            gated_residual_norm_kernel[(batch * tokens,)](
                x, y, gate, weight, bias, total, out, scale,
                *x.stride()[:2], *y.stride()[:2], *tables, tokens, eps, **tile(width),
            )  # fmt: skip
    return total


def gated_residual_norm_backward_launch(
    sum_gradient: Tensor, norm_gradient: Tensor, total: Tensor, gate: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Run the gradients' kernel; results as of `gated_residual_norm_backward_ref`."""
    batch, tokens, width = total.shape
    sum_gradient, norm_gradient, total, weight = dense(sum_gradient), dense(norm_gradient), total.contiguous(), dense(weight)
    gate = None if gate is None else dense(gate)
    dx = torch.empty_like(total)
    dy = total.new_empty(0) if gate is None else torch.empty_like(total)
    tables = 0 if gate is None else batch_stride("gate", gate, batch, width), batch_stride("weight", weight, batch, width)
    if total.numel():
        with backend.on(total):
            gated_residual_norm_backward_kernel[(batch * tokens,)](
                sum_gradient, norm_gradient, total, gate, weight, dx, dy,
                *sum_gradient.stride()[:2], *norm_gradient.stride()[:2], *tables, tokens, eps, **tile(width),
            )  # fmt: skip
    return dx, dy


@torch.library.custom_op("ebr::gated_residual_norm", mutates_args=())
@gated({"x": 1, "y": 1}, (1, 1))
def gated_residual_norm_op(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if x.is_cuda and (cuda := backend.extension()):
        return cuda.gated_residual_norm(x, y, gate, weight, bias, eps)
    cpu = backend.native(x, y, gate, weight, bias)
    if cpu and (results := cpu.gated_residual_norm(x, y, gate, weight, bias, eps)):
        return results
    if not launches(x):
        return tuple(t.contiguous() for t in gated_residual_norm_ref(x, y, gate, weight, bias, eps))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return gated_residual_norm_launch(x, y, gate, weight, bias, eps, out), out


@gated_residual_norm_op.register_fake
def _(x, y, gate, weight, bias, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


@torch.library.custom_op("ebr::gated_residual_norm_backward", mutates_args=())
@gated({"sum_gradient": 1, "norm_gradient": 1, "total": 1}, (1, 1))
def gated_residual_norm_backward_op(
    sum_gradient: Tensor, norm_gradient: Tensor, total: Tensor, gate: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if launches(total):
        return gated_residual_norm_backward_launch(sum_gradient, norm_gradient, total, gate, weight, eps)
    cpu = backend.native(sum_gradient, norm_gradient, total, gate, weight)
    if cpu and (found := cpu.norm_gradient(sum_gradient, norm_gradient, total, gate, weight, eps)):
        return found[0], total.new_empty(0) if gate is None else found[1]
    gradients = gated_residual_norm_backward_ref(sum_gradient, norm_gradient, total, gate, weight, eps)
    return tuple(t.contiguous() for t in gradients)


@gated_residual_norm_backward_op.register_fake
def _(sum_gradient, norm_gradient, total, gate, weight, eps):
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    return dx, total.new_empty(0) if gate is None else torch.empty_like(dx)


@torch.library.custom_op("ebr::gated_residual_norm_fp8", mutates_args=())
@gated({"x": 1, "y": 1}, (1, 1, 1))
def gated_residual_norm_fp8_op(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda and (cuda := backend.extension()):
        return cuda.gated_residual_norm_fp8(x, y, gate, weight, bias, eps)
    if not launches_fp8(x):
        total, normed = gated_residual_norm_fp8_ref(x, y, gate, weight, bias, eps)
        return tuple(t.contiguous() for t in (total, *normed))
    values, scale = empty_quantized(x)
    return gated_residual_norm_launch(x, y, gate, weight, bias, eps, values, scale), values, scale


@gated_residual_norm_fp8_op.register_fake
def _(x, y, gate, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *empty_quantized(x)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, weight, bias, ctx.eps = inputs
    # The next operation keeps the residual stream anyway; y is only needed for the gradient of a gate.
    ctx.save_for_backward(output[0], y if ctx.needs_input_grad[2] else None, gate, weight, bias)


def _backward(ctx, sum_gradient: Tensor, norm_gradient: Tensor) -> tuple:
    total, y, gate, weight, bias = ctx.saved_tensors
    needed = *ctx.needs_input_grad[3:5], y is not None
    if any(needed) and backend.native_kind(total):
        dx, dy, tables = norm_gradients(sum_gradient, norm_gradient, total, y, gate, weight, ctx.eps, needed)
    else:
        dx, dy = gated_residual_norm_backward_op(sum_gradient, norm_gradient, total, gate, weight, ctx.eps)
        tables = table_gradients(norm_gradient, total, ctx.eps, needed, dx, y)
    affine = like(tables.weight, weight), like(tables.bias, bias)
    return dx, dx if gate is None else dy, like(tables.gate, gate), *affine, None


gated_residual_norm_op.register_autograd(_backward, setup_context=_save)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and normalise the sum for the next branch.

    Args: `x`, `y` [B, N, D]; `gate` [B or 1, D] float32, or None for 1; `weight`, `bias` [B or 1, D]; `eps` is added to
    the variance.
    Returns: the new residual stream and its norm, both [B, N, D] in `x.dtype`; statistics are float32, taken before the
    residual stream is rounded.
    """
    cpu = backend.native(x, y, gate, weight, bias)
    if cpu and (results := cpu.gated_residual_norm(x, y, gate, weight, bias, eps)):
        return results
    registered = backend.registered(x) or backend.native_learning(x, y, gate, weight, bias)
    add_norm = gated_residual_norm_op if registered else gated_residual_norm_ref
    return add_norm(x, y, gate, weight, bias, eps)


def gated_residual_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Quantized]:
    """`gated_residual_norm` for an fp8 linear: the norm is `quantize_fp8` of its float32 result, not rounded in between.

    Args: as of `gated_residual_norm`. Returns: the new residual stream [B, N, D] in `x.dtype`; values [B, N, D] and scale
    [B, N, 1] of its norm. No gradient: `ValueError` if asked for.
    """
    refuse_gradient("gated_residual_norm_fp8", x, y, gate, weight, bias)
    if not backend.registered(x):
        return gated_residual_norm_fp8_ref(x, y, gate, weight, bias, eps)
    total, values, scale = gated_residual_norm_fp8_op(x, y, gate, weight, bias, eps)
    return total, Quantized(values, scale)
