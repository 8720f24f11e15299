"""A linear layer on a CPU whose weight lies in the layout of oneDNN's products, with GELU in the same pass on request.

    y = x Wᵀ + b,   y ← gelu_tanh(y)

torch's own linear layers multiply float32 by another library, and lay bf16 weights out anew in every product. A weight in that
layout is opaque to compilers: compiled graphs find it by a number.
"""

import itertools
import platform
import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

NUMBERS = itertools.count()


class PackedWeight:
    """A weight [N, K], float32 or bf16, in oneDNN's layout, and its number."""

    def __init__(self, weight: Tensor):
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.number = next(NUMBERS)
        KEPT[self.number] = self

    def dense(self) -> Tensor:
        """The weight in rows, as it was."""
        return self.tensor.to_dense()


KEPT: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have such products in a dtype."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_linear_ref(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """The formula, of a weight in rows."""
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def packed_linear_launch(x: Tensor, weight: PackedWeight, bias: Tensor, gelu: bool) -> Tensor:
    """Run oneDNN's product."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], bias.shape[0])
    activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight.tensor, bias, *activation)


# By the plain interface: what `custom_op` adds to a call is as long as a small product.
torch.library.define("ebr::packed_linear", "(Tensor x, int number, Tensor bias, bool gelu) -> Tensor")


@torch.library.impl("ebr::packed_linear", "CPU")
def _(x: Tensor, number: int, bias: Tensor, gelu: bool) -> Tensor:
    return packed_linear_launch(x, KEPT[number], bias, gelu)


@torch.library.register_fake("ebr::packed_linear")
def _(x: Tensor, number: int, bias: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], bias.shape[0])


packed_linear_op = torch.ops.ebr.packed_linear.default


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor, gelu: bool = False) -> Tensor:
    """x [..., K] → [..., N], both in the weight's dtype on the CPU; `bias` [N]. Gradients go by the weight in rows."""
    if torch.compiler.is_compiling():
        return packed_linear_op(x, weight.number, bias, gelu)
    if torch.is_grad_enabled() and x.requires_grad:
        return packed_linear_ref(x, weight.dense(), bias, gelu)
    return packed_linear_launch(x, weight, bias, gelu)
