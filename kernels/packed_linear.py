"""A linear layer on a CPU whose weight lies in the layout of oneDNN's products, with GELU in the same pass on request.

    y = x Wᵀ + b,   y ← gelu_tanh(y)

torch's own linear layers multiply float32 by another library, and lay bf16 weights out anew in every product. A weight in that
layout (oneDNN's blocked formats, https://uxlfoundation.github.io/oneDNN) is opaque to compilers: compiled graphs find it by a
number, which is a tensor, so that layers of one shape share a graph. The operators are those that torch's own compiler packs
weights with.
"""

import itertools
import platform
import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend, tune
from ebr_engine.kernels.gelu import gelu as activate

NUMBERS = itertools.count()
PACKED_ROWS = 1024  # that products are timed with
# Bytes of a feed-forward's hidden layer from which on it is made in pieces, and of a thread's piece; and of a weight that stays
# in the cache between pieces. Measured at `mini`'s width: a sixth of a feed-forward's time at 512 x 512.
LARGE_HIDDEN, HIDDEN_PIECE, CACHED_WEIGHT = 2**22, 2**20, 2**21


class PackedWeight:
    """A weight [N, K], float32 or bf16, in oneDNN's layout, and its number; `learns`: once more transposed, for gradients."""

    def __init__(self, weight: Tensor, learns: bool = False):
        weight = weight.detach()
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.transposed = PackedWeight(weight.t()) if learns else None
        number = next(NUMBERS)
        self.number = torch.tensor(number)
        KEPT[number] = self

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
    """The formula, of a weight in rows: x [..., K], weight [N, K], bias [N] → [..., N]."""
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def packed_linear_launch(x: Tensor, weight: PackedWeight, bias: Tensor, gelu: bool) -> Tensor:
    """Run oneDNN's product: x [..., K], bias [N] → [..., N]."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], bias.shape[0])
    if not gelu:
        return torch.ops.mkldnn._linear_pointwise(x, weight.tensor, bias, "none", [], "")
    ways = {"fused": lambda: torch.ops.mkldnn._linear_pointwise(x, weight.tensor, bias, "gelu", [], "tanh")}
    if cpu := backend.native(x):

        def native() -> Tensor:
            y = torch.ops.mkldnn._linear_pointwise(x, weight.tensor, bias, "none", [], "")
            return y if cpu.gelu_(y) else F.gelu(y, approximate="tanh")

        ways = {"native": native, **ways}
    rows, (out, inside) = x.shape[:-1].numel(), weight.tensor.shape
    kind = str(x.dtype).removeprefix("torch."), f"{inside} to {out}", f"{rows.bit_length()} bits of rows"
    return ways[tune.chosen("linear with GELU", kind, 2 * rows * inside * out, ways)]()


def packing_pays(weight: Tensor) -> bool:
    """Whether products by a weight [N, K] in this layout take no longer than torch's own, as far as that is known here."""
    out, inside = weight.shape
    x, bias = torch.randn(PACKED_ROWS, inside).to(weight.dtype), weight.new_zeros(out)
    kept: dict[str, PackedWeight] = {}

    def packed() -> Tensor:
        if not kept:
            kept["weight"] = PackedWeight(weight)
        return packed_linear_launch(x, kept["weight"], bias, False)

    ways = {"packed": packed, "plain": lambda: F.linear(x, weight, bias)}
    kind = str(weight.dtype).removeprefix("torch."), f"{inside} to {out}"
    with torch.inference_mode():
        return tune.chosen("linear", kind, 2 * PACKED_ROWS * weight.numel(), ways) == "packed"


# By the plain interface: what `custom_op` adds to a call is as long as a small product.
torch.library.define("ebr::packed_linear", "(Tensor x, Tensor number, Tensor bias, bool gelu) -> Tensor")
torch.library.define("ebr::packed_linear_back", "(Tensor gradient, Tensor number, int width) -> Tensor")


@torch.library.impl("ebr::packed_linear", "CPU")
def _(x: Tensor, number: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return packed_linear_launch(x, KEPT[int(number)], bias, gelu)


@torch.library.impl("ebr::packed_linear_back", "CPU")
def _(gradient: Tensor, number: Tensor, width: int) -> Tensor:
    return packed_linear_launch(gradient, KEPT[int(number)].transposed, gradient.new_zeros(width), False)


@torch.library.register_fake("ebr::packed_linear")
def _(x: Tensor, number: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], bias.shape[0])


@torch.library.register_fake("ebr::packed_linear_back")
def _(gradient: Tensor, number: Tensor, width: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], width)


packed_linear_op = torch.ops.ebr.packed_linear.default


def remember_number(ctx, inputs, output) -> None:
    x, number, _, gelu = inputs
    if gelu:
        raise NotImplementedError("a packed layer's fused GELU has no gradient")
    ctx.save_for_backward(number)
    ctx.width = x.shape[-1]


def packed_linear_backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    """dx = dy W, [..., N] → [..., K]; that of the bias is dy's sum over all rows."""
    (number,) = ctx.saved_tensors
    dx = torch.ops.ebr.packed_linear_back.default(gradient, number, ctx.width) if ctx.needs_input_grad[0] else None
    return dx, None, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, None


torch.library.register_autograd("ebr::packed_linear", packed_linear_backward, setup_context=remember_number)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor, gelu: bool = False) -> Tensor:
    """x [..., K] → [..., N], both in the weight's dtype on the CPU; `bias` [N].

    Differentiable in x and bias: by the transposed weight if there is one, else by the weight in rows, which is slower.
    """
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        if weight.transposed is None:
            return packed_linear_ref(x, weight.dense(), bias, gelu)
        y = packed_linear_op(x, weight.number, bias, False)
        return activate(y) if gelu else y
    if torch.compiler.is_compiling():
        return packed_linear_op(x, weight.number, bias, gelu)
    return packed_linear_launch(x, weight, bias, gelu)


def packed_feed_forward(x: Tensor, up: PackedWeight, up_bias: Tensor, down: PackedWeight, down_bias: Tensor) -> Tensor:
    """down(GELU(up(x))), x [..., K] → [..., K], nothing learned: a few rows at a time where all rows' hidden layer is large.

    A piece's hidden layer stays in the cache, and takes no memory that the system hands out, and clears, anew.
    """
    rows, (hidden, inside) = x.shape[:-1].numel(), up.tensor.shape
    size = hidden * x.element_size()
    if rows * size <= LARGE_HIDDEN or inside * size > CACHED_WEIGHT:
        return packed_linear_launch(packed_linear_launch(x, up, up_bias, True), down, down_bias, False)
    flat, out = x.reshape(rows, inside), x.new_empty(rows, down.tensor.shape[0])
    piece = max(1, HIDDEN_PIECE // size) * torch.get_num_threads()
    for some, to in zip(flat.split(piece), out.split(piece)):
        to.copy_(packed_linear_launch(packed_linear_launch(some, up, up_bias, True), down, down_bias, False))
    return out.view(*x.shape[:-1], -1)
