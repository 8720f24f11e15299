"""A linear layer of fp8 e4m3 activations and weights with row scales; optionally GELU, and e4m3 out for the next such layer.

    y = (q_x · s_x) (q_w · s_w)ᵀ + b,   y ← gelu_tanh(y),   q_y = round_e4m3(y / s_y)

A tile of y does not see its whole row, so s_y comes from a bound known before the product (Cauchy and Schwarz; |gelu(y)| ≤ |y|):

    |y_rn| ≤ ‖x_r‖ · max_n ‖w_n‖ + max|b| ≤ 448 · s_x,r · sqrt(K) · max_n ‖w_n‖ + max|b| = 448 · s_y,r

It never overflows. It is far above most rows' largest value, which costs a float format exponents, of which e4m3 has 15, and no
fraction: the tests hold a fused feed-forward's error to that of one which quantises by the rows' true maxima.
"""

import functools
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.quantize_fp8 import E4M3_MAX, SMALLEST_SCALE, Quantized, quantize_fp8
from ebr_engine.kernels.rows import launches_fp8, refuse_gradient
from ebr_engine.kernels.scaled_linear_persistent import described, scaled_linear_persistent_launch
from ebr_engine.kernels.tiles import GROUP, activated, bounded, bounded_scale, place

# Rows up to which a tile serves: rows, columns, depth of the tile, warps, stages.
TILES = ((64, (64, 128, 128, 4, 3)), (math.inf, (128, 128, 128, 8, 3)))
# Which of Triton's forms multiplies where a GPU's own table names none, by major compute capability and the rows up to which it
# does: `tiles`, a program a tile, or one of `scaled_linear_persistent`, of which few rows are too few tiles for every processor.
# On paper: no form has been timed on a GPU. Warps are specialized where Triton documents it, which is not on Hopper.
FORMS = {9: ((1024, "tiles"), (math.inf, "persistent")), 10: ((1024, "tiles"), (math.inf, "specialized"))}
# What a GPU's table may name: cuBLASLt, one of Triton's forms, or `triton` for that which `FORMS` says.
IMPLEMENTATIONS = ("library", "triton", "tiles", "persistent", "specialized")


