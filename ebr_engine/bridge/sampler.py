"""The fixed-step sampler: a function over tables.

Which of a step's numbers are zero is known on the host before the run, and the numbers themselves lie on the device: a run
launches work and waits for nothing, so that a CUDA graph can hold all of it (`graphs.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebr_engine.bridge.process import start_state
from ebr_engine.bridge.schedules import StepTable
from ebr_engine.kernels.bridge_step import bridge_step

Velocity = Callable[[Tensor, Any], Tensor]
Callback = Callable[[int, int], None]
LINEAR = 3  # coefficients of a step that multiply state, velocity and degraded latent; differences follow


@dataclass(frozen=True, eq=False)
class Steps:
    """A step table placed on a device: made once (`place`), run many times."""

    table: StepTable
    linear: tuple[Tensor, ...]  # a step: [3] float32 on the device, what multiplies state, velocity and degraded latent
    differences: tuple[tuple[tuple[int, Tensor], ...], ...]  # a step: (k, number) for each D_{i−k} − D_{i−k−1} that it adds
    remembered: tuple[bool, ...]  # a step: whether its clean estimate D_i is part of any such difference

    def __len__(self) -> int:
        return len(self.linear)

    @property
    def history(self) -> int:
        """How many steps a difference may look back."""
        return self.table.coefficients.shape[1] - LINEAR


def place(table: StepTable, device: torch.device | str) -> Steps:
    """The numbers of a step table on `device`; column 3 + k of its coefficients multiplies D_{i−k} − D_{i−k−1}."""
    linear, columns = table.coefficients[:, :LINEAR].to(device), table.coefficients[:, LINEAR:]
    placed = columns.to(device)
    used = [[k for k, number in enumerate(row) if number != 0] for row in columns.tolist()]
    needed = {i - k - back for i, row in enumerate(used) for k in row for back in (0, 1)}
    differences = tuple(tuple((k, placed[i, k]) for k in row) for i, row in enumerate(used))
    return Steps(table, linear.unbind(), differences, tuple(i in needed for i in range(len(table))))


@torch.no_grad()
def sample(
    trunk: Velocity,
    conditioning: Sequence[Any],
    degraded: Tensor,
    noise: Tensor,
    steps: StepTable | Steps,
    callback: Callback | None = None,
) -> Tensor:
    """Carry a degraded latent to the clean one.

    Args: `trunk(state, conditioning[i])` gives the velocity at step i; `degraded` and `noise` [B, C, ...] of one shape;
    `steps` is a table, or one that is placed on `degraded`'s device; `callback(done, total)` is called after each evaluation.
    Returns: the restored latent, float32, on `degraded`'s device. The state is float32 throughout; nothing is random.
    Raises ValueError when the conditioning has another number of steps than the table. Source: arXiv 2604.10983.
    """
    total = len(steps)
    if len(conditioning) != total:
        raise ValueError(f"the conditioning has {len(conditioning)} steps, the step table {total}")
    steps = steps if isinstance(steps, Steps) else place(steps, degraded.device)
    degraded = degraded.float()
    state = start_state(degraded, noise.to(degraded), steps.table.t0)
    clean: dict[int, Tensor] = {}  # the estimates that later steps look back to, by step
    for i in range(total):
        velocity = trunk(state, conditioning[i]).float()
        if steps.remembered[i]:
            clean[i] = state - steps.table.times[i] * velocity
        state = bridge_step(state, velocity, degraded, steps.linear[i])
        for k, number in steps.differences[i]:
            state = state + number * (clean[i - k] - clean[i - k - 1])
        clean.pop(i - steps.history, None)
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
