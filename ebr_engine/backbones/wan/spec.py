"""What the engine has to know of Wan 2.1."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ebr_engine.backbones.base import PUBLISHED_PROMPTS, Checkpoints, CodecCosts, Encoder, Learning, Spec
from ebr_engine.backbones.pretrained import load_pretrained
from ebr_engine.backbones.wan.codec import WanCodec
from ebr_engine.backbones.wan.live import LiveWan
from ebr_engine.backbones.wan.model import WanConditioner, WanConditioning, WanConfig, WanStep, WanTrunk
from ebr_engine.backbones.wan.weights import ORIGINAL, load_wan, wan_sizes
from ebr_engine.bridge.schedules import RELEASED_STEPS

TOKEN_BYTES = {
    ("cpu", "fp32"): ((44, 0), (20, 8)),
    ("cpu", "bf16"): ((30, 0), (10, 4)),
    ("cpu", "fp8"): ((41, 0), (10, 12)),
    ("cuda", "bf16"): ((20, 0), (10, 4)),
    ("cuda", "fp8"): ((20, 0), (10, 3)),
}


def released_timesteps(times: tuple[float, ...]) -> Tensor:
    """What the released code feeds the transformer at each evaluation of `times` (the last, 0, is not fed), [N] float32.

    It takes the nearest entry of a 1000-entry scheduler table: sigmas 0.000999·k, timesteps floor(0.999·k): 399, 378, … 20, 0.
    """
    t = torch.tensor(times[:-1], dtype=torch.float64)
    return ((t / 0.000999).round().clamp(min=1) * 0.999).floor().float()


def run_flop(config: WanConfig, shape: Sequence[int], step: WanStep) -> int:
    """Floating-point operations of one run of the trunk on a latent of `shape` [B, C, F, H, W] with `step`'s tables."""
    batch, _, *size = shape
    tokens = torch.Size(size).numel() // config.patch_volume
    prompts, rows = step.prompt_key.shape[1], step.prompt_key.shape[3]
    return batch * trunk_flop(config, tokens, step.text_key.shape[3] + prompts * rows)


def trunk_flop(config: WanConfig, tokens: int, context: int) -> int:
    """Linear layers and attention of one sample, a multiply-add as two; `context`: rows that cross-attention reads."""
    width, volume = config.width, config.patch_volume
    ends = volume * (config.in_channels + config.out_channels) * width
    linears = 6 * width**2 + 2 * width * config.ffn_dim  # QKV, out; cross q and out; up and down
    attention = 2 * (tokens + context) * width  # scores and values, a number each
    return 2 * tokens * (ends + config.num_layers * (linears + attention))


SPEC = Spec(
    name="wan",
    title="Wan",
    injection="dual",
    configs={
        "wan-1.3b": WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        "wan-14b": WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    },
    config=WanConfig,
    conditioner=WanConditioner,
    trunk=WanTrunk,
    conditioning=WanConditioning,
    codec=WanCodec,
    live=LiveWan,
    load=partial(load_pretrained, "wan"),
    checkpoints=Checkpoints(
        default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        transformer="WanTransformer3DModel",
        layouts={r"blocks\.\d+\.attn1\.": False, r"blocks\.\d+\.self_attn\.": True},
        original=ORIGINAL,
        sizes=wan_sizes,
        load=load_wan,
        text_encoders=(Encoder("context", "UMT5EncoderModel", "AutoTokenizer", ("umt5",), 226, 1, masked=True),),
    ),
    tile=832,
    chunk=(33, 8),
    knows_time=True,
    released_size=(480, 832),
    released_timesteps=released_timesteps,
    published_prompts=PUBLISHED_PROMPTS,
    licences=dict.fromkeys(("wan-1.3b", "wan-14b"), "Apache-2.0"),
    ran="random weights on a CPU: 1.3B whole",
    learning=Learning(
        {"tokens": 226, "size": (480, 832), "frames": 33, "batch": 1, "loss": "velocity", "learning_rate": 0.003},
        steps=RELEASED_STEPS,
    ),
    token_bytes=TOKEN_BYTES,
    codec_costs=CodecCosts(50, 56, 8, 4, WanCodec.whole_area, WanCodec.default_tile, 96, 126_892_531, 0.5),
    flop=run_flop,
)
