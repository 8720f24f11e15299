"""What the engine has to know of FLUX.1."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ebr_engine.backbones.base import PUBLISHED_PROMPTS, Checkpoints, CodecCosts, Encoder, Learning, Spec
from ebr_engine.backbones.flux.codec import FluxCodec
from ebr_engine.backbones.flux.conditioning import FluxConditioning, FluxStep
from ebr_engine.backbones.flux.config import MLP_RATIO, PACK, FluxConfig
from ebr_engine.backbones.flux.live import LiveFlux
from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.flux.weights import ORIGINAL, flux_sizes, load_flux
from ebr_engine.backbones.pretrained import load_pretrained
from ebr_engine.bridge.schedules import RELEASED_STEPS

TEXT_ROWS = 512  # of the empty text
TOKEN_BYTES = {
    ("cpu", "fp32"): ((72, 0),),
    ("cpu", "bf16"): ((56, 0),),
    ("cpu", "fp8"): ((80, 0),),
    ("cuda", "bf16"): ((26, 0), (10, 4)),
    ("cuda", "fp8"): ((26, 0), (10, 3)),
}


def released_timesteps(times: tuple[float, ...]) -> Tensor:
    """What the released code feeds the transformer at each evaluation of `times` (the last, 0, is not fed), [N] float32.

    It takes the nearest entry of a 1000-entry scheduler table: sigmas k/1000, timesteps k: 400, 379, … 21, 1 (diffusers' class
    is given a thousandth).
    """
    return (torch.tensor(times[:-1], dtype=torch.float64) * 1000).round().clamp(min=1).float()


def run_flop(config: FluxConfig, shape: Sequence[int], step: FluxStep) -> int:
    """Floating-point operations of one run of the trunk on a latent of `shape` [B, C, F, H, W] with `step`'s tables.

    Linear layers and attention, a multiply-add as two; either kind of block has as many.
    """
    batch, _, frames, height, width = shape
    tokens = math.prod((height, width)) // PACK**2
    joint = tokens + step.text_rows
    linears = (4 + 2 * MLP_RATIO) * config.width**2  # QKV, out, up and down
    attention = 2 * joint * config.width  # scores and values
    ends = 2 * config.in_channels * config.width
    return 2 * batch * frames * (tokens * ends + config.blocks * joint * (linears + attention))


SPEC = Spec(
    name="flux",
    title="FLUX",
    injection="add",
    configs={"flux-dev": FluxConfig(guidance_embeds=True), "flux-schnell": FluxConfig()},
    config=FluxConfig,
    conditioner=FluxConditioner,
    trunk=FluxTrunk,
    conditioning=FluxConditioning,
    codec=FluxCodec,
    live=LiveFlux,
    load=partial(load_pretrained, "flux"),
    checkpoints=Checkpoints(
        default="black-forest-labs/FLUX.1-dev",
        transformer="FluxTransformer2DModel",
        layouts={
            r"(transformer_blocks\.\d+\.norm1\.linear|single_transformer_blocks\.\d+\.proj_mlp)\.": False,
            r"(double_blocks\.\d+\.img_mod|single_blocks\.\d+\.modulation)\.": True,
        },
        original=ORIGINAL,
        sizes=flux_sizes,
        load=load_flux,
        text_encoders=(
            Encoder("pooled", "CLIPTextModel", "CLIPTokenizer", ("clip_text_model", "clip"), 77, 2),
            Encoder("context", "T5EncoderModel", "T5TokenizerFast", ("t5",), TEXT_ROWS, 1),
        ),
    ),
    tile=1024,
    small_side=1024,
    asks_for_frames=True,
    released_size=(1024, 1024),
    released_timesteps=released_timesteps,
    published_prompts=PUBLISHED_PROMPTS,
    licences={"flux-dev": "FLUX.1 [dev] Non-Commercial", "flux-schnell": "Apache-2.0"},
    ran="random weights on a CPU: the widths of dev, four blocks",
    learning=Learning(
        {"tokens": 512, "size": (1024, 1024), "batch": 1, "loss": "velocity", "learning_rate": 0.003}, steps=RELEASED_STEPS
    ),
    conditioner_dtype=torch.bfloat16,  # as it is stored, which is taken to be as released
    token_bytes=TOKEN_BYTES,
    text_rows=TEXT_ROWS,
    codec_costs=CodecCosts(5, 8, 8, 1, FluxCodec.whole_area, FluxCodec.default_tile, 128, 83_819_683),
    flop=run_flop,
)
