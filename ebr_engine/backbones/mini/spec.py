"""What the engine has to know of `mini`, the backbone in the package."""

from pathlib import Path

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone, Codec, CodecCosts, Learning, ModelSource, Spec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import CODECS, MINI, WEIGHTS, load_mini
from ebr_engine.backbones.wan.live import LiveWan
from ebr_engine.backbones.wan.model import WanConditioner, WanConditioning, WanConfig, WanTrunk
from ebr_engine.backbones.wan.spec import TOKEN_BYTES, run_flop
from ebr_engine.bridge.schedules import FAST_STEPS


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The bundled backbone, or that of a file which `save_mini` wrote; the trunk in `dtype` on `device`."""
    mini = load_mini(Path(source.model or WEIGHTS), device=device, dtype=dtype)
    text = {"context": mini.context}
    return Backbone(SPEC, mini.conditioner, mini.trunk, mini.codec.to(device), text, device, dtype, "mini")


def codec_of(mean: Tensor, scale: Tensor) -> Codec:
    """The codec whose channels have these statistics."""
    return CODECS[len(mean)](mean, scale)


SPEC = Spec(
    name="mini",
    title="mini",
    injection="dual",
    configs={"mini": MINI},
    config=WanConfig,
    conditioner=WanConditioner,
    trunk=WanTrunk,
    conditioning=WanConditioning,
    codec=codec_of,
    live=LiveWan,
    load=load,
    takes=("model", "offline"),
    tile=512,
    whole=1.5,  # measured on a CPU: there one piece takes 0.8 to 1.3 times what tiles do
    chunk=(4, 0),
    small_side=512,
    window=3,  # measured: `python -m benchmarks.quality clips`
    moves=True,
    mix="turn",  # measured to restore more
    licences={"mini": "Apache-2.0"},
    ran="its weights on CPUs",
    learning=Learning(losses=("pixel", "x0", "velocity"), scenes=True, steps=FAST_STEPS, course="ebr_engine.training.pretrain"),
    token_bytes=TOKEN_BYTES,
    codec_costs=CodecCosts(24, 12, LappedCodec.spatial, 1),
    flop=run_flop,
)
