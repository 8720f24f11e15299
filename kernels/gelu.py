"""GELU in its tanh form, x/2 · (1 + tanh(sqrt(2/π)·(x + 0.044715·x³))), for a CPU: native code where it is built.

Elsewhere it lies in the passes of other operations, or torch's serves.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend


def gelu_ref(x: Tensor) -> Tensor:
    """The formula."""
    return F.gelu(x, approximate="tanh")


def gelu_backward_ref(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient's formula."""
    return torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")


# By the plain interface, as `packed_linear`'s.
torch.library.define("ebr::gelu", "(Tensor x) -> Tensor")
torch.library.define("ebr::gelu_backward", "(Tensor gradient, Tensor x) -> Tensor")


@torch.library.impl("ebr::gelu", "CPU")
def _(x: Tensor) -> Tensor:
    cpu = backend.native(x)
    out = cpu.gelu(x) if cpu else None
    return gelu_ref(x) if out is None else out


@torch.library.impl("ebr::gelu_backward", "CPU")
def _(gradient: Tensor, x: Tensor) -> Tensor:
    cpu = backend.native(gradient, x)
    out = cpu.gelu_gradient(gradient, x) if cpu else None
    return gelu_backward_ref(gradient, x) if out is None else out


torch.library.register_fake("ebr::gelu", lambda x: torch.empty_like(x))
torch.library.register_fake("ebr::gelu_backward", lambda gradient, x: torch.empty_like(x))
torch.library.register_autograd(
    "ebr::gelu",
    lambda ctx, gradient: torch.ops.ebr.gelu_backward.default(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
gelu_op = torch.ops.ebr.gelu.default


def gelu(x: Tensor) -> Tensor:
    """Any shape, in the dtype of `x`."""
    cpu = backend.native(x)
    if cpu and (out := cpu.gelu(x)) is not None:
        return out
    return gelu_op(x) if backend.native_learning(x) else gelu_ref(x)
