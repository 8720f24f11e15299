"""Bridges to compare: their states, what is read from the transformer's answer, and the deterministic sampler of each.

    state    x_t = (1−t)(1−r)·X0 + (1−t)·r·Y + c·ε;  r is 0 at t = 0 and 1 at T0
    path     linear: r = t/T0 (EBR);  snr: r = ((1−T0)/T0)²·(t/(1−t))², the ratio of signal to noise (DDBM)
    noise    constant: c = η·t;  vanishing: c = η·t·sqrt(1 − r of snr), so that nothing is random at T0 (DDBM)
    form     released: D = x − t·v with the target v* = (x − X0)/t;  paper: D = (x − A·Y − t·v)/(1−A) with v* = (c/t)·ε − X0

With A = (1−t)·r the two forms are one line apart: D_paper = D + A/(1−A)·(D − Y). The paper's form (arXiv 2604.10983) goes on from
the released code's clean estimate, away from the degraded latent; at T0 by the factor (1−T0)/T0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.views import View, extended, moved, moved_back
from ebr_engine.bridge.sampler import make_table
from ebr_engine.training.learner import Learner


@dataclass(frozen=True)
class Bridge:
    """A process between a clean and a degraded latent."""

    path: str = "linear"  # or snr
    noise: str = "constant"  # or vanishing
    level: float = 1.0  # η
    form: str = "released"  # or paper

    def weights(self, t: Tensor, t0: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of the clean latent, the degraded one and the noise, at times of any shape."""
        snr = ((1 - t0) / t0) ** 2 * (t / (1 - t)) ** 2
        ratio = t / t0 if self.path == "linear" else snr
        fading = (1 - snr).clamp(min=0).sqrt() if self.noise == "vanishing" else 1.0
        return (1 - t) * (1 - ratio), (1 - t) * ratio, self.level * t * fading

    def state(self, clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, t0: float) -> Tensor:
        """x_t of latents [B, ...] at times that broadcast to them."""
        a, b, c = self.weights(t, t0)
        return a * clean + b * degraded + c * noise

    def clean(self, state: Tensor, degraded: Tensor, velocity: Tensor, t: Tensor, t0: float) -> Tensor:
        """What a velocity says the clean latent is."""
        if self.form == "released":
            return state - t * velocity
        _, b, _ = self.weights(t, t0)
        return (state - b * degraded - t * velocity) / (1 - b)

    def target(self, clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, t0: float) -> Tensor:
        """The velocity whose clean estimate is the clean latent."""
        _, _, c = self.weights(t, t0)
        if self.form == "released":
            return (self.state(clean, degraded, noise, t, t0) - clean) / t
        return c / t * noise - clean

    def step(self, state: Tensor, clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, s: Tensor, t0: float) -> Tensor:
        """From t to s with a clean estimate; the noise is the state's own, or `noise` where the state has none."""
        a, b, c = self.weights(t, t0)
        own = (state - a * clean - b * degraded) / c if c > 1e-9 else noise
        a, b, c = self.weights(s, t0)
        return a * clean + b * degraded + c * own


def estimate(
    backbone: Backbone, bridge: Bridge, state: Tensor, degraded: Tensor, step: Any, t: Tensor, t0: float, view: View | None
) -> Tensor:
    """The clean estimate [B, C, f, h, w] as `backbones/views.py` has it, for either form.

    `t` broadcasts to the latents. The grid of tokens lies where the view says, and the mean detail is the degraded latent's.
    """
    codec = backbone.codec
    if view is None:
        return bridge.clean(state, degraded, backbone.velocity(state, step), t, t0)
    there, beside = moved(state, codec, view.offset), degraded
    if view.offset is not None:
        beside = codec.encode(extended(codec.decode(degraded), view.offset, codec.span))
    found = bridge.clean(there, beside, backbone.velocity(there, step).contiguous(), t, t0)
    if codec.levels:
        own, wanted = (x.mean((2, 3, 4), keepdim=True) for x in (found, beside))
        found = found + (wanted - own) * ~codec.tones.view(1, -1, 1, 1, 1)
    return moved_back(found, codec, view.offset)


def walked(
    backbone: Backbone,
    bridge: Bridge,
    steps: Sequence[Any],
    views: Sequence[View],
    degraded: Tensor,
    noise: Tensor,
    times: Sequence[float],
    t0: float,
) -> Tensor:
    """The restored latent: first-order steps through `times`, from T0 down to 0; `views` may be empty. Differentiable."""
    t = torch.tensor(times, dtype=torch.float64).float()
    state = bridge.state(torch.zeros_like(degraded), degraded, noise, t[0], t0)
    for i in range(len(times) - 1):
        clean = estimate(backbone, bridge, state, degraded, steps[i], t[i], t0, views[i] if views else None)
        state = bridge.step(state, clean, degraded, noise, t[i], t[i + 1], t0)
    return state


sampled = torch.no_grad()(walked)


@dataclass
class BridgeLearner(Learner):
    """The engine's learner on another bridge; the loss is that of the clean estimate, whatever the form."""

    bridge: Bridge = Bridge()

    def state_loss(self, numbers: Sequence[int], degraded: Tensor, clean: Tensor) -> Tensor:
        """See `Learner.state_loss`; the draws are its own."""
        t0 = self.config.t0
        t = self.states(numbers, degraded, clean)[-1]
        noise = self.noise(numbers, clean) / self.backbone.noise  # η is the bridge's own
        wide = t.view(-1, 1, 1, 1, 1)
        state = self.bridge.state(clean, degraded, noise, wide, t0)
        step = self.live(t * 1000, self.residual, self.alpha)
        view = self.view(t) if self.views else None
        found = estimate(self.backbone, self.bridge, state, degraded, step, wide, t0, view)
        return self.measured(found - clean, degraded - clean)

    def result_loss(self, numbers: Sequence[int], degraded: Tensor, clean: Tensor) -> Tensor:
        """See `Learner.result_loss`; through this bridge's own sampler."""
        t0, times = self.config.t0, make_table("fast", self.config.t0, self.config.unroll).times
        noise = self.noise(numbers, clean) / self.backbone.noise
        steps = [self.live(clean.new_tensor([t * 1000]), self.residual, self.alpha) for t in times[:-1]]
        found = walked(self.backbone, self.bridge, steps, self.views, degraded, noise, times, t0)
        return self.measured(found - clean, degraded - clean)

    @classmethod
    def on(cls, bridge: Bridge):
        """What starts a learner on this bridge."""

        def start(config, backbone) -> "BridgeLearner":
            learner = cls.start(config, backbone)
            learner.bridge = bridge
            return learner

        return start
