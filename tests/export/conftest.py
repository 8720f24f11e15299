"""Tiny trunks of random numbers, and steps of tables for them."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ebr_engine.backbones.flux.conditioning import FluxStep
from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.model import FluxTrunk
from ebr_engine.backbones.flux2.model import Flux2Config
from ebr_engine.backbones.wan.model import WanConfig, WanStep, WanTrunk

WAN = WanConfig((1, 2, 2), 2, 12, 16, 16, text_dim=20, freq_dim=16, ffn_dim=40, num_layers=1)
FLUX = FluxConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=12,
    num_attention_heads=2,
    guidance_embeds=True,
    axes_dims_rope=(4, 4, 4),
)
FLUX2 = Flux2Config(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    axes_dims_rope=(2, 4, 4, 2),
)
TEXT_ROWS, PROMPT_ROWS, PROMPTS = 7, 5, 2


@dataclass(frozen=True)
class Tiny:
    """A trunk, and what it takes."""

    trunk: nn.Module

    def step(self, seed: int) -> WanStep | FluxStep:
        """Random tables of one step, of the same shapes for every seed; keys, values and text in the trunk's dtype."""
        torch.manual_seed(seed)
        dtype, width = next(p.dtype for p in self.trunk.parameters()), self.trunk.config.width
        if isinstance(self.trunk, FluxTrunk):
            doubles, singles = self.trunk.config.num_layers, self.trunk.config.num_single_layers
            shared = isinstance(self.trunk.config, Flux2Config)
            kept = (1, 1) if shared else (doubles, singles)
            modulations = torch.randn(1, kept[0], 2, 6, width), torch.randn(1, kept[1], 3, width), torch.randn(1, 2, width)
            rows = (torch.randn(n, PROMPT_ROWS, 3 * width).to(dtype) for n in (doubles, singles))
            return FluxStep(*modulations, torch.randn(TEXT_ROWS, width).to(dtype), *rows)
        blocks, heads, dim = WAN.num_layers, WAN.num_attention_heads, WAN.attention_head_dim
        text = (torch.randn(blocks, 1, heads, 2, dim).to(dtype) for _ in range(2))
        # As the conditioner leaves them: heads are not where memory has them.
        prompt = (torch.randn(blocks, PROMPTS, PROMPT_ROWS, heads, dim).to(dtype).transpose(2, 3) for _ in range(2))
        weights = torch.tensor([1.0, 225.0]).log(), *prompt, torch.rand(blocks, PROMPTS)
        return WanStep(torch.randn(1, blocks, 6, width), torch.randn(1, 2, width), *text, *weights)

    def latent(self, height: int, width: int, frames: int = 1, batch: int = 1) -> Tensor:
        """A random latent."""
        return torch.randn(batch, 16, frames, height, width)


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """A trunk of `kind` (wan, flux, flux2)."""
    torch.manual_seed(0)
    trunk = WanTrunk(WAN) if kind == "wan" else FluxTrunk(FLUX if kind == "flux" else FLUX2)
    return Tiny(trunk.requires_grad_(False).to(dtype).eval())


@pytest.fixture(scope="session")
def make_tiny():
    return tiny
