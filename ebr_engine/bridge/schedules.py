"""Schedules: the times of a sampler's run, and their step tables."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RELEASED_STEPS = 20
RELEASED_T0 = 0.4
RELEASED_T_MIN = 1e-4
FAST_STEPS = 5
FAST_POWER = 1.65


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


def released_times(steps: int = RELEASED_STEPS, t0: float = RELEASED_T0, t_min: float = RELEASED_T_MIN) -> tuple[float, ...]:
    """The released schedule: `steps` evaluations at linspace(T0, t_min, steps), the last one's clean estimate is the result."""
    return (*torch.linspace(t0, t_min, steps, dtype=torch.float64).tolist(), 0.0)


def exact_times(steps: int = RELEASED_STEPS, t0: float = RELEASED_T0, t_min: float = RELEASED_T_MIN) -> tuple[float, ...]:
    """The released schedule without its last evaluation, which moves the result by less than 1e-4: N − 1 evaluations."""
    return (*released_times(steps, t0, t_min)[:-2], 0.0)


def power_times(steps: int, t0: float, power: float = 1.0) -> tuple[float, ...]:
    """t_i = T0·(1 − i/N)^power for i = 0 … N; power 1 is uniform."""
    return tuple(t0 * (1 - i / steps) ** power for i in range(steps + 1))


SCHEDULES = ("fast", "released", "exact", "uniform")


def make_table(schedule: str, t0: float, steps: int | None = None, order: int | None = None) -> StepTable:
    """The table of a named schedule; `steps` counts evaluations, `order` is 1 or 2; each schedule has its own defaults.

    fast: second order, 5 steps, power 1.65. released: the authors' 20 first-order steps. exact: the same without the last,
    needless evaluation (19). uniform: equal steps to 0, second order, 5.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if not 0 < t0 < 1:
        raise ValueError(f"t0 must lie between 0 and 1, got {t0}")
    if steps is not None and steps < (2 if schedule == "released" else 1):
        raise ValueError(f"the {schedule} schedule cannot have {steps} steps")
    if order not in (None, 1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if schedule == "released":
        return step_table(released_times(steps or RELEASED_STEPS, t0), t0, order or 1)
    if schedule == "exact":
        return step_table(exact_times((steps or RELEASED_STEPS - 1) + 1, t0), t0, order or 1)
    power = FAST_POWER if schedule == "fast" else 1.0
    return step_table(power_times(steps or FAST_STEPS, t0, power), t0, order or 2)


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
