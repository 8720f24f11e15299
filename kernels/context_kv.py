"""Keys and values of a context for every block at once.

K_b = RMSNorm(W_k,b c + b_k,b) · weight_b        across heads
V_b = W_v,b c + b_v,b

The product is the library's; bias, norm and attention's layout are one pass over it.
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated
from ebr_engine.kernels.rows import launches, load_row, tile, wide


def context_kv_ref(context: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """The formulas; see `context_kv`."""
    return finish_ref(product(context, weight), bias, norm, heads, eps)


def product(context: Tensor, weight: Tensor) -> Tensor:
    """W c of all blocks, [blocks, C, L, 2D] contiguous; `context` [C, L, D], or a block's own, [blocks, C, L, D]."""
    rows = context.flatten(-3, -2).expand(weight.shape[0], -1, -1)
    return torch.bmm(rows, weight.to(context.dtype).transpose(1, 2)).unflatten(1, context.shape[-3:-1])


def finish_ref(kv: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """What follows the product: bias, RMSNorm of the keys, layout; rounded once."""
    key, value = (wide(kv) + bias[:, None, None]).chunk(2, dim=-1)
    key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + eps) * norm[:, None, None]

    def to_heads(x: Tensor) -> Tensor:
        return x.to(kv.dtype).unflatten(-1, (heads, -1)).transpose(2, 3)

    return to_heads(key), to_heads(value)


@triton.jit
def context_kv_kernel(
    kv, bias, norm, key, value, rows, length, heads, eps, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)  # of [blocks, C, L]
    block, mask = row // rows, cols < WIDTH
    b_k = load_row(kv, row * 2 * WIDTH + cols, mask) + load_row(bias, block * 2 * WIDTH + cols, mask)
    b_v = load_row(kv, (row * 2 + 1) * WIDTH + cols, mask) + load_row(bias, (block * 2 + 1) * WIDTH + cols, mask)
    b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) / WIDTH + eps) * load_row(norm, block * WIDTH + cols, mask)
    offsets = ((row // length * heads + cols // HEAD) * length + row % length) * HEAD + cols % HEAD
    tl.store(key + offsets, b_k.to(key.dtype.element_ty), mask=mask)
    tl.store(value + offsets, b_v.to(value.dtype.element_ty), mask=mask)


def empty_keys(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Room for keys and values of a product [blocks, C, L, 2D]: [blocks, C, heads, L, D/heads] each."""
    blocks, contexts, length, both = kv.shape
    shape = (blocks, contexts, heads, length, both // 2 // heads)
    return kv.new_empty(shape), kv.new_empty(shape)


def context_kv_launch(kv: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """Run the kernel on a product."""
    key, value = empty_keys(kv, heads)
    blocks, contexts, length, both = kv.shape
    if kv.numel():
        with backend.on(kv):
            context_kv_kernel[(blocks * contexts * length,)](
                kv.contiguous(), bias.contiguous(), norm.contiguous(), key, value,
                contexts * length, length, heads, eps, HEAD=key.shape[-1], **tile(both // 2),
            )  # fmt: skip
    return key, value


@torch.library.custom_op("ebr::context_kv", mutates_args=())
@gated({"kv": 2}, (3, 3))
def context_kv_op(kv: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    if launches(kv):
        return context_kv_launch(kv, bias, norm, heads, eps)
    return tuple(part.contiguous() for part in finish_ref(kv, bias, norm, heads, eps))


@context_kv_op.register_fake
def _(kv: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    return empty_keys(kv, heads)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    kv, bias, norm, _, ctx.eps = inputs
    ctx.save_for_backward(kv, bias, norm)


def _backward(ctx, key_gradient: Tensor, value_gradient: Tensor) -> tuple:
    """Through RMSNorm: with n the key over its deviation σ and g = weight · dK, d(key) = (g − n · mean(g ∘ n)) / σ."""
    kv, bias, norm = ctx.saved_tensors
    width = norm.shape[1]
    dk, dv = (wide(g).transpose(2, 3).flatten(3) for g in (key_gradient, value_gradient))
    key = wide(kv[..., :width]) + bias[:, None, None, :width]
    inverse = torch.rsqrt(key.square().mean(-1, keepdim=True) + ctx.eps)
    normed, pull = key * inverse, dk * norm[:, None, None]
    dkey = (pull - normed * (pull * normed).mean(-1, keepdim=True)) * inverse
    dkv = torch.cat((dkey, dv), dim=-1)
    dbias = dkv.sum((1, 2)).to(bias.dtype) if ctx.needs_input_grad[1] else None
    dnorm = (dk * normed).sum((1, 2)).to(norm.dtype) if ctx.needs_input_grad[2] else None
    return dkv.to(kv.dtype), dbias, dnorm, None, None


context_kv_op.register_autograd(_backward, setup_context=_save)


def context_kv(
    context: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Project contexts to the cross-attention keys and values of all blocks; differentiable in all tensors.

    Args: `context` [C, L, D], or each block's own [blocks, C, L, D]; `weight` [blocks, 2D, D] (key rows, then value rows);
    `bias` [blocks, 2D]; `norm` [blocks, D].
    Returns: key and value, each [blocks, C, heads, L, D/heads] in `context.dtype`.
    """
    return finish(product(context, weight), bias, norm, heads, eps)


def finish(kv: Tensor, bias: Tensor, norm: Tensor, heads: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`context_kv` from the `product` on, for one that has been made of frozen and live parts."""
    return (context_kv_op if backend.registered(kv) else finish_ref)(kv, bias, norm, heads, eps)
