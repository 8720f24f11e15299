"""What operations are run at: the sizes of models, and random tensors of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline import workload
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.kernels.quantize_fp8 import quantize_fp8_ref

MODELS = ("wan-1.3b", "flux-dev", "wan-14b")


# Channels of a codec's features, how many times the latent's pixels they are, and of how many frames at once.
CODEC_WIDTHS = {
    "wan": ((96, 64, 4), (192, 16, 4), (384, 4, 2), (384, 1, 1)),
    "flux": ((128, 64, 1), (256, 16, 1), (512, 4, 1), (512, 1, 1)),
}


@dataclass(frozen=True)
class Sizes:
    """What a model's operations are run at; `per_head` is FLUX's form of the q and k norm, whose text rows get prompt rows."""

    name: str
    width: int
    heads: int
    ffn: int
    tokens: int
    text: int
    per_head: bool
    batch: int = 1

    @property
    def head(self) -> int:
        return self.width // self.heads


# An odd number of everything, so that no kernel is only right where nothing is masked; and a small even one.
ODD = Sizes("odd", 60, 3, 100, 37, 7, False, batch=2)
SMALL = Sizes("small", 128, 2, 256, 64, 16, True)


def sizes(model: str, tokens: int | None = None, batch: int = 1) -> Sizes:
    """A model's sizes at its released resolution, or with another number of tokens."""
    work = workload(model)
    config, flux = work.config, not isinstance(work.config, WanConfig)
    ffn = config.hidden
    joint = work.tokens + (work.text if flux else 0)
    text = min(work.text, tokens or work.text) if flux else work.text
    return Sizes(model, config.width, config.num_attention_heads, ffn, tokens or joint, text, flux, batch)


def layers(s: Sizes) -> dict[str, tuple[int, int]]:
    """The linear layers of a block that run in fp8: inputs and outputs of each."""
    found = {"qkv": (s.width, 3 * s.width), "out": (s.width, s.width), "up": (s.width, s.ffn), "down": (s.ffn, s.width)}
    return found | ({"single out": (s.width + s.ffn, s.width)} if s.per_head else {})


def persistent(device: torch.device) -> bool:
    """Whether a device has the persistent forms to be compared: Hopper and Blackwell's data centre parts, and in rehearsals."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


class Draw:
    """Random tensors on a device, never zeros."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def wide(self, *shape: int, around: float = 0.0, scale: float = 1.0) -> Tensor:
        """A table: float32 in every precision but float64."""
        return torch.randn(shape, device=self.device) * scale + around


def linear_inputs(rows: int, inputs: int, outputs: int, draw: Draw) -> dict[str, Any]:
    """Quantised activations, a quantised weight, and a bias."""
    x, weight = draw(rows, inputs), draw(outputs, inputs, scale=inputs**-0.5)
    (values, scale), (weight, weight_scale) = map(quantize_fp8_ref, (x, weight))
    return {"values": values, "scale": scale, "weight": weight, "weight_scale": weight_scale, "bias": draw(outputs)}
