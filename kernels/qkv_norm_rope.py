"""The projection to q, k and v whose tiles end as attention reads them: `qk_norm_rope` in the product's epilogue.

    q, k, v = x Wᵀ + b (+ rows on the first tokens),   q, k ← rotate(x / sqrt(mean(x²) + eps) · weight),   heads apart

A tile of the product is as wide as a head, so the norm of each head alone (FLUX's) is a sum within the tile, and what is rotated
together lies in it: the projection is never written, and the pass that would read it is gone, 12 of 18 bytes an element.

A norm across heads (Wan's) needs all tiles of a token. They could leave sums of squares behind, but q and k would then be written
and read again: a third of the pass is saved, v's, 4 of 18 bytes, for which the product leaves cuBLASLt. Wan keeps both apart.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope_ref
from ebr_engine.kernels.quantize_fp8 import Quantized
from ebr_engine.kernels.rotary import dense_rows, row_strides
from ebr_engine.kernels.rows import launches, launches_fp8
from ebr_engine.kernels.scaled_linear import choices, product_ref
from ebr_engine.kernels.scaled_linear_persistent import ALIGNED
from ebr_engine.kernels.tiles import GROUP, place

# Rows and depth of a tile in bytes, warps, stages, by form and major compute capability; a tile is as wide as a head. Hopper's
# compiler does not specialize warps where a tile is split in halves.
TILES = {
    ("persistent", 9): (128, 128, 8, 4),
    ("persistent", 10): (128, 128, 8, 4),
    ("specialized", 10): (128, 128, 8, 4),
}
SMALL_TILE = (32, 64, 4, 2)  # in the interpreter
HEADS = (64, 128)  # widths of a head that a tile has


def qkv_norm_rope_ref(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    """The product, rounded to the bias's dtype, then `qk_norm_rope_ref`; [3, B, heads, N, head_dim]."""
    y = F.linear(x, weight, bias) if x_scale is None else product_ref(x, x_scale, weight, weight_scale, bias).to(bias.dtype)
    return torch.stack(qk_norm_rope_ref(y, q_weight, k_weight, cos, sin, heads, eps, rows))


