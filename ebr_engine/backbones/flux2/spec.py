"""What the engine has to know of FLUX.2."""

import math
from collections.abc import Sequence
from functools import partial

import torch

from ebr_engine.backbones.base import Checkpoints, CodecCosts, Encoder, Learning, Spec
from ebr_engine.backbones.flux.conditioning import FluxConditioning, FluxStep
from ebr_engine.backbones.flux.live import LiveFlux
from ebr_engine.backbones.flux.model import FluxTrunk
from ebr_engine.backbones.flux2.codec import Flux2Codec
from ebr_engine.backbones.flux2.model import Flux2Conditioner, Flux2Config
from ebr_engine.backbones.flux2.weights import ORIGINAL, flux2_sizes, load_flux2
from ebr_engine.backbones.pretrained import load_pretrained

TEXT_ROWS = 512  # of the empty text
# What dev's text encoder was told in training, and so is here: github.com/black-forest-labs/flux2, system_messages.py.
DEV_SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, "
    "object\nattribution and actions without speculation."
)
TOKEN_BYTES = {
    ("cpu", "fp32"): ((72, 0), (16, 16)),
    ("cpu", "bf16"): ((56, 0), (10, 20)),  # the gate is computed in float32 there
    ("cpu", "fp8"): ((80, 0), (10, 20)),
    ("cuda", "bf16"): ((26, 0), (8, 6)),
    ("cuda", "fp8"): ((26, 0), (6, 5)),
}


def said(role: str, words: str) -> dict:
    """A message of a chat as Mistral's template takes it."""
    return {"role": role, "content": [{"type": "text", "text": words}]}


KLEIN_ENCODER = Encoder(
    "context",
    "Qwen3Model",
    "AutoTokenizer",
    ("qwen3",),
    TEXT_ROWS,
    12,
    layers=(9, 18, 27),
    chat=({"role": "user", "content": ""},),
    template={"add_generation_prompt": True, "enable_thinking": False},
    instead=Encoder(
        "context",
        "Mistral3ForConditionalGeneration",
        "AutoTokenizer",
        ("mistral3",),
        TEXT_ROWS,
        None,
        layers=(10, 20, 30),
        chat=(said("system", DEV_SYSTEM_MESSAGE), said("user", "")),
    ),
)


def run_flop(config: Flux2Config, shape: Sequence[int], step: FluxStep) -> int:
    """Floating-point operations of one run of the trunk on a latent of `shape` [B, C, F, H, W] with `step`'s tables.

    Linear layers and attention, a multiply-add as two; either kind of block has as many.
    """
    batch, _, frames, height, width = shape
    tokens = math.prod((height, width))
    joint = tokens + step.text_rows
    linears = 4 * config.width**2 + 3 * config.width * config.hidden  # QKV and out; both parts of up, and down
    attention = 2 * joint * config.width  # scores and values
    ends = 2 * config.in_channels * config.width
    return 2 * batch * frames * (tokens * ends + config.blocks * joint * (linears + attention))


SPEC = Spec(
    name="flux2",
    title="FLUX.2",
    injection="add",
    configs={
        "flux2-klein-4b": Flux2Config(),
        "flux2-klein-9b": Flux2Config(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
        "flux2-dev": Flux2Config(
            num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360, guidance_embeds=True
        ),
    },
    config=Flux2Config,
    conditioner=Flux2Conditioner,
    trunk=FluxTrunk,
    conditioning=FluxConditioning,
    codec=Flux2Codec,
    live=LiveFlux,
    load=partial(load_pretrained, "flux2"),
    checkpoints=Checkpoints(
        default="black-forest-labs/FLUX.2-klein-base-4B",
        transformer="Flux2Transformer2DModel",
        layouts={
            r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj\.": False,
            r"single_stream_modulation\.lin\.": True,
        },
        original=ORIGINAL,
        sizes=flux2_sizes,
        load=load_flux2,
        text_encoders=(KLEIN_ENCODER,),
        distilled=r"klein-(?!base)",
    ),
    tile=1024,
    small_side=1024,
    asks_for_frames=True,
    licences={
        "flux2-klein-4b": "Apache-2.0",
        "flux2-klein-9b": "FLUX Non-Commercial",
        "flux2-dev": "FLUX.2 [dev] Non-Commercial",
    },
    ran="random weights on a CPU: tiny, and the widths of klein 4B in three blocks",
    learning=Learning({"tokens": 512, "size": (1024, 1024), "batch": 1, "loss": "velocity", "learning_rate": 0.003}),
    conditioner_dtype=torch.bfloat16,  # as it is stored
    token_bytes=TOKEN_BYTES,
    text_rows=TEXT_ROWS,
    codec_costs=CodecCosts(5, 8, 16, 1, Flux2Codec.whole_area, Flux2Codec.default_tile, 128, 84_046_115),
    flop=run_flop,
)
