"""fp8 linear layers in a trunk."""

import torch
from torch import Tensor, nn

from ebr_engine.kernels.quantize_fp8 import quantize_fp8
from ebr_engine.kernels.scaled_linear import scaled_linear


class Fp8Linear(nn.Module):
    """A frozen linear layer with an e4m3 weight scaled by output channel; activations are quantised by token."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize_fp8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in `x.dtype`."""
        return scaled_linear(x, self.weight, self.scale, self.bias)


def quantize_trunk(trunk: nn.Module) -> int:
    """Replace the large linear layers of every block (QKV, out, feed-forward) by fp8 ones, in place; how many there were.

    The first and last layers, and cross-attention's small q and out, keep their precision.
    """
    count = 0
    for block in trunk.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, Fp8Linear(getattr(block, name)))
            count += 1
    return count


def trunk_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The trunk's dtype for `auto`, `bf16`, `fp32` or `fp8` (its unquantised layers are bf16).

    `auto` is bf16 on a GPU and on a CPU with bf16 instructions, float32 elsewhere.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type != "cpu" or cpu_has_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}[precision]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)
