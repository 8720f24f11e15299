"""The gate of a gated feed-forward (SwiGLU), joined with what goes into the next linear layer beside it, in one pass.

y = [beside, silu(g) · u],   x = [g, u],   silu(g) = g · σ(g),   σ(g) = 1 / (1 + exp(−g))

Gradient, with dh the part of dy that is not beside's:   dg = dh · u · σ(g) · (1 + g · (1 − σ(g))),   du = dh · silu(g)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.quantize_fp8 import Quantized, quantize_fp8_ref
from ebr_engine.kernels.rows import dense, launches, launches_fp8, load_row, refuse_gradient, tile, wide


def joined_ref(x: Tensor, beside: Tensor | None) -> Tensor:
    """The formula in float32 (or float64), unrounded."""
    gate, up = wide(x).chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    return hidden if beside is None else torch.cat((wide(beside), hidden), dim=-1)


def gated_activation_ref(x: Tensor, beside: Tensor | None) -> Tensor:
    """The formula, rounded once; see `gated_activation`."""
    return joined_ref(x, beside).to(x.dtype)


def gated_activation_fp8_ref(x: Tensor, beside: Tensor | None) -> Quantized:
    """The formula quantised before it is rounded; see `gated_activation_fp8`."""
    return quantize_fp8_ref(joined_ref(x, beside))


def gated_activation_gradient_ref(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of `x` in float32 (or float64), unrounded; `gradient` [..., H] is that of silu(g) · u."""
    (gate, up), dh = wide(x).chunk(2, dim=-1), wide(gradient)
    share = torch.sigmoid(gate)
    return torch.cat((dh * up * share * (1 + gate * (1 - share)), dh * gate * share), dim=-1)


