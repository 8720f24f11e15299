"""LayerNorm and AdaLN modulation in one pass.

y = n · weight + bias,   n = (x − mean(x)) / sqrt(var(x) + eps)          weight = 1 + scale, bias = shift

Gradient, with g = dy · weight:   dx = (g − mean(g) − n · mean(g · n)) / sqrt(var(x) + eps)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
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


def modulated_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula for `x` in float32 (or float64), unrounded."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(wide(bias).unsqueeze(-2), normed, wide(weight).unsqueeze(-2))


def layer_norm_modulate_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula with float32 statistics; see `layer_norm_modulate`."""
    return modulated_ref(wide(x), weight, bias, eps).to(x.dtype)


def layer_norm_modulate_fp8_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Quantized:
    """The formula quantised before it is rounded; see `layer_norm_modulate_fp8`."""
    return quantize_fp8_ref(modulated_ref(wide(x), weight, bias, eps))


@triton.jit
def layer_norm_modulate_kernel(
    x, weight, bias, out, scale, x_batch, x_token, weight_batch, bias_batch, tokens, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    b, n = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    mask = cols < WIDTH
    b_n, _ = layer_norm_row(load_row(x, b * x_batch + n * x_token + cols, mask), mask, eps, WIDTH)
    b_y = b_n * load_row(weight, b * weight_batch + cols, mask) + load_row(bias, b * bias_batch + cols, mask)
    store_row(out, scale, row.to(tl.int64), cols, mask, b_y, WIDTH)


@triton.jit
def layer_norm_modulate_backward_kernel(
    gradient, x, weight, dx, g_batch, g_token, x_batch, x_token, weight_batch, tokens, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    b, n = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    mask = cols < WIDTH
    b_g = load_row(gradient, b * g_batch + n * g_token + cols, mask) * load_row(weight, b * weight_batch + cols, mask)
    b_n, inverse = layer_norm_row(load_row(x, b * x_batch + n * x_token + cols, mask), mask, eps, WIDTH)
    store_row(dx, None, row.to(tl.int64), cols, mask, layer_norm_row_gradient(b_g, b_n, inverse, WIDTH), WIDTH)


def layer_norm_modulate_launch(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, scale: Tensor | None = None
) -> None:
    """Run the kernel into `out`, contiguous; with `scale`, quantised."""
    batch, tokens, width = x.shape
    x, weight, bias = dense(x), dense(weight), dense(bias)
    tables = batch_stride("weight", weight, batch, width), batch_stride("bias", bias, batch, width)
    if x.numel():
        with backend.on(x):
            layer_norm_modulate_kernel[(batch * tokens,)](
                x, weight, bias, out, scale, *x.stride()[:2], *tables, tokens, eps, **tile(width)
            )


def layer_norm_modulate_backward_launch(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run the gradient's kernel."""
    batch, tokens, width = x.shape
    gradient, x, weight = dense(gradient), dense(x), dense(weight)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        with backend.on(x):
            layer_norm_modulate_backward_kernel[(batch * tokens,)](
                gradient, x, weight, dx, *gradient.stride()[:2], *x.stride()[:2],
                batch_stride("weight", weight, batch, width), tokens, eps, **tile(width),
            )  # fmt: skip
    return dx


@torch.library.custom_op("ebr::layer_norm_modulate", mutates_args=())
@gated({"x": 1}, (1,))
def layer_norm_modulate_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.is_cuda and (cuda := backend.extension()):
        return cuda.layer_norm_modulate(x, weight, bias, eps)
    cpu = backend.native(x, weight, bias)
    if cpu and (out := cpu.layer_norm_modulate(x, weight, bias, eps)) is not None:
        return out
    if not launches(x):
        return layer_norm_modulate_ref(x, weight, bias, eps).contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    layer_norm_modulate_launch(x, weight, bias, eps, out)
    return out


@layer_norm_modulate_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ebr::layer_norm_modulate_backward", mutates_args=())
@gated({"gradient": 1, "x": 1}, (1,))
def layer_norm_modulate_backward_op(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if launches(x):
        return layer_norm_modulate_backward_launch(gradient, x, weight, eps)
    cpu = backend.native(gradient, x, weight)
    if cpu and (found := cpu.norm_gradient(None, gradient, x, None, weight, eps)):
        return found[0]
    return norm_gradient_ref(gradient, x, weight, eps).to(x.dtype).contiguous()


@layer_norm_modulate_backward_op.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ebr::layer_norm_modulate_fp8", mutates_args=())
@gated({"x": 1}, (1, 1))
def layer_norm_modulate_fp8_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda and (cuda := backend.extension()):
        return cuda.layer_norm_modulate_fp8(x, weight, bias, eps)
    if not launches_fp8(x):
        return tuple(t.contiguous() for t in layer_norm_modulate_fp8_ref(x, weight, bias, eps))
    values, scale = empty_quantized(x)
    layer_norm_modulate_launch(x, weight, bias, eps, values, scale)
    return values, scale


@layer_norm_modulate_fp8_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return empty_quantized(x)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    needed = *ctx.needs_input_grad[1:3], False
    if any(needed) and backend.native_kind(x):
        dx, _, tables = norm_gradients(None, gradient, x, None, None, weight, ctx.eps, needed)
    else:
        dx = layer_norm_modulate_backward_op(gradient, x, weight, ctx.eps) if ctx.needs_input_grad[0] else None
        tables = table_gradients(gradient, x, ctx.eps, needed)
    return dx, like(tables.weight, weight), like(tables.bias, bias), None


layer_norm_modulate_op.register_autograd(_backward, setup_context=_save)


def layer_norm_modulate(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise rows without affine weights and modulate them (DiT's AdaLN).

    Args: `x` [B, N, D]; `weight` (1 + scale) and `bias` (shift) [B or 1, D] float32; `eps` is added to the variance.
    Returns: [B, N, D] in `x.dtype`.
    """
    cpu = backend.native(x, weight, bias)
    if cpu and (out := cpu.layer_norm_modulate(x, weight, bias, eps)) is not None:
        return out
    registered = backend.registered(x) or backend.native_learning(x, weight, bias)
    modulate = layer_norm_modulate_op if registered else layer_norm_modulate_ref
    return modulate(x, weight, bias, eps)


def layer_norm_modulate_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Quantized:
    """`layer_norm_modulate` for an fp8 linear: `quantize_fp8` of its float32 result, which is not rounded in between.

    Args: as of `layer_norm_modulate`. Returns: values [B, N, D] and scale [B, N, 1]. No gradient: `ValueError` if asked for.
    """
    refuse_gradient("layer_norm_modulate_fp8", x, weight, bias)
    if backend.registered(x):
        return Quantized(*layer_norm_modulate_fp8_op(x, weight, bias, eps))
    return layer_norm_modulate_fp8_ref(x, weight, bias, eps)
