"""What the trunks share: fp8, int8 and packed linear layers, and the position tables that they keep."""

import copy
import platform
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.errors import BackboneError, warn
from ebr_engine.kernels.backend import has_fp8
from ebr_engine.kernels.gated_activation import gated_activation, gated_activation_fp8
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_fp8
from ebr_engine.kernels.gelu import gelu as activate
from ebr_engine.kernels.int8_linear import Int8Weight, can_int8, int8_linear
from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_fp8
from ebr_engine.kernels.learned_linear import learned_linear
from ebr_engine.kernels.packed_linear import PackedWeight, can_pack, packed_feed_forward, packed_linear, packing_pays
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope
from ebr_engine.kernels.qkv_norm_rope import named_form, qkv_norm_rope
from ebr_engine.kernels.quantize_fp8 import Quantized, quantize_fp8
from ebr_engine.kernels.scaled_linear import bound_ref, scaled_linear

LAYERS = ("qkv", "out", "up", "down")
ROTARY_KEPT = 4  # grids whose position tables a trunk keeps: those of a picture's tiles and of its small version, twice
RotaryCache = dict[Hashable, tuple[Tensor, Tensor]]


def kept_rotary(cache: RotaryCache, key: Hashable, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """cos and sin of `key` (a grid, a device), made where they are not among those that were used last.

    A graph keeps them if they are there when it is compiled, and computes them in every run otherwise.
    """
    if torch.compiler.is_compiling():  # a graph that changes the cache would be compiled again when it has changed
        return cache[key] if key in cache else make()
    tables = cache.pop(key) if key in cache else make()
    while len(cache) >= ROTARY_KEPT:
        del cache[next(iter(cache))]
    cache[key] = tables
    return tables


def bias_of(linear: nn.Linear) -> Tensor:
    """A layer's bias [N]; zeros for one that has none, whose product ends in an addition all the same."""
    weight = linear.weight.detach()
    return weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.detach()


class Fp8Linear(nn.Module):
    """A frozen linear layer with an e4m3 weight scaled by output channel; activations are quantised by token."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._set(*quantize_fp8(linear.weight.detach()), bias_of(linear))

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


def dense_weight(linear: nn.Module) -> Tensor:
    """A layer's weight [N, K] as numbers that can be multiplied."""
    return linear.dequantised() if isinstance(linear, (Fp8Linear, Int8Linear)) else linear.weight


def takes_fp8(*linears: nn.Module) -> bool:
    """Whether these layers, which read one input, want it quantised: all are fp8, and nothing is being learned."""
    return not torch.is_grad_enabled() and all(isinstance(linear, Fp8Linear) for linear in linears)


def feed_forward(up: nn.Module, down: nn.Module, x: Tensor | Quantized) -> Tensor:
    """down(GELU(up(x))), [..., D]; in fp8 the hidden layer is quantised as it is made."""
    if isinstance(up, PackedLinear) and isinstance(down, PackedLinear) and not compiled_or_learned(x):
        return packed_feed_forward(x, up.packed, up.bias, down.packed, down.bias)
    if isinstance(down, LearnedLinear):
        return down(up(x), gelu=True)
    return down(up.gelu(x) if takes_fp8(up, down) else activated(up, x))


def compiled_or_learned(x: Tensor) -> bool:
    """Whether a compiler or autograd has to see what is done with `x`."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)


def heads_of(
    layer: nn.Module,
    x: Tensor | Quantized,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a fused projection: in one kernel where the GPU's table has found that faster, else a product and a pass.

    Compiled code always has the two: what a table says is not for a compiler to trace.
    """
    values, eight_bits = (x.values, True) if isinstance(x, Quantized) else (x, False)
    rest = q_weight, k_weight, cos, sin, heads, eps, rows
    plain = values.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    fits = type(layer) is (Fp8Linear if eight_bits else nn.Linear) and layer.bias is not None
    if plain and fits and named_form(values, layer.weight):
        return qkv_norm_rope(x, layer.weight, layer.scale if eight_bits else None, layer.bias, *rest)
    return qk_norm_rope(layer(x), *rest)


def gated_feed_forward(up: nn.Module, down: nn.Module, x: Tensor | Quantized) -> Tensor:
    """down(silu(g) · u) with [g, u] = up(x), [..., D]."""
    return down(gated_for((down,), up(x)))


def gated_for(linears: tuple[nn.Module, ...], x: Tensor, beside: Tensor | None = None) -> Tensor | Quantized:
    """`gated_activation` for the layers that read it: quantised in the same pass where they are fp8."""
    return (gated_activation_fp8 if takes_fp8(*linears) else gated_activation)(x, beside)


def activated(layer: nn.Module, x: Tensor | Quantized) -> Tensor:
    """GELU of a linear layer, [..., N], in the layer's own pass where it is packed."""
    return layer.gelu(x) if isinstance(layer, (PackedLinear, Int8Linear)) else activate(layer(x))


def quantize_trunk(trunk: nn.Module, kind: type[nn.Module] = Fp8Linear) -> int:
    """Replace the large linear layers of every block (QKV, out, feed-forward) by those of a kind, in place; how many there were.

    The first and last layers keep their precision, because their errors are not averaged over blocks, and so does Wan's
    cross-attention, whose q and out are small beside the rest. FLUX's text stream is quantised like its image stream.
    """
    found = [(part, name) for part in trunk.modules() if part is not trunk for name in LAYERS if name in part._modules]
    for part, name in found:
        setattr(part, name, kind(getattr(part, name)))
    return len(found)


def quantised_as(trunk: Any) -> str | None:
    """The precision that layers of a trunk are quantised to, fp8 or int8; None where there are none, or it is an exported one."""
    kinds = {Fp8Linear: "fp8", Int8Linear: "int8"}
    layers = trunk.modules() if isinstance(trunk, nn.Module) else ()
    return next((kinds[type(layer)] for layer in layers if type(layer) in kinds), None)


def use_fp8_attention(trunk: nn.Module, on: bool = True) -> None:
    """Have every block's self-attention compute in eight bits (`kernels/attention_fp8.py`), or not."""
    for part in trunk.modules():
        if hasattr(part, "fp8_attention"):
            part.fp8_attention = on


def has_fp8_attention(trunk: nn.Module) -> bool:
    """Whether any block's self-attention computes in eight bits."""
    return any(getattr(part, "fp8_attention", False) for part in trunk.modules())


def check_fp8_attention(device: torch.device) -> None:
    """`BackboneError` for a device that does not multiply in eight bits; on a CPU, which emulates it, a warning."""
    if device.type == "cpu":
        warn("a CPU has no fp8 attention: it is emulated, which is slower than attention as it is")
    elif not has_fp8(device):
        raise BackboneError(f"fp8 attention needs a GPU of compute capability 8.9 or newer, which {device} is not; leave it out")


def safer_trunk(trunk: nn.Module) -> nn.Module | None:
    """A copy of a trunk in the next wider precision: what is quantised in the dtype of the rest, or all in float32.

    None for a trunk that is float32 already. The weights' values stay what they were rounded to.
    """
    eight_bits = quantised_as(trunk) or has_fp8_attention(trunk)
    if not eight_bits and all(parameter.dtype == torch.float32 for parameter in trunk.parameters()):
        return None
    wider = copy.deepcopy(trunk)
    if not eight_bits:
        return wider.float()
    use_fp8_attention(wider, False)
    for owner in list(wider.modules()):
        for name, layer in owner.named_children():
            if isinstance(layer, (Fp8Linear, Int8Linear)):
                setattr(owner, name, layer.dense())
    return wider


def trunk_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The trunk's dtype for `auto`, `bf16`, `fp16`, `fp32`, `fp8` or `int8` (what its other layers are in).

    `auto`, and what accompanies fp8 and int8, is bf16 on a GPU and on a CPU with bf16 instructions, float32 elsewhere.
    """
    if precision in ("auto", "fp8", "int8"):
        return torch.bfloat16 if device.type != "cpu" or cpu_has_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def taken_precision(precision: str, device: torch.device) -> str:
    """The precision that takes the place of one that is asked for, where the device has no arithmetic for it; told in a line."""
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        warn("this CPU has no bf16 arithmetic: float32 is taken in its place, faster here, for twice the memory")
        return "fp32"
    if precision == "int8" and device.type != "cpu":
        raise BackboneError("int8 is for CPUs; on a GPU fp8 is as small, and faster")
    if precision == "int8" and not can_int8():
        warn("this CPU or this torch has no int8 products: the layers are not quantised")
        return "auto"
    return precision


def quantised_for(precision: str, device: torch.device) -> str:
    """What fp8 means where files are restored: int8 on a CPU that has its products, which emulates fp8; told in a line."""
    if precision != "fp8" or device.type != "cpu" or not can_int8():
        return precision
    warn("a CPU has no fp8 arithmetic: its layers are int8 here (--precision int8)")
    return "int8"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware: AVX512-BF16 or AMX; elsewhere than on x86, what oneDNN says.

    On x86 oneDNN says so wherever there is AVX-512, which emulates bf16 at less than float32's speed.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


class Int8Linear(nn.Module):
    """A frozen linear layer in int8 on a CPU; its state is that of an ordinary layer of the rounded weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.rounded = Int8Weight(linear.weight)
        self.biased = linear.bias is not None
        self.bias = nn.Parameter(bias_of(linear), requires_grad=False)

    @property
    def bytes(self) -> int:
        """What the rounded weights take, with their scales and the bias."""
        return self.rounded.shape.numel() + self.rounded.scale.nbytes + self.rounded.zeros.nbytes + self.bias.nbytes

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] → [..., N]; `bias` [N] in place of the layer's own."""
        return int8_linear(x, self.rounded, self.bias if bias is None else bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the layer."""
        return int8_linear(x, self.rounded, self.bias, gelu=True)

    def dense(self) -> nn.Linear:
        """An ordinary layer of the rounded weights."""
        linear = nn.Linear(*reversed(self.rounded.shape), self.biased, device="meta")
        linear.weight = nn.Parameter(self.dequantised(), requires_grad=False)
        if self.biased:
            linear.bias = self.bias
        return linear

    def dequantised(self) -> Tensor:
        """The rounded weight [N, K] in the bias's dtype."""
        return self.rounded.dense().to(self.bias.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.dense()._save_to_state_dict(destination, prefix, keep_vars)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Linear":
        return Int8Linear(self.dense())


class PackedLinear(nn.Module):
    """A frozen linear layer; copies of it, and its state, are those of an ordinary one."""

    def __init__(self, linear: nn.Linear, learns: bool = False):
        super().__init__()
        self.packed = PackedWeight(linear.weight, learns)
        self.biased = linear.bias is not None
        self.bias = linear.bias if self.biased else nn.Parameter(bias_of(linear), requires_grad=False)

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
        linear = nn.Linear(inside, out, self.biased, device="meta")
        linear.weight = nn.Parameter(self.packed.dense(), requires_grad=False)
        if self.biased:
            linear.bias = self.bias
        return linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.dense()._save_to_state_dict(destination, prefix, keep_vars)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        return self.dense()


def pack_trunk(trunk: nn.Module, learns: bool = False) -> int:
    """Replace the linear layers of every block by packed ones, in place, where it pays on this CPU; how many there were.

    A layer's old weight is dropped before the next one is packed. `learns`: gradients pass through them at the same speed, for
    twice the memory.
    """
    layers = [(owner, name) for owner in trunk.modules() for name, layer in owner.named_children() if type(layer) is nn.Linear]
    layers = [(owner, name) for owner, name in layers if owner is not trunk and can_pack(getattr(owner, name).weight.dtype)]
    layers = [(owner, name) for owner, name in layers if packing_pays(getattr(owner, name).weight)]
    for owner, name in layers:
        setattr(owner, name, PackedLinear(getattr(owner, name), learns))
    return len(layers)


def unpack_trunk(trunk: nn.Module) -> None:
    """Put ordinary layers back in place of packed ones."""
    for owner in list(trunk.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, PackedLinear):
                setattr(owner, name, layer.dense())


class LearnedLinear(nn.Linear):
    """An ordinary linear layer, but where its weight is learned under a CPU's autocast to bf16: `kernels/learned_linear.py`."""

    def forward(self, x: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """[..., K] → [..., N]; `gelu`: of GELU(x)."""
        bias = self.bias if bias is None else bias
        if x.is_cpu and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            return learned_linear(x, self.weight, bias, gelu)
        return F.linear(activate(x) if gelu else x, self.weight, bias)


def linear_with(layer: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """A linear layer with another bias, [..., K] → [..., N]."""
    return layer(x, bias) if isinstance(layer, (PackedLinear, LearnedLinear)) else F.linear(x, layer.weight, bias)


def normed_for(linears: tuple[nn.Module, ...], x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | Quantized:
    """`layer_norm_modulate` for the layers that read it: quantised in the same pass where they are fp8."""
    norm = layer_norm_modulate_fp8 if takes_fp8(*linears) else layer_norm_modulate
    return norm(x, weight, bias, eps)


def residual_normed_for(
    linears: tuple[nn.Module, ...], x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Any]:
    """`gated_residual_norm` for the layers that read the norm: quantised in the same pass where they are fp8."""
    norm = gated_residual_norm_fp8 if takes_fp8(*linears) else gated_residual_norm
    return norm(x, y, gate, weight, bias, eps)