@triton.jit
def gated_activation_kernel(
    x, beside, out, scale, beside_token,
    SIDE: tl.constexpr, SIDE_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, side = cols < WIDTH, tl.arange(0, SIDE_BLOCK)
    b_gate = load_row(x, row * 2 * WIDTH + cols, mask)
    b_y = b_gate / (1.0 + tl.exp(-b_gate)) * load_row(x, row * 2 * WIDTH + WIDTH + cols, mask)
    if beside is not None:
        b_side = load_row(beside, row * beside_token + side, side < SIDE)
    if scale is not None:
        largest = tl.max(tl.abs(b_y), 0)
        if beside is not None:
            largest = tl.maximum(largest, tl.max(tl.abs(b_side), 0))
        size = tl.maximum(largest * (1.0 / 448.0), 1e-12)
        tl.store(scale + row, size)
        b_y = b_y * tl.div_rn(1.0, size)  # at most 448 and its rounding, which the cast takes back to 448
        if beside is not None:
            b_side = b_side * tl.div_rn(1.0, size)
    start = row * (SIDE + WIDTH)
    if beside is not None:
        tl.store(out + start + side, b_side.to(out.dtype.element_ty), mask=side < SIDE)
    tl.store(out + start + SIDE + cols, b_y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_activation_backward_kernel(gradient, x, dx, gradient_token, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, gate, up = cols < WIDTH, row * 2 * WIDTH + cols, row * 2 * WIDTH + WIDTH + cols
    b_gate, b_dh = load_row(x, gate, mask), load_row(gradient, row * gradient_token + cols, mask)
    share = 1.0 / (1.0 + tl.exp(-b_gate))
    b_dgate = b_dh * load_row(x, up, mask) * share * (1.0 + b_gate * (1.0 - share))
    tl.store(dx + gate, b_dgate.to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + up, (b_dh * b_gate * share).to(dx.dtype.element_ty), mask=mask)


BACKWARD_BLOCK = 1024  # elements of a row a program of the gradient, which needs no whole row


def gated_activation_launch(x: Tensor, beside: Tensor | None, out: Tensor, scale: Tensor | None = None) -> None:
    """Run the kernel into `out`, contiguous; with `scale`, quantised."""
    x, width = x.contiguous(), x.shape[-1] // 2
    rows, side = x.numel() // max(1, 2 * width), 0
    if beside is not None:
        beside = dense(beside.reshape(-1, beside.shape[-1]))
        side = beside.shape[-1]
    if out.numel():
        with backend.on(x):
            gated_activation_kernel[(rows,)](
                x, beside, out, scale, side and beside.stride(0),
                SIDE=side, SIDE_BLOCK=triton.next_power_of_2(max(1, side)), **tile(width),
            )  # fmt: skip


def gated_activation_backward_launch(gradient: Tensor, x: Tensor) -> Tensor:
    """Run the gradient's kernel."""
    x, width = x.contiguous(), x.shape[-1] // 2
    gradient, dx = dense(gradient.reshape(-1, width)), torch.empty_like(x)
    if x.numel():
        with backend.on(x):
            gated_activation_backward_kernel[(gradient.shape[0], triton.cdiv(width, BACKWARD_BLOCK))](
                gradient, x, dx, gradient.stride(0),
                WIDTH=width, BLOCK=BACKWARD_BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return dx


def empty_joined(x: Tensor, beside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Room for y."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2 + (0 if beside is None else beside.shape[-1]), dtype=dtype)


@torch.library.custom_op("ebr::gated_activation", mutates_args=())
@gated({"x": -2, "beside": -2}, (-2,))
def gated_activation_op(x: Tensor, beside: Tensor | None) -> Tensor:
    if not launches(x):
        return gated_activation_ref(x, beside)
    out = empty_joined(x, beside, x.dtype)
    gated_activation_launch(x, beside, out)
    return out


@gated_activation_op.register_fake
def _(x: Tensor, beside: Tensor | None) -> Tensor:
    return empty_joined(x, beside, x.dtype)


@torch.library.custom_op("ebr::gated_activation_backward", mutates_args=())
@gated({"gradient": -2, "x": -2}, (-2,))
def gated_activation_backward_op(gradient: Tensor, x: Tensor) -> Tensor:
    if launches(x):
        return gated_activation_backward_launch(gradient, x)
    return gated_activation_gradient_ref(gradient, x).to(x.dtype)


@gated_activation_backward_op.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ebr::gated_activation_fp8", mutates_args=())
@gated({"x": -2, "beside": -2}, (-2, -2))
def gated_activation_fp8_op(x: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    if not launches_fp8(x):
        return tuple(gated_activation_fp8_ref(x, beside))
    values, scale = empty_joined(x, beside, torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    gated_activation_launch(x, beside, values, scale)
    return values, scale


@gated_activation_fp8_op.register_fake
def _(x: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_joined(x, beside, torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, ctx.joined = inputs[0], inputs[1] is not None
    ctx.save_for_backward(x)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (x,) = ctx.saved_tensors
    side = gradient.shape[-1] - x.shape[-1] // 2
    dx = gated_activation_backward_op(gradient[..., side:], x) if ctx.needs_input_grad[0] else None
    return dx, gradient[..., :side] if ctx.joined else None


gated_activation_op.register_autograd(_backward, setup_context=_save)


def gated_activation(x: Tensor, beside: Tensor | None = None) -> Tensor:
    """Activate the first half of every row, multiply it with the second, and put what comes beside it in front.

    Args: `x` [..., 2H], gates and values; `beside` [..., D] of the same dtype, or none. Returns: [..., D + H] in `x.dtype`.
    """
    run = gated_activation_op if backend.registered(x) else gated_activation_ref
    return run(x, beside)


def gated_activation_fp8(x: Tensor, beside: Tensor | None = None) -> Quantized:
    """`gated_activation` for an fp8 linear: `quantize_fp8` of its float32 result, which is not rounded in between.

    Args: as of `gated_activation`. Returns: values [..., D + H] and scale [..., 1]. No gradient: `ValueError` if asked for.
    """
    refuse_gradient("gated_activation_fp8", x, beside)
    if backend.registered(x):
        return Quantized(*gated_activation_fp8_op(x, beside))
    return gated_activation_fp8_ref(x, beside)