@triton.jit
def qkv_norm_rope_kernel(
    x, x_scale, weight, weight_scale, bias, q_weight, k_weight, cos, sin, prompt, out,
    prompt_batch, prompt_token, length, rows, tokens, heads, depth, eps, programs,
    GROUP: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZED: tl.constexpr,
    ROWS: tl.constexpr, HEAD: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    x = tl.make_tensor_descriptor(x, [rows, depth], [depth, 1], [ROWS, DEPTH])
    weight = tl.make_tensor_descriptor(weight, [3 * heads * HEAD, depth], [depth, 1], [HEAD, DEPTH])
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), 3 * heads
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, programs, flatten=FLATTEN, warp_specialize=SPECIALIZED
    ):  # fmt: skip
        row_tile, column_tile = place(tile, row_tiles, column_tiles, GROUP)
        row, column = row_tile * ROWS, column_tile * HEAD
        y = tl.zeros([ROWS, HEAD], tl.float32)
        for start in range(0, depth, DEPTH):
            y = tl.dot(x.load([row, start]), weight.load([column, start]).T, y, max_num_imprecise_acc=DEPTH)
        r, dims = row + tl.arange(0, ROWS), tl.arange(0, HEAD)
        here = r < rows
        b, n = (r // tokens).to(tl.int64), r % tokens
        if x_scale is not None:
            y *= tl.load(x_scale + r, mask=here, other=0.0)[:, None] * tl.load(weight_scale + column + dims)[None]
        y += tl.load(bias + column + dims).to(tl.float32)[None]
        if prompt is not None:
            offsets = b * prompt_batch + n.to(tl.int64) * prompt_token + column
            prompted = (here & (n < length))[:, None] & (dims < HEAD)[None]
            y += tl.load(prompt + offsets[:, None] + dims[None], mask=prompted, other=0.0).to(tl.float32)
        # v's tiles do as the others with a norm of 1, a weight of 1 and no angle: no branch splits the loop.
        part, h = column_tile // heads, column_tile % heads
        mean = tl.sum(y * y, 1) / HEAD + eps
        inverse = tl.rsqrt(tl.where(part == 2, 1.0, mean))
        kind = part + 0 * dims  # a scalar mask is no mask to the interpreter
        b_weight = tl.load(q_weight + dims, mask=kind == 0, other=0.0).to(tl.float32)
        b_weight += tl.load(k_weight + dims, mask=kind == 1, other=0.0).to(tl.float32) + tl.where(kind == 2, 1.0, 0.0)
        y *= inverse[:, None] * b_weight[None]
        b_a, b_b = tl.split(tl.permute(tl.reshape(y, [ROWS, 2, HEAD // 2]), [0, 2, 1]))
        half = tl.arange(0, HEAD // 2)
        angles = n.to(tl.int64)[:, None] * (HEAD // 2) + half[None]
        turned = (here & (part + 0 * r < 2))[:, None] & (half < HEAD)[None]
        b_cos = tl.load(cos + angles, mask=turned, other=1.0).to(tl.float32)
        b_sin = tl.load(sin + angles, mask=turned, other=0.0).to(tl.float32)
        batch = rows // tokens
        to = (((part * batch + b) * heads + h) * tokens + n)[:, None] * HEAD + half[None]
        mask = here[:, None] & (half < HEAD)[None]
        tl.store(out + to, (b_a * b_cos - b_b * b_sin).to(out.dtype.element_ty), mask=mask)
        tl.store(out + to + HEAD // 2, (b_a * b_sin + b_b * b_cos).to(out.dtype.element_ty), mask=mask)


def qkv_norm_rope_launch(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None,
    form: str = "persistent",
) -> Tensor:
    """Run the kernel in a form of `TILES`; operands have to be those that `fits` allows."""
    batch, tokens, depth = x.shape
    head, prompt = weight.shape[0] // 3 // heads, dense_rows(rows)
    out = x.new_empty(3, batch, heads, tokens, head, dtype=bias.dtype)
    capability = backend.capability(x)
    tile_rows, tile_bytes, warps, stages = TILES.get((form, capability), SMALL_TILE)
    programs = min(backend.processors(x), triton.cdiv(batch * tokens, tile_rows) * 3 * heads)
    backend.scratch(x)
    with backend.on(x):
        qkv_norm_rope_kernel[(programs,)](
            x.contiguous(), None if x_scale is None else x_scale.contiguous(), weight,
            None if weight_scale is None else weight_scale.contiguous(), bias.contiguous(),
            q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), prompt, out,
            *row_strides(prompt), batch * tokens, tokens, heads, depth, eps, programs,
            GROUP=GROUP, FLATTEN=form == "persistent" or capability > 9, SPECIALIZED=form == "specialized",
            ROWS=tile_rows, HEAD=head, DEPTH=tile_bytes // x.element_size(),
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def fits(x: Tensor, weight: Tensor, q_weight: Tensor, heads: int) -> bool:
    """Whether the kernel takes these: heads as wide as a tile, normed alone, rows that descriptors can be made of."""
    head, aligned = weight.shape[0] // 3 // heads, x.shape[-1] * x.element_size() % ALIGNED == 0
    return q_weight.shape[0] == head and head in HEADS and aligned and weight.is_contiguous() and x.numel() > 0


def named_form(x: Tensor, weight: Tensor) -> str | None:
    """A form where the table of the device names it for the epilogue `heads`, else None: two passes are what is usual.

    cuBLASLt's product is hard to beat, and no form has been timed on a GPU.
    """
    if not x.is_cuda:
        return None
    rows, (columns, depth) = x.shape[:-1].numel(), weight.shape
    key = (1 << max(rows - 1, 0).bit_length(), depth, columns, "heads")
    found = choices(torch.cuda.get_device_name(x.device)).get(key)
    return found if (found, backend.capability(x)) in TILES else None


@torch.library.custom_op("ebr::qkv_norm_rope", mutates_args=())
@gated({"x": 1, "x_scale": 1, "cos": 0, "sin": 0, "rows": -2}, (3,))
def qkv_norm_rope_op(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    given = x, x_scale, weight, weight_scale, bias, q_weight, k_weight, cos, sin, heads, eps, rows
    takes = launches(x) if x_scale is None else launches_fp8(x)
    if takes and fits(x, weight, q_weight, heads):
        return qkv_norm_rope_launch(*given, named_form(x, weight) or "persistent")
    return qkv_norm_rope_ref(*given)


@qkv_norm_rope_op.register_fake
def _(x, x_scale, weight, weight_scale, bias, q_weight, k_weight, cos, sin, heads, eps, rows):
    return x.new_empty(3, x.shape[0], heads, x.shape[1], weight.shape[0] // 3 // heads, dtype=bias.dtype)


def qkv_norm_rope(
    x: Tensor | Quantized,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, normed and rotated, of tokens `x` [B, N, K] or `Quantized`; each [B, heads, N, head_dim] in the bias's dtype.

    Args: `weight` [3D, K], in e4m3 with `weight_scale` [3D, 1] where `x` is quantised; the rest as `qk_norm_rope` takes it.
    It has no gradient.
    """
    x, x_scale = x if isinstance(x, Quantized) else (x, None)
    given = x, x_scale, weight, weight_scale, bias, q_weight, k_weight, cos, sin, heads, eps, rows
    return (qkv_norm_rope_op if backend.registered(x) else qkv_norm_rope_ref)(*given).unbind(0)
