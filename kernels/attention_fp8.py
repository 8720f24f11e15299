"""Self-attention in eight bits: q and k in int8, likelihoods and v in e4m3, sums in int32 and float32.

    k̂ = k − mean(k)                             over tokens: adds the same to all logits of a query, which changes nothing
    v̂ = v − mean(v),   out = A(q, k̂) v̂ + mean(v)                                  for a row of A sums to one
    q ≈ s_q·q8,  k̂ ≈ s_k·k8,  v̂ ≈ s_v·v8            a scale a head: max / 127 for q and k̂, max / 448 for v̂
    ℓ = (s_q s_k / sqrt(head_dim))·q8 k8ᵀ,   p = round_e4m3(256·exp(ℓ − max ℓ))
    out = s_v · p v8 / Σ p + mean(v)

Source: SageAttention2 (arXiv 2411.10958), with scales of a head in place of a warp's rows, and e4m3 in P and v alike. q and k are
int8 because all keys share what rounding does to a query: with tokens as a picture has them it is nearly the whole error, and a
uniform step makes less than half of the error of e4m3, whose step is 2⁻³ of every number.
"""

import math

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.heads import LARGEST_HEAD
from ebr_engine.kernels.quantize_fp8 import E4M3_MAX, SMALLEST_SCALE
from ebr_engine.kernels.rows import dense, refuse_gradient, wide

LARGEST_VALUES = (127.0, 127.0, E4M3_MAX)  # of q8, k8 and v8
LARGEST = 256.0  # what the likeliest key's p is stored as: e4m3 has nine binades of normal numbers below it
ALIGNED = 16  # tokens of a row of v8, and channels of a head, are multiples: bytes that descriptors ask for
SCORES = 2**22  # elements of the reference's scores at a time
BLOCK = 64  # tokens that a program of the quantising pass reads
# Queries and keys of a tile, warps, stages, whether warps are specialized, by major compute capability.
TILES = {9: (128, 128, 8, 3, False), 10: (128, 64, 8, 2, False)}
OTHER_TILE = (64, 64, 4, 2, False)
SMALL_TILE = (32, 32, 4, 2, False)  # in the interpreter


