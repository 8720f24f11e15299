"""The diffusion bridge (EBR): states, targets, schedules and step tables; the mathematics and nothing else.

Flow matching: x_t = (1−t)·x0 + t·ε and v = ε − x0, so the clean estimate is D = x − t·v. Y is the degraded latent.

    state      X_t = a·X0 + A·Y + t·ε,  a = (1−t)(1−t/T0),  A = (1−t)·t/T0,  t in [0, T0]
    start      X_T0 = (1−T0)·Y + T0·ε
    step t→s   x_s = (s/t)·x + [1 − s/t + s(s−t)/T0]·D + [s(t−s)/T0]·Y

Sources: EBR, arXiv 2604.10983; prompts on frozen transformers, arXiv 2604.04924.
"""

from torch import Tensor


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
