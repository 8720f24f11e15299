"""Prompt learning on the frozen `mini`: EBR states, Adam on the prompt and its α only.

Objective (arXiv 2604.04924 and 2604.10983): t = t_min + (T0 − t_min)·u^power, X_t on the bridge between a clean and a degraded
latent, v* = (X_t − X0)/t. The velocity loss is the mean of (v − v*)²; the x0 loss weights it by t², which is the error of the
clean estimate; the pixel loss is the same measured in pixels (the codec is orthonormal up to its scale).
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ebr_engine.backbones.mini import Mini, load_mini
from ebr_engine.backbones.quantized import trunk_dtype
from ebr_engine.bridge import PROCESSES
from ebr_engine.errors import EbrError
from ebr_engine.prompts import Prompt
from ebr_engine.training.degradations import TASKS, degrade, seeds
from ebr_engine.training.scenes import ScenePool

LOSSES = ("x0", "velocity", "pixel")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class LearnConfig:
    """Settings of a prompt learning run."""

    task: str
    bridge: str = "ebr"  # ebr, naive or ddbm
    loss: str = "pixel"
    t0: float = 0.4
    t_min: float = 1e-4
    power: float = 1.0  # of u in t = t_min + (T0 − t_min)·u^power; below 1 favours large t
    tokens: int = 16
    alpha: float = 0.1  # initial value in every block
    iterations: int = 300
    batch: int = 32
    size: int = 64  # pixels a side of the crops
    learning_rate: float = 0.03
    warmup: int = 10  # iterations
    scenes: int = 512
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        choices = {"task": TASKS, "bridge": tuple(PROCESSES), "loss": LOSSES, "precision": PRECISIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise EbrError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if not 0 < self.t_min < self.t0 < 1:
            raise EbrError(f"t_min and t0 must fulfil 0 < t_min < t0 < 1, got {self.t_min} and {self.t0}")
        for name in ("tokens", "iterations", "batch", "scenes"):
            if getattr(self, name) < 1:
                raise EbrError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed not in seeds("train"):
            raise EbrError(f"the seed must be one of training, from 0 to {seeds('train').stop - 1}, got {self.seed}")
        if self.size % 8 or not 32 <= self.size <= 256:
            raise EbrError(f"the crop size must be a multiple of 8 from 32 to 256, got {self.size}")


@dataclass
class Learner:
    """The state of a run: the only two parameters, their optimizer, the random numbers and the iteration."""

    config: LearnConfig
    mini: Mini
    residual: Tensor
    alpha: Tensor
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    iteration: int = 0

    @classmethod
    def start(cls, config: LearnConfig, mini: Mini) -> "Learner":
        """A fresh run: P ~ N(0, 0.02²), α constant."""
        generator = torch.Generator().manual_seed(config.seed)
        width, blocks = mini.trunk.config.width, mini.trunk.config.num_layers
        residual = (torch.randn(config.tokens, width, generator=generator) * 0.02).requires_grad_()
        alpha = torch.full((blocks,), config.alpha).requires_grad_()
        optimizer = torch.optim.Adam([residual, alpha], lr=config.learning_rate)
        return cls(config, mini, residual, alpha, optimizer, generator)

    def step(self, pool: ScenePool) -> float:
        """One iteration; returns the loss."""
        config = self.config
        clean, depth, _ = pool.crops(config.batch, config.size, self.generator)
        degraded = degrade(clean, config.task, self.generator, depth=depth)
        clean, degraded = (self.mini.codec.encode(x.unsqueeze(2)) for x in (clean, degraded))
        u = torch.rand(config.batch, generator=self.generator)
        t = config.t_min + (config.t0 - config.t_min) * u**config.power
        noise = torch.randn(clean.shape, generator=self.generator)
        state, target = PROCESSES[config.bridge](clean, degraded, noise, t, config.t0)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(self.iteration, config)
        loss = self.loss(state, target, t)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.iteration += 1
        return loss.item()

    def loss(self, state: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The loss of states [B, 48, 1, h, w] at times [B]; differentiable in the prompt and α."""
        device, dtype = self.mini.trunk.patch_in.weight.device, self.mini.trunk.patch_in.weight.dtype
        conditioning = self.mini.conditioner(t * 1000, self.mini.context, [(self.residual, self.alpha)]).to(device, dtype)
        velocity = self.mini.trunk(state.to(device), conditioning.batch()).cpu()
        error = velocity - target
        if self.config.loss != "velocity":
            error = error * t.view(-1, 1, 1, 1, 1)
        if self.config.loss == "pixel":
            error = error * self.mini.codec.scale.view(1, -1, 1, 1, 1)
        return error.square().mean()

    def prompt(self, training: dict) -> Prompt:
        """The prompt as it stands."""
        config = self.config
        residual, alpha = self.residual.detach().clone(), self.alpha.detach().clone()
        settings = {"task": config.task, "base_model": "mini", "t0": config.t0, "t_min": config.t_min, "steps": 5}
        return Prompt(residual, alpha, "mini", **settings, training=asdict(config) | training)

    def state(self) -> dict:
        """Everything a resumed run needs to go on bit for bit."""
        return {
            "config": json.dumps(asdict(self.config)),
            "residual": self.residual.detach(),
            "alpha": self.alpha.detach(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
        }

    def load(self, state: dict) -> None:
        """Go on from `state`; `EbrError` when it belongs to a run with other settings (more iterations are fine)."""
        saved, now = json.loads(state["config"]), asdict(self.config)
        if other := [name for name in now if name != "iterations" and saved.get(name) != now[name]]:
            raise EbrError(f"the checkpoint was made with other settings ({', '.join(other)}); use --no-resume to start anew")
        with torch.no_grad():
            self.residual.copy_(state["residual"])
            self.alpha.copy_(state["alpha"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.iteration = state["iteration"]


def learn(
    config: LearnConfig,
    out: Path,
    *,
    model: Path | None = None,
    device: str = "cpu",
    resume: bool = True,
    save_every: int = 50,
    callback: Callable[[int, int, float], None] | None = None,
) -> Prompt:
    """Learn a prompt and write it to `out`; a checkpoint beside it (`.ckpt`) is kept until the run is complete.

    `callback(iteration, iterations, loss)` after each iteration. An interrupted run (Ctrl-C too) goes on where it stopped.
    """
    chosen = torch.device(device)
    source = [model] if model else []
    mini = load_mini(*source, device=chosen, dtype=trunk_dtype(config.precision, chosen))
    learner = Learner.start(config, mini)
    checkpoint = out.with_suffix(".ckpt")
    if resume and checkpoint.exists():
        learner.load(read_checkpoint(checkpoint))
    out.parent.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    started = time.monotonic()
    with ScenePool(config.scenes) as pool:
        try:
            while learner.iteration < config.iterations:
                losses.append(learner.step(pool))
                if not math.isfinite(losses[-1]):
                    raise EbrError(f"the loss is {losses[-1]} at iteration {learner.iteration}; try a smaller learning rate")
                if callback is not None:
                    callback(learner.iteration, config.iterations, losses[-1])
                if learner.iteration % save_every == 0:
                    save_checkpoint(checkpoint, learner)
        except KeyboardInterrupt:
            save_checkpoint(checkpoint, learner)
            raise
    recent = losses[-50:]
    summary = {"seconds": round(time.monotonic() - started, 1), "final_loss": sum(recent) / len(recent) if recent else None}
    prompt = learner.prompt(summary)
    prompt.save(out)
    checkpoint.unlink(missing_ok=True)
    return prompt


def save_checkpoint(path: Path, learner: Learner) -> None:
    """Write the run's state, atomically."""
    partial = path.with_name(path.name + ".partial")
    torch.save(learner.state(), partial)
    partial.replace(path)


def read_checkpoint(path: Path) -> dict:
    """A state written by `save_checkpoint`; `EbrError` when the file is damaged."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # a damaged pickle raises almost anything
        raise EbrError(f"{path} is not a checkpoint of a run; use --no-resume to start anew") from error


def rate_factor(iteration: int, config: LearnConfig) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    warm = min(1.0, (iteration + 1) / config.warmup)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / config.iterations))))
