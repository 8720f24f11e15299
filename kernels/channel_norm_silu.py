"""A norm over channels and SiLU in one pass: what lies before every convolution of a VAE.

y = silu(n · weight + bias)
RMS norm (Wan):            n = x · √D / max(|x|, eps)                        |x| over the channels of a pixel
group norm (FLUX):         n = (x − mean) / sqrt(variance + eps)             over a frame's pixels and the channels of a group

No gradients: codecs are never learned.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.rows import launches, refuse_gradient, warps, wide

ELEMENTS = 2048  # of a program: some pixels with all of their channels
SUM_WARPS = 8  # of a program that keeps two sums of every channel: with fewer they leave the registers
PARTS = 128  # programs that sum up a frame's statistics


def channel_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, silu: bool, before: Tensor | None = None
) -> Tensor:
    """The formula with float32 statistics, rounded once; `x` and the result [frames, pixels, D]."""
    if groups:
        normed = F.group_norm(wide(x).transpose(1, 2), groups, eps=eps).transpose(1, 2)
    else:
        normed = F.normalize(wide(x), dim=-1, eps=eps) * x.shape[-1] ** 0.5
    y = normed * wide(weight) if bias is None else torch.addcmul(wide(bias), normed, wide(weight))
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y if before is None else torch.cat((before, y))


@triton.jit
def rms_pixels_kernel(
    x, weight, bias, out, pixels, eps, root,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, BLOCK)
    inside = cols < WIDTH
    mask, at = (rows < pixels)[:, None] & inside[None, :], rows[:, None] * WIDTH + cols[None, :]
    b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    inverse = root / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), eps)
    b_y = b_x * inverse[:, None] * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    tl.store(out + at, b_y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def group_sums_kernel(x, sums, pixels, share, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    """A part's sums of every channel's difference from the frame's first pixel, and of its square."""
    frame, part, cols = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = cols < WIDTH
    x += frame * pixels * WIDTH
    pivot = tl.load(x + cols, mask=inside, other=0.0).to(tl.float32)
    first, second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, pixels), PIXELS):
        rows = start + tl.arange(0, PIXELS)
        mine = rows < tl.minimum((part + 1) * share, pixels)
        mask, at = mine[:, None] & inside[None, :], rows.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        b_x = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - pivot[None, :], 0.0)
        first += tl.sum(b_x, 0)
        second += tl.sum(b_x * b_x, 0)
    to = sums + (frame * tl.num_programs(1) + part) * 2 * WIDTH + cols
    tl.store(to, first, mask=inside)
    tl.store(to + WIDTH, second, mask=inside)


