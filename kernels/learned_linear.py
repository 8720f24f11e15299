"""A linear layer in bf16 on a CPU, of a float32 weight that is learned, and of a GELU before it on request.

    y = a Wᵀ + b,   a = x or gelu_tanh(x),   W and b rounded
    da = g W,   dx = da or da·gelu'(x),   dW = gᵀ a,   db = Σ g          g the gradient of y; the last two are float32 sums

torch's own product of two long matrices, gᵀ a, lays both out anew for every block of its result and rounds it to bf16; the bias
has a pass of its own. By AMX's tiles all of it takes half of the time. da is made some rows at a time where GELU's slope follows:
it need not leave the cache.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.gelu import gelu as activate
from ebr_engine.kernels.gelu import gelu_backward_ref
from ebr_engine.kernels.packed_linear import can_pack

ROWS = 512  # of da that are made at a time


def serves() -> bool:
    """Whether this CPU gains by it: its products in bf16 are AMX's."""
    return backend.native_level() == "amx" and can_pack(torch.bfloat16)


def weight_gradient_ref(gradient: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The formula: gradient [R, N] and a [R, K] → [N, K] and [N], float32."""
    return (gradient.t() @ a).float(), gradient.sum(0, dtype=torch.float32)


torch.library.define(
    "ebr::learned_linear", "(Tensor x, Tensor weight, Tensor bias, Tensor rounded, bool gelu) -> (Tensor, Tensor)"
)
torch.library.define("ebr::weight_gradient", "(Tensor gradient, Tensor a) -> (Tensor, Tensor)")
torch.library.define("ebr::gelu_linear_back", "(Tensor gradient, Tensor rounded, Tensor x) -> Tensor")


@torch.library.impl("ebr::learned_linear", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor, rounded: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    a, bias = activate(x) if gelu else x, bias.to(rounded.dtype)
    if can_pack(rounded.dtype):  # torch's linear layer would copy the bias into every row first
        y = torch.ops.mkldnn._linear_pointwise(a, rounded, bias, "none", [], "")
    else:
        y = F.linear(a, rounded, bias)
    return y, a if gelu else x.new_empty(0)


@torch.library.impl("ebr::weight_gradient", "CPU")
def _(gradient: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    cpu = backend.native(gradient, a)
    found = cpu.weight_gradient(gradient, a) if cpu else None
    return weight_gradient_ref(gradient, a) if found is None else found


@torch.library.impl("ebr::gelu_linear_back", "CPU")
def _(gradient: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    rows, before = gradient.flatten(0, -2), x.contiguous().flatten(0, -2)
    out, room = torch.empty_like(before), before.new_empty(ROWS, before.shape[1])
    cpu = backend.native(before)
    for g, some, to in zip(*(t.split(ROWS) for t in (rows, before, out))):
        da = torch.mm(g, rounded, out=room[: len(g)])
        if not (cpu and cpu.gelu_gradient_to(to, da, some)):
            to.copy_(gelu_backward_ref(da, some))
    return out.view(x.shape)


@torch.library.register_fake("ebr::learned_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor, rounded: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), torch.empty_like(x) if gelu else x.new_empty(0)


@torch.library.register_fake("ebr::weight_gradient")
def _(gradient: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    outputs = gradient.shape[-1]
    return a.new_empty(outputs, a.shape[-1], dtype=torch.float32), a.new_empty(outputs, dtype=torch.float32)


@torch.library.register_fake("ebr::gelu_linear_back")
def _(gradient: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:
    x, _, _, rounded, ctx.gelu = inputs
    ctx.save_for_backward(x, rounded, *((output[1],) if ctx.gelu else ()))


def _backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, rounded, *activated = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.ebr.gelu_linear_back.default(gradient, rounded, x) if ctx.gelu else gradient @ rounded
    if any(ctx.needs_input_grad[1:3]):
        a = activated[0] if ctx.gelu else x
        dw, db = torch.ops.ebr.weight_gradient.default(gradient.flatten(0, -2), a.flatten(0, -2))
    return dx, dw, db, None, None


torch.library.register_autograd("ebr::learned_linear", _backward, setup_context=_keep)


def learned_linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x [..., K], weight [N, K] and bias [N] float32 → [..., N] bf16; `gelu`: of GELU(x)."""
    rounded = weight.detach().to(torch.bfloat16)
    return torch.ops.ebr.learned_linear.default(x.to(torch.bfloat16), weight, bias, rounded, gelu)[0]
