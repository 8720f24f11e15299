"""Named schedules: the times at which a run evaluates the transformer; plain numbers, nothing heavy is imported."""

from collections.abc import Callable
from dataclasses import dataclass

RELEASED_STEPS = 20
RELEASED_T0 = 0.4
RELEASED_T_MIN = 1e-4
FAST_STEPS = 5
FAST_POWER = 1.65


@dataclass(frozen=True)
class Schedule:
    """`times(steps, t0)` gives N + 1 times from T0 to 0; with its own number of evaluations and order of the solver."""

    times: Callable[[int, float], tuple[float, ...]]
    steps: int
    order: int
    least: int = 1  # evaluations
    released: bool = False  # the transformer is told the times that the released code tells it


def released_times(steps: int = RELEASED_STEPS, t0: float = RELEASED_T0, t_min: float = RELEASED_T_MIN) -> tuple[float, ...]:
    """The released schedule: `steps` evaluations at linspace(T0, t_min, steps), the last one's clean estimate is the result."""
    step = (t_min - t0) / max(1, steps - 1)
    half = steps // 2  # from either end, as torch.linspace does
    return (*(t0 + step * i if i < half else t_min - step * (steps - 1 - i) for i in range(steps)), 0.0)


def exact_times(steps: int = RELEASED_STEPS, t0: float = RELEASED_T0, t_min: float = RELEASED_T_MIN) -> tuple[float, ...]:
    """The released schedule without its last evaluation, which moves the result by less than 1e-4: N − 1 evaluations."""
    return (*released_times(steps, t0, t_min)[:-2], 0.0)


def power_times(steps: int, t0: float, power: float = 1.0) -> tuple[float, ...]:
    """t_i = T0·(1 − i/N)^power for i = 0 … N; power 1 is uniform."""
    return tuple(t0 * (1 - i / steps) ** power for i in range(steps + 1))


SCHEDULES = {
    "fast": Schedule(lambda steps, t0: power_times(steps, t0, FAST_POWER), FAST_STEPS, order=2),
    "released": Schedule(released_times, RELEASED_STEPS, order=1, least=2, released=True),
    "exact": Schedule(lambda steps, t0: exact_times(steps + 1, t0), RELEASED_STEPS - 1, order=1, released=True),
    "uniform": Schedule(power_times, FAST_STEPS, order=2),
}
