"""The fixed-step sampler: a function over tables.

Which of a step's numbers are zero is known on the host before the run, and the numbers themselves lie on the device: a run
launches work and waits for nothing, so that a CUDA graph can hold all of it (`engine/execute.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebr_engine.bridge.process import start_state
from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.kernels.bridge_step import bridge_step

Velocity = Callable[[Tensor, Any], Tensor]
Callback = Callable[[int, int], None]
LINEAR = 3  # coefficients of a step that multiply state, velocity and degraded latent; differences follow


@dataclass(frozen=True)
class StepTable:
    """A sampler run as numbers: evaluation i happens at `times[i]` and goes to `times[i + 1]`.

    `coefficients[i]` = (c0, c1, c2, c3): x ← c0·x + c1·v + c2·Y + c3·(D_i − D_{i−1}); c3 is 0 at first order.
    """

    t0: float
    times: tuple[float, ...]  # N + 1, from T0 to 0
    coefficients: Tensor  # [N, 4] float32, computed in float64

    def __len__(self) -> int:
        return len(self.times) - 1


def make_table(schedule: str, t0: float, steps: int | None = None, order: int | None = None) -> StepTable:
    """The table of a named schedule; `steps` counts evaluations, `order` is 1 or 2; each schedule has its own defaults.

    fast: second order, 5 steps, power 1.65. released: the authors' 20 first-order steps. exact: the same without the last,
    needless evaluation (19). uniform: equal steps to 0, second order, 5. Raises ValueError for anything else.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    chosen = SCHEDULES[schedule]
    if not 0 < t0 < 1:
        raise ValueError(f"t0 must lie between 0 and 1, got {t0}")
    if steps is not None and steps < chosen.least:
        raise ValueError(f"the {schedule} schedule cannot have {steps} steps")
    if order not in (None, 1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    return step_table(chosen.times(steps or chosen.steps, t0), t0, order or chosen.order)


def step_table(times: tuple[float, ...], t0: float, order: int = 1) -> StepTable:
    """Coefficients of a multistep run through `times` (decreasing, the last 0).

    First order is exactly the released sampler. Second order adds m·[s(s−t)²/(2T0) − s·ln(s/t) − t + s] with the slope
    m = (D_i − D_{i−1})/(t_i − t_{i−1}); at s = 0 the bracket is −t; the first step is first order.
    """
    if len(times) < 2 or times[-1] != 0 or any(s >= t for t, s in zip(times, times[1:])):
        raise ValueError(f"times must decrease to 0, got {times}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    rows = []
    for i, (t, s) in enumerate(zip(times, times[1:])):
        clean = 1 - s / t + s * (s - t) / t0
        slope = 0.0
        if order == 2 and i > 0:
            curve = s * (s - t) ** 2 / (2 * t0) - s * math.log(s / t) - t + s if s > 0 else -t
            slope = curve / (t - times[i - 1])
        rows.append((s / t + clean, -clean * t, s * (t - s) / t0, slope))
    return StepTable(t0, times, torch.tensor(rows, dtype=torch.float64).float())


def flow_table(times: tuple[float, ...], t0: float) -> StepTable:
    """The naive process's sampler: Euler steps x_s = x + (s − t)·v from (1−T0)·Y + T0·ε (SDEdit's start, arXiv 2108.01073)."""
    rows = [(1.0, s - t, 0.0, 0.0) for t, s in zip(times, times[1:])]
    return StepTable(t0, times, torch.tensor(rows, dtype=torch.float64).float())


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


def trajectory(
    trunk: Velocity,
    conditioning: Sequence[Any],
    degraded: Tensor,
    noise: Tensor,
    steps: StepTable | Steps,
    callback: Callback | None = None,
) -> Tensor:
    """Carry a degraded latent to the clean one, differentiable in what velocities depend on; `sample` is it without gradients.

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


sample = torch.no_grad()(trajectory)


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