def padded(tokens: int) -> int:
    """Tokens that a row of v8 has room for."""
    return -(-tokens // ALIGNED) * ALIGNED


def quantize_heads_ref(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q8, k8 [B, H, N, d], v8 [B, H, d, padded N] with zeros at the end, scales of the three [3, B, H], mean(v) [B, H, d]."""
    q, k, v = wide(q), wide(k), wide(v)
    mean = v.mean(-2)
    k, v = k - k.mean(-2, keepdim=True), v - mean.unsqueeze(-2)
    scales = [x.abs().amax((-1, -2)) / most for x, most in zip((q, k, v), LARGEST_VALUES)]
    scales = torch.stack(scales).clamp(min=SMALLEST_SCALE)
    q, k, v = (x / scale[..., None, None] for x, scale in zip((q, k, v), scales))
    v = torch.nn.functional.pad(v, (0, 0, 0, padded(v.shape[-2]) - v.shape[-2]))
    q, k = q.round().to(torch.int8), k.round().to(torch.int8)
    return q, k, v.mT.to(torch.float8_e4m3fn).contiguous(), scales, mean


def attention_fp8_ref(q: Tensor, k: Tensor, v: Tensor, scales: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula from what `quantize_heads_ref` gives, in blocks of queries; [B, H, N, d] in `dtype`."""
    tokens, head = k.shape[-2:]
    float_k, float_v = k.to(mean.dtype), v[..., :tokens].to(mean.dtype).mT
    factor = (scales[0] * scales[1] * head**-0.5)[..., None, None]
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    rows = max(1, SCORES // max(1, k.shape[:-1].numel()))
    for start in range(0, q.shape[-2], rows):
        some = slice(start, start + rows)
        logits = torch.matmul(q[..., some, :].to(mean.dtype), float_k.mT) * factor
        likely = LARGEST * torch.exp(logits - logits.amax(-1, keepdim=True))
        likely = likely.to(torch.float8_e4m3fn).to(mean.dtype)
        mixed = torch.matmul(likely, float_v) / likely.sum(-1, keepdim=True)
        out[..., some, :] = (mixed * scales[2][..., None, None] + mean.unsqueeze(-2)).to(dtype)
    return out


@triton.jit
def load_tokens(x, b, h, n, batch, head, token, tokens, HEAD: tl.constexpr, DIMS: tl.constexpr):
    """Tokens [T, DIMS] of a head in float32, zeros past the end; and where they are."""
    dims = tl.arange(0, DIMS)
    mask = (n < tokens)[:, None] & (dims < HEAD)[None]
    offsets = b * batch + h * head + n.to(tl.int64)[:, None] * token + dims[None]
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def measure_kernel(
    q, k, v, out, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, heads, tokens, blocks,
    HEAD: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a block of tokens and every channel: the largest |q|, and sum, largest and smallest of k and of v."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    n, dims = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIMS)
    out += (bh * blocks + block) * 7 * DIMS + dims
    b_q, _ = load_tokens(q, b, h, n, q_batch, q_head, q_token, tokens, HEAD, DIMS)
    tl.store(out, tl.max(tl.abs(b_q), 0))
    b_k, mask = load_tokens(k, b, h, n, k_batch, k_head, k_token, tokens, HEAD, DIMS)
    tl.store(out + DIMS, tl.sum(b_k, 0))
    tl.store(out + 2 * DIMS, tl.max(tl.where(mask, b_k, float("-inf")), 0))
    tl.store(out + 3 * DIMS, tl.min(tl.where(mask, b_k, float("inf")), 0))
    b_v, _ = load_tokens(v, b, h, n, v_batch, v_head, v_token, tokens, HEAD, DIMS)
    tl.store(out + 4 * DIMS, tl.sum(b_v, 0))
    tl.store(out + 5 * DIMS, tl.max(tl.where(mask, b_v, float("-inf")), 0))
    tl.store(out + 6 * DIMS, tl.min(tl.where(mask, b_v, float("inf")), 0))


@triton.jit
def to_int8(x):
    """The nearest whole number, even where two are as near: 1.5·2²³ leaves no place behind the point."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_heads_kernel(
    q, k, v, k_mean, v_mean, scales, q8, k8, v8,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, heads, count, tokens, room,
    HEAD: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    n, dims = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIMS)
    here = dims < HEAD
    out = (bh * tokens + n[:, None]) * HEAD + dims[None]
    b_q, mask = load_tokens(q, b, h, n, q_batch, q_head, q_token, tokens, HEAD, DIMS)
    tl.store(q8 + out, to_int8(b_q * tl.div_rn(1.0, tl.load(scales + bh))), mask=mask)
    b_k, _ = load_tokens(k, b, h, n, k_batch, k_head, k_token, tokens, HEAD, DIMS)
    b_k -= tl.load(k_mean + bh * HEAD + dims, mask=here, other=0.0)[None]
    b_k = tl.where(mask, b_k * tl.div_rn(1.0, tl.load(scales + count + bh)), 0.0)
    tl.store(k8 + out, to_int8(b_k), mask=mask)
    b_v, _ = load_tokens(v, b, h, n, v_batch, v_head, v_token, tokens, HEAD, DIMS)
    b_v -= tl.load(v_mean + bh * HEAD + dims, mask=here, other=0.0)[None]
    b_v = tl.where(mask, b_v * tl.div_rn(1.0, tl.load(scales + 2 * count + bh)), 0.0)
    b_v = tl.minimum(tl.maximum(b_v, -448.0), 448.0).to(v8.dtype.element_ty)
    tl.store(v8 + (bh * HEAD + dims[:, None]) * room + n[None], tl.trans(b_v), mask=here[:, None] & (n < room)[None])


@triton.jit
def attention_fp8_kernel(
    q, k, v, scales, mean, out, heads, count, queries, keys, room, factor,
    MASKED: tl.constexpr, SPECIALIZED: tl.constexpr, HEAD: tl.constexpr, DIMS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Tiles are the fastest index: programs that run together read the same head's keys and values.
    block, bh = tl.program_id(0), tl.program_id(1)
    # Rows past a head's last are the next head's: queries are not stored, keys are masked, and of v8 they are other channels.
    q = tl.make_tensor_descriptor(q, [count * queries, HEAD], [HEAD, 1], [QUERIES, DIMS])
    k = tl.make_tensor_descriptor(k, [count * keys, HEAD], [HEAD, 1], [KEYS, DIMS])
    v = tl.make_tensor_descriptor(v, [count * HEAD, room], [room, 1], [DIMS, KEYS])
    b_q = q.load([bh * queries + block * QUERIES, 0])
    scale = tl.load(scales + bh) * tl.load(scales + count + bh) * factor
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    b_out = tl.zeros([QUERIES, DIMS], tl.float32)
    for start in tl.range(0, keys, KEYS, warp_specialize=SPECIALIZED):
        logits = tl.dot(b_q, k.load([bh * keys + start, 0]).T, out_dtype=tl.int32).to(tl.float32) * scale
        if MASKED:
            logits = tl.where((start + tl.arange(0, KEYS) < keys)[None], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        likely, shrink = tl.exp2(logits - (larger - 8.0)[:, None]), tl.exp2(largest - larger)  # 2⁸ = LARGEST
        b_p = likely.to(v.dtype)
        total = total * shrink + tl.sum(b_p.to(tl.float32), 1)
        b_v = v.load([bh * HEAD, start])
        b_out = tl.dot(b_p, b_v.T, b_out * shrink[:, None], max_num_imprecise_acc=KEYS)
        largest = larger
    n, dims = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, DIMS)
    here = dims < HEAD
    b_mean = tl.load(mean + bh * HEAD + dims, mask=here, other=0.0)
    b_out = b_out * (tl.load(scales + 2 * count + bh) / total)[:, None] + b_mean[None]
    b, h = (bh // heads).to(tl.int64), bh % heads
    offsets = ((b * queries + n[:, None]) * heads + h) * HEAD + dims[None]
    tl.store(out + offsets, b_out.to(out.dtype.element_ty), mask=(n < queries)[:, None] & here[None])


def served(q: Tensor) -> bool:
    """Whether the kernels serve heads like these, before they are quantised."""
    takes = not q.is_cuda or (backend.has_fp8(q.device) and q.dtype in (torch.bfloat16, torch.float16))
    return backend.launches(q) and takes and q.dtype != torch.float64 and bool(q.numel()) and fits(q.shape[-1])


def fits(head: int) -> bool:
    """Whether descriptors take a head's rows, and accumulators its width."""
    return head % ALIGNED == 0 and head <= LARGEST_HEAD


def head_constants(head: int) -> dict:
    """What the kernels are compiled for; products of eight bits are at least 32 deep."""
    return {"HEAD": head, "DIMS": max(32, triton.next_power_of_2(head)), "enable_fp_fusion": True}


def empty_quantized_heads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for q8, k8 and v8 of tensors like these."""
    batch, heads, tokens, head = k.shape
    eight = {"dtype": torch.int8, "memory_format": torch.contiguous_format}
    v = q.new_empty(batch, heads, head, padded(tokens), dtype=torch.float8_e4m3fn)
    return torch.empty_like(q, **eight), torch.empty_like(k, **eight), v


def quantize_heads_launch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run both passes: measure, then quantise; inputs of any strides, of as many keys as queries."""
    batch, heads, tokens, head = q.shape
    q, k, v, count, room = dense(q), dense(k), dense(v), batch * heads, padded(tokens)
    found = empty_quantized_heads(q, k)
    constants, strides = head_constants(head), (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    blocks = triton.cdiv(tokens, BLOCK)
    measured = q.new_empty(count, blocks, 7, constants["DIMS"], dtype=torch.float32)
    with backend.on(q):
        measure_kernel[(blocks, count)](q, k, v, measured, *strides, heads, tokens, blocks, BLOCK=BLOCK, **constants)
        measured = measured[..., :head].unbind(2)
        k_mean, v_mean = (measured[part].sum(1) / tokens for part in (1, 4))
        largest = [measured[0].amax((1, 2))]
        for part, mean in ((2, k_mean), (5, v_mean)):
            largest.append(torch.maximum(measured[part].amax(1) - mean, mean - measured[part + 1].amin(1)).amax(1))
        scales = torch.stack([size / most for size, most in zip(largest, LARGEST_VALUES)]).clamp(min=SMALLEST_SCALE)
        quantize_heads_kernel[(triton.cdiv(room, BLOCK), count)](
            q, k, v, k_mean, v_mean, scales, *found, *strides, heads, count, tokens, room, BLOCK=BLOCK, **constants
        )
    return *found, scales.view(3, batch, heads), v_mean.view(batch, heads, head)


def attention_fp8_launch(q: Tensor, k: Tensor, v: Tensor, scales: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the kernel on quantised heads."""
    batch, heads, queries, head = q.shape
    keys, count = k.shape[2], batch * heads
    out = q.new_empty(batch, queries, heads, head, dtype=dtype).transpose(1, 2)  # so that joining a token's heads is free
    capability = backend.capability(q)
    usual = OTHER_TILE if capability else SMALL_TILE
    tile_queries, tile_keys, warps, stages, specialized = TILES.get(capability, usual)
    backend.scratch(q)
    with backend.on(q):
        attention_fp8_kernel[(triton.cdiv(queries, tile_queries), count)](
            q, k, v, scales, mean, out, heads, count, queries, keys, v.shape[-1], head**-0.5 * math.log2(math.e),
            MASKED=keys % tile_keys > 0, SPECIALIZED=specialized, QUERIES=tile_queries, KEYS=tile_keys,
            num_warps=warps, num_stages=stages, **head_constants(head),
        )  # fmt: skip
    return out


@torch.library.custom_op("ebr::quantize_heads", mutates_args=())
@gated({}, None)
def quantize_heads_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return quantize_heads_launch(q, k, v) if served(q) else quantize_heads_ref(q, k, v)


@quantize_heads_op.register_fake
def _(q, k, v):
    batch, heads, _, head = k.shape
    scales, mean = (q.new_empty(shape, dtype=torch.float32) for shape in ((3, batch, heads), (batch, heads, head)))
    return *empty_quantized_heads(q, k), scales, mean


@torch.library.custom_op("ebr::attention_fp8", mutates_args=())
@gated({"q": 2}, (2,))
def attention_fp8_op(q: Tensor, k: Tensor, v: Tensor, scales: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    if backend.launches(q) and fits(q.shape[-1]) and q.numel() and (not q.is_cuda or backend.has_fp8(q.device)):
        return attention_fp8_launch(q, k, v, scales, mean, dtype)
    return attention_fp8_ref(q, k, v, scales, mean, dtype).transpose(1, 2).contiguous().transpose(1, 2)


@attention_fp8_op.register_fake
def _(q, k, v, scales, mean, dtype):
    batch, heads, tokens, head = q.shape
    return q.new_empty(batch, tokens, heads, head, dtype=dtype).transpose(1, 2)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention in eight bits, [B, H, N, d] each → [B, H, N, d] in `q.dtype`.

    Its kernels serve CUDA devices of compute capability 8.9 or newer and heads that are a multiple of 16 up to 128 wide; the
    reference gives the same numbers anywhere else, slowly. It has no gradient (`ValueError`).
    """
    refuse_gradient("attention_fp8", q, k, v)
    return attention_fp8_op(*quantize_heads_op(q, k, v), q.dtype)
