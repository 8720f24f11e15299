"""Restoring along any step table, with any velocity, as the engine restores: the grid of tokens moves, detail keeps its level."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.common import Study
from ebr_engine.backbones.views import seen, spun, views
from ebr_engine.bridge.sampler import StepTable, Velocity, draw_noise, sample

SEED = 42
Sampler = Callable[[Velocity, Sequence[Any], Tensor, Tensor], Tensor]  # velocity, conditioning, degraded latent, noise


@torch.no_grad()
def restored_by(study: Study, picture: Tensor, steps: Sequence[Any], times: Sequence[float], sampler: Sampler) -> Tensor:
    """A picture [1, 3, H, W] by a sampler, which gets full noise; `steps`: what the transformer takes at each of `times`."""
    backbone = study.restorer.backbone
    degraded = backbone.codec.encode(picture.unsqueeze(2).to(backbone.device))
    sights = views(backbone, times)
    velocity = spun(backbone.velocity, backbone.codec, degraded) if sights else backbone.velocity
    noise = draw_noise(degraded.shape, SEED, backbone.device)
    found = sampler(velocity, seen(steps, sights), degraded, noise)
    return backbone.codec.decode(found).squeeze(2).clamp(0, 1).cpu()


def along(table: StepTable, level: float) -> Sampler:
    """The bridge's sampler along a step table; `level`: of its noise, 1 for the paper's."""
    return lambda velocity, steps, degraded, noise: sample(velocity, steps, degraded, level * noise, table)
