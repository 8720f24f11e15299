"""Linear layers in a trunk that runs on a CPU, their weights in the layout of its products."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.kernels.packed_linear import PackedWeight, can_pack, packed_linear


class PackedLinear(nn.Module):
    """A frozen linear layer; copies of it, and its state, are those of an ordinary one."""

    def __init__(self, linear: nn.Linear, learns: bool = False):
        super().__init__()
        self.packed = PackedWeight(linear.weight, learns)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """[N, K], opaque: for its shape and dtype."""
        return self.packed.tensor

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] → [..., N]; `bias` [N] in place of the layer's own."""
        return packed_linear(x, self.packed, self.bias if bias is None else bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the layer, in one pass."""
        return packed_linear(x, self.packed, self.bias, gelu=True)

    def dense(self) -> nn.Linear:
        """An ordinary layer of these weights."""
        out, inside = self.weight.shape
        linear = nn.Linear(inside, out, device="meta")
        linear.weight = nn.Parameter(self.packed.dense(), requires_grad=False)
        linear.bias = self.bias
        return linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.dense()._save_to_state_dict(destination, prefix, keep_vars)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        return self.dense()


def pack_trunk(trunk: nn.Module, learns: bool = False) -> int:
    """Replace the linear layers of every block by packed ones, in place, where this CPU has them; how many there were.

    A layer's old weight is dropped before the next one is packed. `learns`: gradients pass through them at the same speed, for
    twice the memory.
    """
    layers = [(owner, name) for owner in trunk.modules() for name, layer in owner.named_children() if type(layer) is nn.Linear]
    layers = [(owner, name) for owner, name in layers if owner is not trunk and can_pack(getattr(owner, name).weight.dtype)]
    for owner, name in layers:
        setattr(owner, name, PackedLinear(getattr(owner, name), learns))
    return len(layers)


def unpack_trunk(trunk: nn.Module) -> None:
    """Put ordinary layers back in place of packed ones."""
    for owner in list(trunk.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, PackedLinear):
                setattr(owner, name, layer.dense())


def linear_with(layer: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """A linear layer with another bias, [..., K] → [..., N]."""
    return layer(x, bias) if isinstance(layer, PackedLinear) else F.linear(x, layer.weight, bias)
