"""The fixed-step sampler: a function over tables."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebr_engine.bridge import StepTable, start_state
from ebr_engine.kernels.bridge_step import bridge_step

Velocity = Callable[[Tensor, Any], Tensor]
Callback = Callable[[int, int], None]


@torch.no_grad()
def sample(
    trunk: Velocity,
    conditioning: Sequence[Any],
    degraded: Tensor,
    noise: Tensor,
    steps_table: StepTable,
    callback: Callback | None = None,
) -> Tensor:
    """Carry a degraded latent to the clean one.

    Args: `trunk(state, conditioning[i])` gives the velocity at step i; `degraded` and `noise` [B, C, ...] of one shape;
    `callback(done, total)` is called after each evaluation.
    Returns: the restored latent, float32, on `degraded`'s device. The state is float32 throughout; nothing is random.
    Raises ValueError when the conditioning has another number of steps than the table. Source: arXiv 2604.10983.
    """
    total = len(steps_table)
    if len(conditioning) != total:
        raise ValueError(f"the conditioning has {len(conditioning)} steps, the step table {total}")
    degraded = degraded.float()
    coefficients = steps_table.coefficients.to(degraded.device)
    state = start_state(degraded, noise.to(degraded), steps_table.t0)
    before = None
    for i in range(total):
        velocity = trunk(state, conditioning[i]).float()
        t = steps_table.times[i]
        needs_slope = bool((steps_table.coefficients[i : i + 2, 3] != 0).any())
        clean = state - t * velocity if needs_slope else None
        state = bridge_step(state, velocity, degraded, coefficients[i, :3])
        if steps_table.coefficients[i, 3] != 0:
            state = state + coefficients[i, 3] * (clean - before)
        before = clean
        if callback is not None:
            callback(i + 1, total)
    return state


def draw_noise(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise [B, ...] float32, drawn on the CPU so that a seed means one thing everywhere.

    Every sample of the batch gets the same noise, so that a picture's result does not depend on its place in a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape[1:]), generator=generator).to(device).expand(*shape)


def mean_velocity(trunk: Velocity) -> Velocity:
    """The released mixing of several prompts: the mean of their velocities, one trunk run each; steps come as tuples."""

    def velocity(state: Tensor, steps: Sequence[Any]) -> Tensor:
        return torch.stack([trunk(state, step) for step in steps]).mean(0)

    return velocity
