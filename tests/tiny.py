"""A backbone of mini's kind, tiny and of random numbers, and prompts and pictures for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux2.model import Flux2Config
from ebr_engine.backbones.mini.codec import PixelCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import save_mini
from ebr_engine.backbones.mini_audio.codec import HOP, SoundCodec
from ebr_engine.backbones.mini_audio.model import save_mini_audio
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.pretrainee import Pretrainee, finished

TINY = WanConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=192,
    out_channels=192,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)

TINY_FLUX = FluxConfig(
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=10,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 4, 4),
)

TINY_FLUX2 = Flux2Config(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=10,
    timestep_guidance_channels=16,
    axes_dims_rope=(2, 4, 4, 2),
)


def save_tiny(path: Path, gain: float = 3, time: float = 0.1, codec: LappedCodec | None = None, **sizes: Any) -> Path:
    """Write a backbone whose every part has a say in the result; returns its path.

    `gain`: of the output layer. `time`: standard deviation of the layer that makes the modulation of time; 0 leaves it as
    pre-training begins with it. `sizes`: other than TINY's.
    """
    torch.manual_seed(1)
    model = Pretrainee(replace(TINY, **sizes))
    with torch.no_grad():
        model.trunk.patch_out.weight.mul_(gain)
        if time:
            model.conditioner.time_proj.weight.normal_(std=time)
    save_mini(path, finished(model, dict(model.named_parameters()), codec or LappedCodec(), {}))
    return path


def save_tiny_audio(path: Path, per_token: bool = False) -> Path:
    """Write a backbone of mini-audio's kind, as `save_tiny` does; `per_token`: whose tokens do not see each other."""
    torch.manual_seed(1)
    model = Pretrainee(replace(TINY, in_channels=SoundCodec.channels, out_channels=SoundCodec.channels))
    with torch.no_grad():
        model.trunk.patch_out.weight.mul_(3)
        model.conditioner.time_proj.weight.normal_(std=0.1)
        for block in model.trunk.blocks if per_token else ():
            block.out.weight.zero_()
    save_mini_audio(path, finished(model, dict(model.named_parameters()), SoundCodec(scale=torch.full((HOP,), 0.1)), {}))
    return path


def save_blocks(path: Path, codec: PixelCodec | None = None) -> Path:
    """The same over the block codec, which weights of the file's first format have."""
    return save_tiny(path, codec=codec or PixelCodec(), patch_size=(1, 2, 2), in_channels=48, out_channels=48)


def make_prompt(seed=0, tokens=4, width=TINY.width, blocks=TINY.num_layers, backbone="mini", t0=0.2, **more) -> Prompt:
    """A prompt of random numbers."""
    residual = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return Prompt(residual, torch.full((blocks,), 0.7), backbone, task="haze", t0=t0, **more)


def picture(height=24, width=40, batch=1, seed=5) -> Tensor:
    """[B, 3, H, W] float32 away from black and white, so that little of a result is clipped."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 0.4 + 0.3
