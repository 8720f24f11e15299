"""`scaled_linear` for Hopper and Blackwell: as many programs as processors, each of which makes one tile after the other.

Operands come through tensor descriptors: the copy engine brings whole tiles, and no thread computes an address. What ends a tile
overlaps with the copies and products of the next one, in one of two ways:

*persistent*: the loops over tiles and over a tile's depth are one loop to the compiler, which starts copies some tiles ahead.
*specialized*: warps have one task each: some copy, some multiply and end tiles (on Blackwell one starts all products).
"""

import math

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.tiles import GROUP, activated, bounded, bounded_scale, place

# Rows, columns and depth of a tile, the parts in which it is ended, warps, stages: the largest that spill no register, by form
# and major compute capability. Hopper keeps sums in registers, twice while they are carried over to float32. There the compiler
# adds two groups of warps to the four of a specialized form, on Blackwell one.
TILES = {
    ("persistent", 9): (128, 128, 128, 1, 8, 5),
    ("specialized", 9): (128, 128, 128, 1, 4, 5),
    ("persistent", 10): (128, 256, 128, 2, 8, 3),
    ("specialized", 10): (128, 256, 128, 2, 8, 4),
}
SMALL_TILE = (32, 64, 32, 2, 4, 2)  # in the interpreter, where small operands are to fill several
FORMS = ("persistent", "specialized")
ALIGNED = 16  # bytes of which a descriptor's address, and the distance of its rows, are multiples


@triton.jit
def end_part(
    y, column, x_scale, weight_scale, bias, bound, out_scale, r, c, rows, columns, root,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Scale, add the bias, activate, quantise: the numbers that are stored."""
    b_x_scale = tl.load(x_scale + r, mask=r < rows, other=0.0)
    b_scale = tl.load(weight_scale + c, mask=c < columns, other=0.0)
    y = y * b_x_scale[:, None] * b_scale[None] + tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None]
    if GELU:
        y = activated(y)
    if QUANTIZE:
        size = bounded_scale(b_x_scale, bound, root)
        y = bounded(y, size)
        tl.store(out_scale + r, size, mask=(r < rows) & ((column + 0 * r) == 0))  # a scalar mask is no mask to the interpreter
    return y


@triton.jit
def scaled_linear_persistent_kernel(
    x, x_scale, weight, weight_scale, bias, bound, out, out_scale, rows, columns, depth, root, programs,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    x = tl.make_tensor_descriptor(x, [rows, depth], [depth, 1], [ROWS, DEPTH])
    weight = tl.make_tensor_descriptor(weight, [columns, depth], [depth, 1], [COLUMNS, DEPTH])
    out = tl.make_tensor_descriptor(out, [rows, columns], [columns, 1], [ROWS, COLUMNS // PARTS])
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=FLATTEN, warp_specialize=SPECIALIZED):
        row_tile, column_tile = place(tile, row_tiles, column_tiles, GROUP)
        row, column = row_tile * ROWS, column_tile * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, DEPTH):
            # Hopper adds fp8 products with 14 bits: its sums are carried over to float32 after every tile.
            total = tl.dot(x.load([row, start]), weight.load([column, start]).T, total, max_num_imprecise_acc=DEPTH)
        r = row + tl.arange(0, ROWS)
        if PARTS == 1:
            c = column + tl.arange(0, COLUMNS)
            y = end_part(total, column, x_scale, weight_scale, bias, bound, out_scale, r, c, rows, columns, root, GELU, QUANTIZE)
            out.store([row, column], y.to(out.dtype))
        else:
            halves = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
            for part in tl.static_range(2):
                c = column + part * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
                y = end_part(
                    halves[part], column + part, x_scale, weight_scale, bias, bound, out_scale, r, c, rows, columns, root,
                    GELU, QUANTIZE,
                )  # fmt: skip
                out.store([row, column + part * (COLUMNS // 2)], y.to(out.dtype))


def described(x: Tensor, weight: Tensor, row_bytes: int) -> bool:
    """Whether descriptors can be made of contiguous factors and a result whose rows have so many bytes."""
    rows = (x.shape[-1] * x.element_size(), row_bytes)
    aligned = not any(size % ALIGNED for size in (*rows, x.data_ptr(), weight.data_ptr()))
    return aligned and bool(x.numel() and weight.numel())


def scaled_linear_persistent_launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    bound: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    form: str,
) -> tuple[Tensor, Tensor]:
    """Run the kernel in one of `FORMS`; results as those of `scaled_linear_launch`. Operands have to be `described`."""
    columns, depth = weight.shape
    out = x.new_empty(*x.shape[:-1], columns, dtype=dtype)
    out_scale = torch.empty_like(x_scale, memory_format=torch.contiguous_format)
    rows = x_scale.numel()
    capability = backend.capability(x)
    tile_rows, tile_columns, tile_depth, parts, warps, stages = TILES.get((form, capability), SMALL_TILE)
    programs = min(backend.processors(x), triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns))
    backend.scratch(x)
    with backend.on(x):
        scaled_linear_persistent_kernel[(programs,)](
            x, x_scale.contiguous(), weight, weight_scale.contiguous(), bias.contiguous(),
            out_scale if bound is None else bound, out, out_scale, rows, columns, depth, math.sqrt(depth), programs,
            GELU=gelu, QUANTIZE=bound is not None, GROUP=GROUP,
            FLATTEN=form == "persistent" or capability > 9, SPECIALIZED=form == "specialized",  # Hopper's cannot be both
            ROWS=tile_rows, COLUMNS=tile_columns, DEPTH=tile_depth, PARTS=parts,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, out_scale
