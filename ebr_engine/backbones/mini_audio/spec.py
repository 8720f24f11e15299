"""What the engine has to know of `mini-audio`, the backbone for sound in the package."""

from pathlib import Path

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone, Codec, CodecCosts, Learning, ModelSource, Spec
from ebr_engine.backbones.mini_audio.codec import BANDS, SoundCodec
from ebr_engine.backbones.mini_audio.model import MINI_AUDIO, WEIGHTS, load_mini_audio
from ebr_engine.backbones.wan.live import LiveWan
from ebr_engine.backbones.wan.model import WanConditioner, WanConditioning, WanConfig, WanTrunk
from ebr_engine.backbones.wan.spec import TOKEN_BYTES, run_flop
from ebr_engine.bridge.schedules import FAST_STEPS
from ebr_engine.media.sound.degradations import TASKS


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The bundled backbone, or that of a file which `train-backbone mini-audio` wrote; the trunk in `dtype` on `device`."""
    mini = load_mini_audio(Path(source.model or WEIGHTS), device=device, dtype=dtype)
    text = {"context": mini.context}
    return Backbone(SPEC, mini.conditioner, mini.trunk, mini.codec.to(device), text, device, dtype, "mini-audio")


def codec_of(mean: Tensor, scale: Tensor) -> Codec:
    """The codec whose coefficients have these statistics."""
    return SoundCodec(mean, scale)


SPEC = Spec(
    name="mini-audio",
    title="mini-audio",
    injection="dual",
    configs={"mini-audio": MINI_AUDIO},
    config=WanConfig,
    conditioner=WanConditioner,
    trunk=WanTrunk,
    conditioning=WanConditioning,
    codec=codec_of,
    live=LiveWan,
    load=load,
    takes=("model", "offline"),
    colours=SoundCodec.channels,
    bounds=None,
    side=(BANDS, 1),
    tasks=TASKS,
    chunk=(256, 32),
    knows_time=True,
    mix="turn",
    licences={"mini-audio": "Apache-2.0"},
    ran="its weights on CPUs",
    learning=Learning(
        {"tokens": 16, "frames": 128, "batch": 16},
        losses=("pixel", "x0", "velocity"),
        scenes=True,
        steps=FAST_STEPS,
        course="ebr_engine.training.pretrain_sound",
    ),
    token_bytes=TOKEN_BYTES,
    codec_costs=CodecCosts(1536, 2048, 1, 1),
    flop=run_flop,
)
