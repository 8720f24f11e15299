"""Self-attention over all tokens.

out = softmax(q kᵀ / sqrt(head_dim)) v
"""

import functools
import logging
import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebr_engine.kernels import backend

logger = logging.getLogger("ebr_engine")

# On a CPU explicit products are meant to spare the library's slower backward; no committed benchmark measures it yet.
EXPLICIT_TOKENS = 1024
SCORES = 2**19  # elements of a head's scores that a CPU's products make at a time: with all threads' they fit into its caches
# What a CUDA device tries in turn: a kernel that is not built, or does not take the inputs, is passed over.
ORDER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula with a float32 softmax; all tensors [B, H, N, d]."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)


def attention_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in blocks of queries (Rabe and Staats, arXiv 2112.05682); all tensors [B, H, N, d], none learned from.

    Scores and likelihoods are rounded to the dtype of `q`, the scores as the reference rounds them.
    For bf16 on a CPU: the library's kernel multiplies bf16 there no faster than float32, oneDNN's products twice as fast.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    queries, keys, values, results = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v, out))
    tokens, heads = q.shape[-2], max(2, torch.get_num_threads())
    rows = min(tokens, max(16, SCORES // max(1, k.shape[-2])))
    room = torch.empty(2, heads * rows * k.shape[-2], dtype=q.dtype)  # taken from the system once: its pages cost more than it
    for first in range(0, len(queries), heads):
        some = slice(first, first + heads)
        for start in range(0, tokens, rows):
            block = slice(start, start + rows)
            query = queries[some, block]
            shape = (*query.shape[:2], k.shape[-2])
            scores, likely = (one[: math.prod(shape)].view(shape) for one in room)
            torch.bmm(query, keys[some].transpose(1, 2), out=scores)
            torch.softmax(scores, dim=-1, out=likely)
            torch.bmm(likely, values[some], out=results[some, block])
    return out


# One operation to a compiler, which would unroll the blocks.
torch.library.define("ebr::attention_blocks", "(Tensor q, Tensor k, Tensor v) -> Tensor")
torch.library.impl("ebr::attention_blocks", "CPU", attention_blocks)
torch.library.register_fake("ebr::attention_blocks", lambda q, k, v: q.new_empty(q.shape))
attention_blocks_op = torch.ops.ebr.attention_blocks.default


@functools.cache
def served_by(device: torch.device, dtype: torch.dtype, head: int) -> SDPBackend:
    """The first of `ORDER` that takes tensors like these; logged, once."""
    q = torch.empty(1, 1, 128, head, device=device, dtype=dtype)
    given = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    takes = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
        SDPBackend.MATH: lambda _: True,
    }
    served = next(kernel for kernel in ORDER if takes[kernel](given))
    logger.info("attention on %s, %s, heads of %d: %s", device, str(dtype).removeprefix("torch."), head, served.name)
    return served


def attention_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The library's kernels in the order of `ORDER`."""
    if not torch.compiler.is_compiling():
        served_by(q.device, q.dtype, q.shape[-1])
    with sdpa_kernel(list(ORDER), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, [B, H, N, d] each → [B, H, N, d]; the fastest of what is there for the device."""
    if q.is_cuda:
        return attention_cuda(q, k, v)
    cpu = backend.native(q, k, v)
    if cpu and (out := cpu.attention(q, k, v)) is not None:
        return out
    if q.requires_grad and q.shape[-2] <= EXPLICIT_TOKENS:
        return attention_ref(q, k, v)
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.dtype == torch.bfloat16 and not learned and not torch.compiler.is_exporting():
        return attention_blocks_op(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
