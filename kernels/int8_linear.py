"""A linear layer on a CPU in int8: weights scaled by output channel, activations by token as they come.

    y = s_x s_w (Σ_k x_k w_k) + b,   x_k = round(x / s_x),   s_x = max |x| / L,   y ← gelu_tanh(y) on request

Products are summed in int32 by oneDNN (https://uxlfoundation.github.io/oneDNN), which adds pairs in int16 first where the machine
has nothing better, and int16 saturates at two products of 8 bits. So whether 8 bits are exact is tried, once, and where they are
not, activations have 7: L is 127 or 63. As in `packed_linear`, a weight lies in the library's own layout, and graphs find it by
a number.
"""

import functools
import itertools
import platform
import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 127  # of a weight; of an activation 127 or 63
SMALLEST = 1e-12  # scale: a row of zeros stays one
NUMBERS = itertools.count()


class Int8Weight:
    """A weight [N, K] rounded to int8, in oneDNN's layout, with its scales [N] float32 and its number."""

    def __init__(self, weight: Tensor):
        rows, self.scale = quantize_rows(weight.detach().float(), LEVELS)
        self.scale = self.scale.squeeze(-1)
        self.shape = rows.shape
        self.zeros = torch.zeros(len(rows), dtype=torch.int64)
        self.packed = torch.ops.onednn.qlinear_prepack(rows, None)
        number = next(NUMBERS)
        self.number = torch.tensor(number)
        KEPT[number] = self

    def dense(self) -> Tensor:
        """The weight in rows, as it was rounded, float32."""
        return product(torch.full(self.shape[1:], 1).diag().to(torch.uint8), 0, self).t().contiguous()


KEPT: weakref.WeakValueDictionary[int, Int8Weight] = weakref.WeakValueDictionary()


def can_int8() -> bool:
    """Whether this CPU and this torch have such products."""
    there = hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()
    return there and platform.machine() in ("x86_64", "AMD64")


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """x [..., K] → int8 [..., K] from -levels to levels, and the scale of each row [..., 1] float32."""
    scale = (x.abs().amax(-1, keepdim=True).float() / levels).clamp(min=SMALLEST)
    return (x / scale).round_().to(torch.int8), scale


def int8_linear_ref(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gelu: bool, levels: int = LEVELS) -> Tensor:
    """The formula in float64: x [..., K], weight [N, K] int8, its scale [N], bias [N] → [..., N]."""
    rows, step = quantize_rows(x, levels)
    y = rows.double() @ weight.double().t() * step.double() * scale.double() + bias.double()
    return (F.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


def product(x: Tensor, zero: int, weight: Int8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """s_w Σ_k (x - zero) w of x [M, K] uint8, summed in int32 → [M, N] in `dtype`."""
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero, weight.packed, weight.scale, weight.zeros, None, 1.0, 0, dtype, "none", [], ""
    )


@functools.cache
def activation_levels() -> int:
    """127 where products of 8 bits are exact on this machine, else 63."""
    weight, x = Int8Weight(torch.full((16, 64), -1.0)), torch.full((16, 64), 255, dtype=torch.uint8)
    exact = torch.full((16, 16), -255.0 * 64)
    return LEVELS if torch.allclose(product(x, 0, weight), exact, rtol=1e-5) else LEVELS // 2


def int8_linear_launch(x: Tensor, weight: Int8Weight, bias: Tensor, gelu: bool) -> Tensor:
    """Quantise rows, run oneDNN's product, scale it: x [..., K], bias [N] → [..., N]."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], bias.shape[0])
    levels, flat = activation_levels(), x.reshape(-1, x.shape[-1])
    step = (torch.linalg.vector_norm(flat, float("inf"), dim=-1, keepdim=True).float() / levels).clamp_(min=SMALLEST)
    zero = levels + 1  # oneDNN's unsigned times signed is its fast product
    y = product((flat / step).round_().add_(zero).to(torch.uint8), zero, weight)
    torch.addcmul(bias.float(), y, step, out=y)
    if gelu:
        torch.ops.aten.gelu_(y, approximate="tanh")  # in place: new pages cost more than it
    return y.to(x.dtype).view(*x.shape[:-1], -1)


torch.library.define("ebr::int8_linear", "(Tensor x, Tensor number, Tensor bias, bool gelu) -> Tensor")


@torch.library.impl("ebr::int8_linear", "CPU")
def _(x: Tensor, number: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return int8_linear_launch(x, KEPT[int(number)], bias, gelu)


@torch.library.register_fake("ebr::int8_linear")
def _(x: Tensor, number: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], bias.shape[0])


int8_linear_op = torch.ops.ebr.int8_linear.default


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor, gelu: bool = False) -> Tensor:
    """x [..., K] → [..., N], in x's dtype (float32 or bf16) on the CPU; `bias` [N]; nothing is learned through it."""
    return int8_linear_op(x, weight.number, bias, gelu)