def product_ref(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """y [..., N] in float32: e4m3's products are exact in it, and in bf16 they are factors as they are."""
    if x.is_cuda:
        rows = x.flatten(0, -2).bfloat16()
        y = torch.mm(rows, weight.bfloat16().t(), out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    else:
        y = F.linear(x.float(), weight.float())
    return y * x_scale * weight_scale.squeeze(-1) + bias


def bound_ref(weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The layer's part of the output's bound, [2] float32: max_n ‖w_n‖ and max|b|."""
    return torch.stack(((weight.float().norm(dim=-1) * weight_scale.squeeze(-1)).max(), bias.float().abs().max()))


def quantize_bounded_ref(y: Tensor, x_scale: Tensor, bound: Tensor, depth: int) -> Quantized:
    """Quantise an output [..., N] of `depth` products by its bound."""
    scale = (x_scale * (math.sqrt(depth) * bound[0]) + bound[1] * (1 / E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    values = (y * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX)  # a rounding may pass the bound
    return Quantized(values.to(torch.float8_e4m3fn), scale)


def scaled_linear_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, gelu: bool, dtype: torch.dtype
) -> Tensor:
    """Multiply, scale, activate; rounded once to `dtype`."""
    y = product_ref(x, x_scale, weight, weight_scale, bias)
    return (F.gelu(y, approximate="tanh") if gelu else y).to(dtype)


def scaled_linear_fp8_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, bound: Tensor, gelu: bool
) -> Quantized:
    """Multiply, scale, activate, quantise by the bound."""
    y = scaled_linear_ref(x, x_scale, weight, weight_scale, bias, gelu, torch.float32)
    return quantize_bounded_ref(y, x_scale, bound, x.shape[-1])


@triton.jit
def scaled_linear_kernel(
    x, x_scale, weight, weight_scale, bias, bound, out, out_scale, rows, columns, depth, root,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    r = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = column_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Past the end the last row and column are read again, and not stored.
    x_tile = x + tl.minimum(r, rows - 1)[:, None] * depth + k[None]
    weight_tile = weight + tl.minimum(c, columns - 1)[None] * depth + k[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            b_x, b_w = tl.load(x_tile), tl.load(weight_tile)
        else:
            b_x = tl.load(x_tile, mask=(k < depth - start)[None], other=0.0)
            b_w = tl.load(weight_tile, mask=(k < depth - start)[:, None], other=0.0)
        # Hopper adds fp8 products with 14 bits: its sums are carried over to float32 after every tile.
        total = tl.dot(b_x, b_w, total, max_num_imprecise_acc=DEPTH)
        x_tile += DEPTH
        weight_tile += DEPTH

    b_x_scale = tl.load(x_scale + r, mask=r < rows, other=0.0)
    b_weight_scale = tl.load(weight_scale + c, mask=c < columns, other=0.0)
    y = total * b_x_scale[:, None] * b_weight_scale[None] + tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None]
    if GELU:
        y = activated(y)
    if QUANTIZE:
        size = bounded_scale(b_x_scale, bound, root)
        y = bounded(y, size)
        if column_tile == 0:
            tl.store(out_scale + r, size, mask=r < rows)
    mask = (r < rows)[:, None] & (c < columns)[None]
    tl.store(out + r[:, None] * columns + c[None], y.to(out.dtype.element_ty), mask=mask)


def scaled_linear_launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    bound: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    form: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Run a form (`triton`: as `FORMS` says); the output in `dtype`, and with a `bound` (then `dtype` is e4m3) its row scales.

    What no descriptors can be made of is multiplied in tiles.
    """
    columns, depth = weight.shape
    rows = x_scale.numel()
    x, weight = x.contiguous(), weight.contiguous()
    form = usual_form(backend.capability(x), rows) if form == "triton" else form
    if form != "tiles" and described(x, weight, columns * dtype.itemsize):
        return scaled_linear_persistent_launch(x, x_scale, weight, weight_scale, bias, bound, gelu, dtype, form)
    out = x.new_empty(*x.shape[:-1], columns, dtype=dtype)
    out_scale = torch.empty_like(x_scale, memory_format=torch.contiguous_format)
    tile_rows, tile_columns, tile_depth, warps, stages = next(tile for most, tile in TILES if rows <= most)
    if out.numel():
        with backend.on(x):
            scaled_linear_kernel[(triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),)](
                x, x_scale.contiguous(), weight, weight_scale.contiguous(), bias.contiguous(),
                out_scale if bound is None else bound, out, out_scale, rows, columns, depth, math.sqrt(depth),
                GELU=gelu, QUANTIZE=bound is not None, EVEN=depth % tile_depth == 0, GROUP=GROUP,
                ROWS=tile_rows, COLUMNS=tile_columns, DEPTH=tile_depth,
                num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
    return out, out_scale


def epilogue(gelu: bool, fp8_out: bool) -> str:
    """What a product ends in, as the tables name it: `none`, `gelu`, `fp8` or `gelu_fp8`."""
    return "_".join(name for name, asked in (("gelu", gelu), ("fp8", fp8_out)) if asked) or "none"


@functools.cache
def choices(device: str, folder: Path = Path(__file__).parent) -> dict[tuple[int, int, int, str], str]:
    """Which implementation a GPU's table names by (rows rounded up to a power of two, K, N, epilogue); empty without a table.

    The table is `scaled_linear_<gpu>.json` beside this file, `<gpu>` being the device's name in lower case with `_` for all
    but letters and digits: {"device": name, "choices": [{"rows": 16384, "k": 1536, "n": 8960, "epilogue": "none",
    "implementation": "library"}, ...]}, where the implementation is one of `IMPLEMENTATIONS`.
    """
    path = folder / f"scaled_linear_{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}.json"
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())["choices"]
    return {(entry["rows"], entry["k"], entry["n"], entry["epilogue"]): entry["implementation"] for entry in entries}


def usual_form(capability: int, rows: int) -> str:
    """The form of Triton's for so many rows on a GPU of this major compute capability."""
    return next(form for most, form in FORMS.get(capability, ((math.inf, "tiles"),)) if rows <= most)


def implementation(device: str, rows: int, weight: Tensor, ending: str) -> str:
    """One of `IMPLEMENTATIONS`: as the device's table says, else the library where nothing but a bias follows the product.

    The library's products need K and N to be multiples of 16.
    """
    columns, depth = weight.shape
    usual = "library" if ending == "none" else "triton"
    found = choices(device).get((1 << max(rows - 1, 0).bit_length(), depth, columns, ending), usual)
    return "triton" if found == "library" and (rows == 0 or columns % 16 or depth % 16) else found


def library_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """y [..., N] in bf16 by cuBLASLt."""
    y = torch._scaled_mm(
        x.reshape(-1, x.shape[-1]), weight.t(), x_scale.reshape(-1, 1), weight_scale.reshape(1, -1), bias.bfloat16(),
        out_dtype=torch.bfloat16,
    )  # fmt: skip
    return y.unflatten(0, x.shape[:-1])


def chosen(x: Tensor, weight: Tensor, ending: str) -> str:
    """`implementation` on the device that `x` is on; in the interpreter Triton's."""
    if not x.is_cuda:
        return "triton"
    return implementation(torch.cuda.get_device_name(x.device), x.shape[:-1].numel(), weight, ending)


@torch.library.custom_op("ebr::scaled_linear", mutates_args=())
@gated({"x": -2, "x_scale": -2}, (-2,))
def scaled_linear_op(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    if x_scale is None:
        x, x_scale = quantize_fp8(x)
    if not launches_fp8(x):
        return scaled_linear_ref(x, x_scale, weight, weight_scale, bias, gelu, dtype)
    layer = weight, weight_scale, bias
    found = chosen(x, weight, epilogue(gelu, False)) if dtype == torch.bfloat16 else "triton"
    if found == "library":
        y = library_product(x, x_scale, *layer)
        return F.gelu(y, approximate="tanh") if gelu else y
    return scaled_linear_launch(x, x_scale, *layer, None, gelu, dtype, found)[0]


@scaled_linear_op.register_fake
def _(x, x_scale, weight, weight_scale, bias, gelu, dtype):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, _, weight, weight_scale, bias, ctx.gelu, _ = inputs
    ctx.save_for_backward(weight, weight_scale, *((x, bias) if ctx.gelu else ()))


def _backward(ctx, gradient: Tensor) -> tuple:
    """To the input only, as if it had not been rounded: the weight is frozen, and e4m3 has no room for gradients."""
    weight, weight_scale, *rest = ctx.saved_tensors
    if ctx.gelu:
        x, bias = rest
        y = scaled_linear_op(x, None, weight, weight_scale, bias, False, x.dtype)
        gradient = torch.ops.aten.gelu_backward(gradient, y, approximate="tanh")
    return gradient @ (weight.float() * weight_scale).to(gradient.dtype), None, None, None, None, None, None


scaled_linear_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("ebr::scaled_linear_fp8", mutates_args=())
@gated({"x": -2, "x_scale": -2}, (-2, -2))
def scaled_linear_fp8_op(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, bound: Tensor, gelu: bool
) -> tuple[Tensor, Tensor]:
    if not launches_fp8(x):
        return tuple(scaled_linear_fp8_ref(x, x_scale, weight, weight_scale, bias, bound, gelu))
    found, layer = chosen(x, weight, epilogue(gelu, True)), (weight, weight_scale, bias)
    if found == "library":
        y = library_product(x, x_scale, *layer)
        return tuple(quantize_fp8(F.gelu(y, approximate="tanh") if gelu else y))
    return scaled_linear_launch(x, x_scale, *layer, bound, gelu, torch.float8_e4m3fn, found)


@scaled_linear_fp8_op.register_fake
def _(x, x_scale, weight, weight_scale, bias, bound, gelu):
    out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float8_e4m3fn)
    return out, torch.empty_like(x_scale, memory_format=torch.contiguous_format)


def scaled_linear(
    x: Tensor | Quantized,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    gelu: bool = False,
    fp8_out: bool = False,
    bound: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | Quantized:
    """Multiply activations with an fp8 weight.

    Args: `x` [..., K], a tensor, which is quantised by token, or already `Quantized`; `weight` [N, K] float8_e4m3fn with
    `weight_scale` [N, 1] float32; `bias` [N]; `gelu` ends with the tanh GELU; `fp8_out` returns `Quantized` for the next
    layer, scaled by `bound`, the layer's `bound_ref` (made on the spot if it is not given); `dtype` of the result, `x`'s or
    bf16 for a `Quantized`.
    Returns: [..., N]. Its gradient is the input's alone, as if that had not been rounded; with `fp8_out` there is none
    (`ValueError`). On a CPU and on GPUs without fp8 the numbers are those of fp8, the speed is not.
    """
    tensor = not isinstance(x, Quantized)
    layer = (weight, weight_scale, bias)
    if fp8_out:
        if tensor:
            refuse_gradient("scaled_linear with fp8_out", x)
            x = quantize_fp8(x)
        bound = bound_ref(*layer) if bound is None else bound
        run = scaled_linear_fp8_op if backend.registered(x.values) else scaled_linear_fp8_ref
        return Quantized(*run(*x, *layer, bound, gelu))
    if tensor:
        dtype = dtype or x.dtype
        if backend.registered(x) or (torch.is_grad_enabled() and x.requires_grad):
            return scaled_linear_op(x, None, *layer, gelu, dtype)
        x = quantize_fp8(x)
    run = scaled_linear_op if backend.registered(x.values) else scaled_linear_ref
    return run(*x, *layer, gelu, dtype or torch.bfloat16)
