"""RMSNorm of rows with a weight, in float32: cross-attention's queries.

y = x · weight / sqrt(mean(x²) + eps)

Gradient, with g = dy · weight and n = x / sqrt(mean(x²) + eps):   dx = (g − n · mean(g · n)) / sqrt(mean(x²) + eps)
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.norm_gradients import like, norm_gradient_ref, norm_gradients
from ebr_engine.kernels.rows import wide


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula with float32 statistics, rounded once."""
    return torch.nn.functional.rms_norm(wide(x), x.shape[-1:], wide(weight), eps).to(x.dtype)


def rms_norm_backward_ref(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient's formula of `x`, rounded once."""
    return norm_gradient_ref(gradient, x, weight, eps, centred=False).to(x.dtype)


# By the plain interface, as `packed_linear`'s.
torch.library.define("ebr::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.define("ebr::rms_norm_backward", "(Tensor gradient, Tensor x, Tensor weight, float eps) -> Tensor")


@torch.library.impl("ebr::rms_norm", "CPU")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    cpu = backend.native(x, weight)
    out = cpu.rms_norm(x, weight, eps) if cpu else None
    return rms_norm_ref(x, weight, eps) if out is None else out


@torch.library.impl("ebr::rms_norm_backward", "CPU")
def _(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    cpu = backend.native(gradient, x, weight)
    found = cpu.norm_gradient(None, gradient, x, None, weight[None], eps, centred=False) if cpu else None
    return rms_norm_backward_ref(gradient, x, weight, eps) if found is None else found[0]


torch.library.register_fake("ebr::rms_norm", lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format))
torch.library.register_fake(
    "ebr::rms_norm_backward",
    lambda gradient, x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, gradient: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return torch.ops.ebr.rms_norm_backward.default(gradient, x, weight, ctx.eps), None, None
    needed = True, False, False
    dx, _, tables = norm_gradients(None, gradient, x, None, None, weight[None], ctx.eps, needed, centred=False)
    return dx, like(tables.weight, weight), None


torch.library.register_autograd("ebr::rms_norm", _backward, setup_context=_save)
rms_norm_op = torch.ops.ebr.rms_norm.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Args: `x` [B, N, D]; `weight` [D]; `eps` is added to the mean square. Returns: [B, N, D] in `x.dtype`."""
    cpu = backend.native(x, weight)
    if cpu and (out := cpu.rms_norm(x, weight, eps)) is not None:
        return out
    return (rms_norm_op if backend.native_learning(x, weight) else rms_norm_ref)(x, weight, eps)
