"""A linear layer in bf16 on a CPU, of a float32 weight that is learned: y = x Wᵀ + b with W and b rounded.

    dx = g W,   dW = gᵀ x,   db = Σ g          g the gradient of y, both sums over all rows and in float32

torch's own product of two long matrices, gᵀ x, lays both out anew for every block of its result, rounds it to bf16, and sums the bias
in a pass of its own; by AMX's tiles it takes half of the time, the bias with it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.packed_linear import can_pack


def serves() -> bool:
    """Whether this CPU gains by it: its products in bf16 are AMX's."""
    return backend.native_level() == "amx" and can_pack(torch.bfloat16)


def weight_gradient_ref(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula: gradient [R, N] and x [R, K] → [N, K] and [N], float32."""
    return (gradient.t() @ x).float(), gradient.sum(0, dtype=torch.float32)


torch.library.define("ebr::learned_linear", "(Tensor x, Tensor weight, Tensor bias, Tensor rounded) -> Tensor")
torch.library.define("ebr::weight_gradient", "(Tensor gradient, Tensor x) -> (Tensor, Tensor)")


@torch.library.impl("ebr::learned_linear", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor, rounded: Tensor) -> Tensor:
    bias = bias.to(rounded.dtype)
    if can_pack(rounded.dtype):  # torch's linear layer would copy the bias into every row first
        return torch.ops.mkldnn._linear_pointwise(x, rounded, bias, "none", [], "")
    return F.linear(x, rounded, bias)


@torch.library.impl("ebr::weight_gradient", "CPU")
def _(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    cpu = backend.native(gradient, x)
    found = cpu.weight_gradient(gradient, x) if cpu else None
    return weight_gradient_ref(gradient, x) if found is None else found


@torch.library.register_fake("ebr::learned_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor, rounded: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("ebr::weight_gradient")
def _(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    outputs = gradient.shape[-1]
    return x.new_empty(outputs, x.shape[-1], dtype=torch.float32), x.new_empty(outputs, dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    x, _, _, rounded = inputs
    ctx.save_for_backward(x, rounded)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, rounded = ctx.saved_tensors
    dx = gradient @ rounded if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:3]):
        return dx, None, None, None
    return dx, *torch.ops.ebr.weight_gradient.default(gradient.flatten(0, -2), x.flatten(0, -2)), None


torch.library.register_autograd("ebr::learned_linear", _backward, setup_context=_keep)


def learned_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K], weight [N, K] and bias [N] float32 → [..., N] bf16."""
    return torch.ops.ebr.learned_linear.default(x.to(torch.bfloat16), weight, bias, weight.detach().to(torch.bfloat16))
