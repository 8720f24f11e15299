"""Named configurations of the backbones."""

from ebr_engine.backbones.flux.model import FluxConfig
from ebr_engine.backbones.mini.model import MINI
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.errors import BackboneError

CONFIGS: dict[str, WanConfig | FluxConfig] = {
    "mini": MINI,
    "wan-1.3b": WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "wan-14b": WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    "flux-dev": FluxConfig(guidance_embeds=True),
    "flux-schnell": FluxConfig(),
}


def named_config(name: str) -> WanConfig | FluxConfig:
    """The configuration of a name; `BackboneError` lists the names there are."""
    if name not in CONFIGS:
        raise BackboneError(f"unknown configuration {name!r}; there is: {', '.join(CONFIGS)}")
    return CONFIGS[name]
