"""fp8 linear layers in a trunk."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.packed import PackedLinear
from ebr_engine.kernels.quantize_fp8 import Quantized, quantize_fp8
from ebr_engine.kernels.scaled_linear import bound_ref, scaled_linear

LAYERS = ("qkv", "out", "up", "down")


class Fp8Linear(nn.Module):
    """A frozen linear layer with an e4m3 weight scaled by output channel; activations are quantised by token."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._set(*quantize_fp8(linear.weight.detach()), linear.bias.detach())

    @classmethod
    def from_tensors(cls, weight: Tensor, scale: Tensor, bias: Tensor) -> "Fp8Linear":
        """A layer of tensors that are quantised already: [N, K] e4m3, [N, 1] float32, [N]."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(weight, scale, bias)
        return layer

    def _set(self, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
        for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, tensor)
        self.register_buffer("bound", bound_ref(weight, scale, bias), persistent=False)  # of the output, see `scaled_linear`
        self.register_load_state_dict_post_hook(Fp8Linear._rebound)

    def _rebound(self, _: object) -> None:
        self.bound = bound_ref(self.weight, self.scale, self.bias)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """[..., K] → [..., N], in `x.dtype`, or the bias's for a quantised input."""
        return scaled_linear(x, self.weight, self.scale, self.bias, dtype=self.bias.dtype if isinstance(x, Quantized) else None)

    def gelu(self, x: Tensor | Quantized) -> Quantized:
        """The layer, GELU and quantisation for the next layer, in one pass."""
        return scaled_linear(x, self.weight, self.scale, self.bias, gelu=True, fp8_out=True, bound=self.bound)

    def dense(self) -> nn.Linear:
        """An ordinary layer of these weights."""
        weight = self.dequantised()
        with torch.device("meta"):
            linear = nn.Linear(*reversed(weight.shape))
        linear.weight, linear.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, self.bias))
        return linear

    def dequantised(self) -> Tensor:
        """The weight [N, K] in the bias's dtype."""
        return (self.weight.float() * self.scale).to(self.bias.dtype)


def dense_weight(linear: nn.Linear | Fp8Linear) -> Tensor:
    """A layer's weight [N, K] as numbers that can be multiplied."""
    return linear.dequantised() if isinstance(linear, Fp8Linear) else linear.weight


def takes_fp8(*linears: nn.Module) -> bool:
    """Whether these layers, which read one input, want it quantised: all are fp8, and nothing is being learned."""
    return not torch.is_grad_enabled() and all(isinstance(linear, Fp8Linear) for linear in linears)


def feed_forward(up: nn.Module, down: nn.Module, x: Tensor | Quantized) -> Tensor:
    """down(GELU(up(x))), [..., D]; in fp8 the hidden layer is quantised as it is made."""
    return down(up.gelu(x) if takes_fp8(up, down) else activated(up, x))


def activated(layer: nn.Module, x: Tensor | Quantized) -> Tensor:
    """GELU of a linear layer, [..., N], in the layer's own pass where it is packed."""
    return layer.gelu(x) if isinstance(layer, PackedLinear) else F.gelu(layer(x), approximate="tanh")


def quantize_trunk(trunk: nn.Module) -> int:
    """Replace the large linear layers of every block (QKV, out, feed-forward) by fp8 ones, in place; how many there were.

    The first and last layers keep their precision, because their errors are not averaged over blocks, and so does Wan's
    cross-attention, whose q and out are small beside the rest. FLUX's text stream is quantised like its image stream.
    """
    parts = [trunk.blocks] if hasattr(trunk, "blocks") else [trunk.double_blocks, trunk.single_blocks]
    count = 0
    for block in (block for blocks in parts for block in blocks):
        for part in (block.text, block.image) if hasattr(block, "image") else (block,):
            for name in filter(part._modules.__contains__, LAYERS):
                setattr(part, name, Fp8Linear(getattr(part, name)))
                count += 1
    return count


def has_fp8_layers(trunk: nn.Module) -> bool:
    """Whether any layer of a trunk is quantised."""
    return any(isinstance(layer, Fp8Linear) for layer in trunk.modules())


def safer_trunk(trunk: nn.Module) -> nn.Module | None:
    """A copy of a trunk in the next wider precision: fp8 layers as dense ones in the dtype of the rest, or all in float32.

    None for a trunk that is float32 already. The weights' values stay what they were rounded to.
    """
    if not has_fp8_layers(trunk) and all(parameter.dtype == torch.float32 for parameter in trunk.parameters()):
        return None
    wider = copy.deepcopy(trunk)
    if not has_fp8_layers(trunk):
        return wider.float()
    for owner in list(wider.modules()):
        for name, layer in owner.named_children():
            if isinstance(layer, Fp8Linear):
                setattr(owner, name, layer.dense())
    return wider


def trunk_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The trunk's dtype for `auto`, `bf16`, `fp16`, `fp32` or `fp8` (what its other layers are in).

    `auto`, and what accompanies fp8, is bf16 on a GPU and on a CPU with bf16 instructions, float32 elsewhere.
    """
    if precision in ("auto", "fp8"):
        return torch.bfloat16 if device.type != "cpu" or cpu_has_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)
