"""Self-attention over all tokens.

out = softmax(q kᵀ / sqrt(head_dim)) v
"""

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebr_engine.kernels import backend, tune
from ebr_engine.kernels.attention_fp8 import attention_fp8
from ebr_engine.kernels.heads import rows_of_heads
from ebr_engine.kernels.rows import wide

logger = logging.getLogger("ebr_engine")

EXPLICIT_TOKENS = 1024  # up to which, on a CPU without native code, explicit products spare the library's slower backward
LARGEST_SCORES = 2**26  # elements of all heads' scores up to which products of all of them are tried
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
    For bf16 on CPUs whose library multiplies it no faster than float32 in its own kernel, oneDNN's products twice as fast.
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


def attention_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula on a CPU by whichever way is fastest there, nothing learned; the layout of the result is the way's."""
    if not backend.real(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    ways: dict[str, Callable[[], Tensor]] = {}
    cpu = backend.native(q, k, v)
    if cpu and cpu.attends(q, k, v):
        ways["native"] = lambda: cpu.attention(q, k, v)
    ways["library"] = lambda: F.scaled_dot_product_attention(q, k, v)
    if q.dtype == torch.bfloat16:
        ways["blocks"] = lambda: attention_blocks(q, k, v)
    return ways[tune.chosen("attention", kind_of(q, k), 4 * q.numel() * k.shape[-2], ways)]()


def kind_of(q: Tensor, k: Tensor) -> tuple[str, ...]:
    """What the choice of a way belongs to."""
    dtype, queries = str(q.dtype).removeprefix("torch."), q.shape[:-1].numel()
    return dtype, f"heads of {q.shape[-1]}", f"{queries.bit_length()} bits of queries", f"{k.shape[-2].bit_length()} bits of keys"


# One operation to a compiler, which cannot time its ways; its result is contiguous.
torch.library.define("ebr::attention_cpu", "(Tensor q, Tensor k, Tensor v) -> Tensor")
torch.library.impl("ebr::attention_cpu", "CPU", lambda q, k, v: attention_cpu(q, k, v).contiguous())
torch.library.register_fake("ebr::attention_cpu", lambda q, k, v: q.new_empty(q.shape))
attention_cpu_op = torch.ops.ebr.attention_cpu.default


def native_head(head: int) -> bool:
    """Whether native code has kernels for heads of this width."""
    return head % 8 == 0 and head <= 256


def attention_saving_ref(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_ref`, and the logarithms of the softmaxes' denominators [B, H, N] in float32 (or float64)."""
    scores = wide(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)))
    log_sum = scores.logsumexp(-1)
    return torch.matmul(scores.sub_(log_sum.unsqueeze(-1)).exp_().to(v.dtype), v), log_sum


def attention_backward_ref(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, likelihoods computed again: with D = rowsum(g ∘ out), dS = P ∘ (g vᵀ − D) / sqrt(head_dim),

    dq = dS k, dk = dSᵀ q, dv = Pᵀ g.
    """
    scale = q.shape[-1] ** -0.5
    likely = wide(torch.matmul(q * scale, k.transpose(-1, -2))).sub_(log_sum.unsqueeze(-1)).exp_()
    dv = torch.matmul(likely.to(q.dtype).transpose(-1, -2), gradient)
    mean = (wide(gradient) * wide(out)).sum(-1, keepdim=True)
    slopes = likely.mul_(wide(torch.matmul(gradient, v.transpose(-1, -2))).sub_(mean)).mul_(scale).to(q.dtype)
    return torch.matmul(slopes, k), torch.matmul(slopes.transpose(-1, -2), q), dv


def by_library(q: Tensor) -> bool:
    """Whether torch's own attention for a CPU, which saves the same logarithms, is a way to learn."""
    return q.dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def attention_saving(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention on a CPU by whichever way is faster there, and the logarithms of the softmaxes' denominators [B, H, N]."""
    cpu, ways = backend.native(q, k, v), {}
    if cpu and cpu.attends(q, k, v):
        ways["native"] = lambda: cpu.attention_saving(q, k, v)
    if by_library(q):
        ways["library"] = lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if not ways or q.shape[:-1].numel() * k.shape[-2] <= LARGEST_SCORES:
        ways["products"] = lambda: attention_saving_ref(q, k, v)
    return ways[tune.chosen("attention to learn through", kind_of(q, k), 4 * q.numel() * k.shape[-2], ways)]()


def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients by whichever way is faster."""
    given = gradient, q, k, v, out, log_sum
    cpu, ways = backend.native(*given), {}
    if cpu and cpu.attends(q, k, v):
        ways["native"] = lambda: cpu.attention_gradient(*given)
    if by_library(q):
        ways["library"] = lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False)
    if not ways or q.shape[:-1].numel() * k.shape[-2] <= LARGEST_SCORES:
        ways["products"] = lambda: attention_backward_ref(*given)
    return ways[tune.chosen("attention's gradient", kind_of(q, k), 10 * q.numel() * k.shape[-2], ways)]()


torch.library.define("ebr::attention_learned", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
torch.library.define(
    "ebr::attention_learned_backward",
    "(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("ebr::attention_learned", "CPU")
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum = attention_saving(q, k, v)
    return like_rows(out), log_sum.contiguous()  # torch's lie by token


@torch.library.impl("ebr::attention_learned_backward", "CPU")
def _(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = attention_backward(*given)
    return like_rows(dq), dk.contiguous(), dv.contiguous()


def like_rows(x: Tensor) -> Tensor:
    """`x` [B, H, N, d] over memory [B, N, H, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.register_fake("ebr::attention_learned")
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return rows_of_heads(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("ebr::attention_learned_backward")
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows_of_heads(q), *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.ebr.attention_learned_backward.default(gradient, *ctx.saved_tensors)


torch.library.register_autograd("ebr::attention_learned", _backward, setup_context=_save)
attention_learned_op = torch.ops.ebr.attention_learned.default


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


def attention(q: Tensor, k: Tensor, v: Tensor, fp8: bool = False) -> Tensor:
    """Scaled dot-product attention, [B, H, N, d] each → [B, H, N, d]; the fastest of what is there for the device.

    `fp8`: in eight bits (`attention_fp8`), where nothing is being learned.
    """
    if fp8 and not torch.is_grad_enabled():
        return attention_fp8(q, k, v)
    if q.is_cuda:
        return attention_cuda(q, k, v)
    learned = backend.learned(q, k, v)
    if backend.native_learning(q, k, v) and native_head(q.shape[-1]):
        return attention_learned_op(q, k, v)[0]
    if q.requires_grad and q.shape[-2] <= EXPLICIT_TOKENS:
        return attention_ref(q, k, v)
    if not learned and not torch.compiler.is_exporting() and q.dtype in (torch.float32, torch.bfloat16):
        return attention_cpu_op(q, k, v) if torch.compiler.is_compiling() else attention_cpu(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
