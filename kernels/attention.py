"""Self-attention over all tokens.

out = softmax(q kᵀ / sqrt(head_dim)) v
"""

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger("ebr_engine")

# On a CPU explicit products are meant to spare the library's slower backward; no committed benchmark measures it yet.
EXPLICIT_TOKENS = 1024
# What a CUDA device tries in turn: a kernel that is not built, or does not take the inputs, is passed over.
ORDER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula with a float32 softmax; all tensors [B, H, N, d]."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)


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
    if q.requires_grad and q.shape[-2] <= EXPLICIT_TOKENS:
        return attention_ref(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