@triton.jit
def group_pixels_kernel(
    x, scale, shift, out, pixels,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    frame, rows = tl.program_id(1).to(tl.int64), tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    mask, at = (rows < pixels)[:, None] & inside[None, :], (frame * pixels + rows)[:, None] * WIDTH + cols[None, :]
    b_scale = tl.load(scale + frame * WIDTH + cols, mask=inside, other=0.0)
    b_shift = tl.load(shift + frame * WIDTH + cols, mask=inside, other=0.0)
    b_y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * b_scale[None, :] + b_shift[None, :]
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    tl.store(out + at, b_y.to(out.dtype.element_ty), mask=mask)


def sizes(width: int) -> dict:
    """Compile-time values of a kernel whose program holds some whole pixels."""
    block = triton.next_power_of_2(width)
    pixels = max(1, ELEMENTS // block)
    return {"WIDTH": width, "BLOCK": block, "PIXELS": pixels, "num_warps": warps(block * pixels), "enable_fp_fusion": True}


def rms_pixels_launch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, silu: bool, out: Tensor) -> None:
    """Run the kernel of the RMS norm into `out`, contiguous."""
    frames, pixels, width = x.shape
    values = sizes(width)
    with backend.on(x):
        rms_pixels_kernel[(triton.cdiv(frames * pixels, values["PIXELS"]),)](
            x, weight, bias, out, frames * pixels, eps, width**0.5, SILU=silu, **values
        )


def group_pixels_launch(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, silu: bool, out: Tensor) -> None:
    """Run the two kernels of the group norm into `out`, contiguous."""
    frames, pixels, width = x.shape
    values = sizes(width)
    share = triton.cdiv(triton.cdiv(pixels, PARTS), values["PIXELS"]) * values["PIXELS"]
    sums = x.new_empty(frames, triton.cdiv(pixels, share), 2, width, dtype=torch.float32)
    with backend.on(x):
        group_sums_kernel[sums.shape[:2]](x, sums, pixels, share, **values | {"num_warps": SUM_WARPS})
        scale, shift = group_tables(x, sums, weight, bias, groups, eps)
        group_pixels_kernel[(triton.cdiv(pixels, values["PIXELS"]), frames)](x, scale, shift, out, pixels, SILU=silu, **values)


def group_tables(x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """What every channel of a frame is multiplied by and what is added then, [frames, D] float32; a few numbers in float64."""
    pixels, pivot = x.shape[1], x[:, 0].double()
    first, second = sums.double().sum(1).unbind(1)
    origin = pivot.unflatten(1, (groups, -1))[..., :1]  # [frames, groups, 1]
    first, second, pivot = (t.unflatten(1, (groups, -1)) for t in (first, second, pivot))
    apart = pivot - origin
    mean = (first / pixels + apart).mean(-1, keepdim=True)  # from the origin
    variance = (second / pixels + 2 * apart * first / pixels + apart.square()).mean(-1, keepdim=True) - mean.square()
    scale = (variance.clamp(min=0) + eps).rsqrt().expand_as(pivot).flatten(1) * weight.double()
    shift = -(mean + origin).expand_as(pivot).flatten(1) * scale
    return scale.float(), (shift if bias is None else shift + bias.double()).float()


@torch.library.custom_op("ebr::channel_norm_silu", mutates_args=())
@gated({"x": 1, "before": 1}, None)
def channel_norm_silu_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, silu: bool, before: Tensor | None
) -> Tensor:
    if not launches(x):
        return channel_norm_silu_ref(x, weight, bias, groups, eps, silu, before).contiguous()
    led = 0 if before is None else len(before)
    out = x.new_empty(led + len(x), *x.shape[1:])
    if before is not None:
        out[:led] = before
    if x.numel():
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        if groups:
            group_pixels_launch(x, weight, bias, groups, eps, silu, out[led:])
        else:
            rms_pixels_launch(x, weight, bias, eps, silu, out[led:])
    return out


@channel_norm_silu_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, silu: bool, before: Tensor | None) -> Tensor:
    return x.new_empty((0 if before is None else len(before)) + len(x), *x.shape[1:])


def channel_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 0,
    eps: float = 1e-12,
    silu: bool = True,
    before: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Normalise frames over their channels, by RMS (`groups` 0) or in groups of them, and activate them.

    Args: `x` [frames, D, H, W]; `weight` and `bias` [D]; `eps` the least length of a pixel, or what is added to a group's
    variance; `before` [n, D, H, W]: frames that are put before the result, which is then written behind them at once;
    `overwrite`: `x` is needed no more, and the result may take its place.
    Returns: [n + frames, D, H, W] in `x.dtype`, channels side by side. No gradient: `ValueError` if one is asked for.
    """
    refuse_gradient("channel_norm_silu", x, weight, bias)
    cpu = backend.native(x, weight, bias, before) if before is None else None
    if cpu and (out := cpu.channel_norm_silu(x, weight, bias, groups, eps, silu, overwrite)) is not None:
        return out
    run = channel_norm_silu_op if backend.registered(x) else channel_norm_silu_ref
    before = None if before is None else _rows(before)
    return run(_rows(x), weight, bias, groups, eps, silu, before).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """[frames, D, H, W] → [frames, pixels, D]; nothing is copied where channels lie side by side."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
