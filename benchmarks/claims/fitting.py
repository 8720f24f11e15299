"""Learning of anything by the bridge's objective: for what the engine's learner has no setting for.

The objective, the draws of times and the schedule of the learning rate are those of `ebr_engine.training.learner`, the loss is
that of the clean estimate in pixels.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.claims.common import Degrade, Learning
from ebr_engine.backbones.mini.codec import PixelCodec
from ebr_engine.bridge.process import training_state
from ebr_engine.training.scenes import ScenePool

T_MIN = 1e-4
RATE = 0.03
WARMUP = 10
Velocity = Callable[[Tensor, Tensor], Tensor]  # of states [B, ...] at times [B]


def pairs(pool: ScenePool, learning: Learning, how: Degrade, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of clean and degraded crops [B, 3, h, w]."""
    clean, depth, _ = pool.crops(learning.batch, learning.size, generator)
    return clean, how(clean, generator, depth)


def fit(
    parameters: Sequence[Tensor],
    velocity: Velocity,
    codec: PixelCodec,
    pool: ScenePool,
    how: Degrade,
    learning: Learning,
    seed: int,
    rate: float = RATE,
) -> float:
    """Move `parameters` by Adam so that the clean estimate of `velocity` comes near the clean crop; returns the seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    started = time.monotonic()
    for iteration in range(learning.iterations):
        clean, degraded = (codec.encode(x.unsqueeze(2)) for x in pairs(pool, learning, how, generator))
        t = T_MIN + (learning.t0 - T_MIN) * torch.rand(len(clean), generator=generator) ** learning.power
        noise = torch.randn(clean.shape, generator=generator)
        state, target = training_state(clean, degraded, noise, t, learning.t0)
        error = (velocity(state, t) - target) * t.view(-1, 1, 1, 1, 1) * codec.scale.view(1, -1, 1, 1, 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(iteration, learning.iterations)
        error.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - started


def rate_factor(iteration: int, iterations: int) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    return min(1.0, (iteration + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * iteration / iterations)))
