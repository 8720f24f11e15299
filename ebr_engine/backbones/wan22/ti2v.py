"""What the engine has to know of Wan 2.2 TI2V-5B: Wan 2.1's transformer over a VAE whose cells span 16 × 16 pixels.

It can be told a time for every token, so that a clip goes on from a picture. Here all tokens are at one time, and its tables are
those of Wan 2.1: a row of modulations a step.
"""

from dataclasses import replace
from functools import partial

from ebr_engine.backbones.base import CodecCosts, Learning
from ebr_engine.backbones.pretrained import load_pretrained
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.backbones.wan.spec import SPEC as WAN
from ebr_engine.backbones.wan.weights import wan_sizes
from ebr_engine.backbones.wan22.codec import Wan22Codec

CHANNELS = 48

SPEC = replace(
    WAN,
    name="wan22-5b",
    title="Wan 2.2 5B",
    configs={"wan22-5b": WanConfig((1, 2, 2), 24, in_channels=CHANNELS, out_channels=CHANNELS, ffn_dim=14336, num_layers=30)},
    codec=Wan22Codec,
    load=partial(load_pretrained, "wan22-5b"),
    checkpoints=replace(
        WAN.checkpoints,
        default="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        sizes=partial(wan_sizes, kind="ti2v"),
        marks=("expand_timesteps",),
    ),
    tile=1280,
    overlap=128,
    released_size=None,
    released_timesteps=None,
    published_prompts="",
    licences={"wan22-5b": "Apache-2.0"},
    ran="random weights on a CPU: tiny, and its widths in two blocks",
    learning=Learning({**WAN.learning.defaults, "size": (704, 1280)}, steps=WAN.learning.steps),
    codec_costs=CodecCosts(9, 23, 16, 4, Wan22Codec.whole_area, Wan22Codec.default_tile, 256, 704_688_668),
)
