"""The diffusion bridge (EBR): states, targets, schedules and step tables; the mathematics and nothing else.

Flow matching: x_t = (1−t)·x0 + t·ε and v = ε − x0, so the clean estimate is D = x − t·v. Y is the degraded latent.

    state      X_t = a·X0 + A·Y + t·ε,  a = (1−t)(1−t/T0),  A = (1−t)·t/T0,  t in [0, T0]
    start      X_T0 = (1−T0)·Y + T0·ε
    step t→s   x_s = (s/t)·x + [1 − s/t + s(s−t)/T0]·D + [s(t−s)/T0]·Y

Sources: EBR, arXiv 2604.10983; prompts on frozen transformers, arXiv 2604.04924.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RELEASED_STEPS = 20
RELEASED_T0 = 0.4
RELEASED_T_MIN = 1e-4
FAST_STEPS = 5
FAST_POWER = 1.65


def bridge_coefficients(t: Tensor, t0: float) -> tuple[Tensor, Tensor]:
    """Weights (a, A) of the clean and the degraded latent in the state at times `t` (any shape); the noise's weight is t."""
    return (1 - t) * (1 - t / t0), (1 - t) * t / t0


def start_state(degraded: Tensor, noise: Tensor, t0: float) -> Tensor:
    """X_T0 = (1 − T0)·Y + T0·ε, the state that the sampler starts from; all tensors of one shape."""
    return (1 - t0) * degraded + t0 * noise


def training_state(clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, t0: float) -> tuple[Tensor, Tensor]:
    """Bridge state X_t and its velocity target (X_t − X0)/t for latents [B, ...] and times [B] in (0, T0]."""
    t = t.view(-1, *[1] * (clean.ndim - 1))
    a, b = bridge_coefficients(t, t0)
    state = a * clean + b * degraded + t * noise
    return state, (state - clean) / t


def naive_state(clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, t0: float) -> tuple[Tensor, Tensor]:
    """The naive process of arXiv 2604.04924: x_t = (1−t)·X0 + t·ε on clean latents, with flow matching's target ε − X0.

    It never sees a degraded latent in training, although sampling starts from one; kept for comparison. `degraded` and
    `t0` are unused, so that all processes are called alike.
    """
    t = t.view(-1, *[1] * (clean.ndim - 1))
    return (1 - t) * clean + t * noise, noise - clean


def ddbm_state(clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, t0: float) -> tuple[Tensor, Tensor]:
    """The variance-preserving bridge of DDBM (Zhou et al., arXiv 2309.16948, table 1) on flow matching's noise schedule.

    With α = 1−t, σ = t and r = SNR_T0/SNR_t = ((1−T0)/T0)²·(t/(1−t))²: mean r·(α_t/α_T0)·Y' + α_t·(1−r)·X0 with
    Y' = (1−T0)·Y, standard deviation σ·sqrt(1−r). It ends at T0 exactly on the scaled degraded latent, without noise.
    Target (X_t − X0)/t as in `training_state`.
    """
    t = t.view(-1, *[1] * (clean.ndim - 1))
    ratio = ((1 - t0) / t0) ** 2 * (t / (1 - t)) ** 2
    state = ratio * (1 - t) * degraded + (1 - t) * (1 - ratio) * clean + t * (1 - ratio).clamp(min=0).sqrt() * noise
    return state, (state - clean) / t


PROCESSES = {"ebr": training_state, "naive": naive_state, "ddbm": ddbm_state}


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


def released_timesteps(times: tuple[float, ...], backbone: str) -> Tensor:
    """What the released code feeds the transformer at each evaluation of `times` (the last, 0, is not fed), [N] float32.

    It takes the nearest entry of a 1000-entry scheduler table. Wan: sigmas 0.000999·k, timesteps floor(0.999·k): 399, 378,
    … 20, 0. FLUX: sigmas k/1000, timesteps k: 400, 379, … 21, 1 (diffusers' class is given a thousandth).
    """
    t = torch.tensor(times[:-1], dtype=torch.float64)
    if backbone == "wan":
        return ((t / 0.000999).round().clamp(min=1) * 0.999).floor().float()
    return (t * 1000).round().clamp(min=1).float()
