"""The state of a run and its step: EBR states, the frozen trunk, an optimizer for the prompt and its α only.

Objective (arXiv 2604.04924 and 2604.10983): t = t_min + (T0 − t_min)·u^power, X_t on the bridge between a clean and a degraded
latent, v* = (X_t − X0)/t. The velocity loss is the mean of (v − v*)²; the x0 loss weights it by t², which is the error of the
clean estimate; the pixel loss is the same measured in pixels (`mini`'s codec is orthonormal up to its scale). On policy, X_t is
what the sampler itself visits with the prompt as it stands; no gradient goes through its steps. Unrolled, the error is that of
the sampler's result, and the gradient goes through all of its steps.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.layers import pack_trunk
from ebr_engine.backbones.sharding import WHOLE, Ulysses, Whole, exchanging
from ebr_engine.backbones.views import View, seen, spun, views
from ebr_engine.bridge.process import PROCESSES
from ebr_engine.bridge.sampler import StepTable, make_table, sample, trajectory
from ebr_engine.engine.offload import block_lists
from ebr_engine.errors import EbrError
from ebr_engine.evaluation.metrics import dissimilarity
from ebr_engine.kernels import backend, tune
from ebr_engine.media.detail import affine_map, noise_of
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import FREE, LearnConfig
from ebr_engine.training.data import seeded
from ebr_engine.training.distributed import World

INITIAL_STD = 0.02  # of the prompt
SLIGHT = 0.05  # mean square of a damage in the latent, below which all count alike
PACKED = 2**31  # bytes of weights up to which a CPU keeps them twice, each way laid out for its products
# (numbers of samples, those of the batch that follows) → degraded and clean latents [B, C, f, h, w]
Batch = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Progress:
    """What a step tells."""

    loss: float
    gradient: float  # norm over the prompt and α, before clipping
    rate: float  # learning rate


@dataclass
class Learner:
    """The only two parameters, their optimizer and their average; everything random follows from the seed and the iteration."""

    config: LearnConfig
    backbone: Backbone
    residual: Tensor  # [L, D] or [blocks, L, D] float32
    alpha: Tensor  # [blocks] float32
    optimizer: torch.optim.Optimizer
    world: World
    live: Callable[[Tensor, Tensor, Tensor], Any]
    average: list[Tensor] | None = None
    iteration: int = 0
    exchange: Whole | Ulysses = WHOLE  # of tokens, in a step

    @classmethod
    def start(cls, config: LearnConfig, backbone: Backbone, world: World | None = None) -> "Learner":
        """A fresh run: P ~ N(0, 0.02²), α constant, or those of a prompt. `EbrError` where it does not fit the backbone."""
        world = world or World()
        check_fits(config, backbone, world)
        backbone = prepared(config, backbone)
        residual, alpha = (part.to(backbone.device).requires_grad_() for part in initial(config, backbone))
        live = backbone.live(config.tokens)
        average = [residual.detach().clone(), alpha.detach().clone()] if config.ema else None
        exchange = world.exchange(backbone.trunk.config.num_attention_heads) if config.sequence_parallel else WHOLE
        optimizer = make_optimizer(config, [residual, alpha])
        return cls(config, backbone, residual, alpha, optimizer, world, live, average, exchange=exchange)

    @property
    def parameters(self) -> list[Tensor]:
        """The prompt and α."""
        return [self.residual, self.alpha]

    def numbers(self, iteration: int, part: int) -> list[int]:
        """The samples that this process learns from in a part of an iteration; none after the last one."""
        iteration, part = divmod(iteration * self.config.accumulate + part, self.config.accumulate)
        if iteration >= self.config.iterations:
            return []
        rank, size = place_of(self.config, self.world)
        share = self.config.batch // (size * self.config.accumulate)
        first = iteration * self.config.batch + (rank * self.config.accumulate + part) * share
        return list(range(first, first + share))

    def step(self, batch: Batch) -> Progress:
        """One iteration; the loss is the mean over all samples of all processes.

        Processes that share tokens have one loss each, the same, and gradients of their sum: so theirs is the mean too.
        """
        total = torch.zeros((), device=self.backbone.device)
        for part in range(self.config.accumulate):
            numbers = self.numbers(self.iteration, part)
            following = self.numbers(self.iteration, part + 1)
            degraded, clean = (latent.to(self.backbone.device) for latent in batch(numbers, following))
            objective = self.result_loss if self.config.unroll else self.state_loss
            with exchanging(self.backbone.trunk, self.exchange):
                loss = objective(numbers, degraded, clean) / self.config.accumulate
                loss.backward()
            total += loss.detach()
        self.world.mean([*(parameter.grad for parameter in self.parameters), total])
        limit = self.config.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        rate = self.config.learning_rate * rate_factor(self.iteration, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.iteration += 1
        if self.average is not None:
            decay = min(self.config.ema, self.iteration / (self.iteration + 9))
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)
        return Progress(total.item(), norm.item(), rate)

    def state_loss(self, numbers: Sequence[int], degraded: Tensor, clean: Tensor) -> Tensor:
        """The loss at one state of each sample of latents [B, C, f, h, w]."""
        return self.loss(*self.states(numbers, degraded, clean), degraded)

    def result_loss(self, numbers: Sequence[int], degraded: Tensor, clean: Tensor) -> Tensor:
        """The loss of what the fast sampler makes of latents [B, C, f, h, w]; differentiable through all of its steps."""
        table = make_table("fast", self.config.t0, self.config.unroll)
        noise = self.noise(numbers, clean)
        steps = [self.live(clean.new_tensor([t * 1000]), self.residual, self.alpha) for t in table.times[:-1]]
        velocity = spun(self.backbone.velocity, self.backbone.codec, degraded) if self.views else self.backbone.velocity
        result = trajectory(velocity, seen(steps, self.views), degraded, noise, table)
        if self.config.loss != "pixel":
            return self.measured(result - clean, degraded - clean)
        damage, codec = degraded - clean, self.backbone.codec
        if self.config.detail == "input" or self.config.supersample > 1:  # the error is that of the picture as it is written
            pixels, before, target = (self.written(latent) for latent in (result, degraded, clean))
            if self.config.detail == "input":
                pixels = mapped(before, pixels)
            result, clean = codec.encode(pixels), codec.encode(target)
        loss = self.measured(result - clean, damage)
        if self.config.ssim_weight:
            loss = loss + self.config.ssim_weight * dissimilarity(codec.decode(result), codec.decode(clean)).mean()
        return loss

    def written(self, latent: Tensor) -> Tensor:
        """The pixels [B, 3, F, H, W] of latents [B, C, f, h, w] at the pictures' own size; differentiable."""
        pixels = self.backbone.codec.decode(latent)
        if self.config.supersample == 1:
            return pixels
        frames = pixels.transpose(1, 2).flatten(0, 1)
        own = [side // self.config.supersample for side in frames.shape[-2:]]
        frames = F.interpolate(frames, own, mode="bicubic", antialias=True)
        return frames.unflatten(0, (len(pixels), -1)).transpose(1, 2)

    def states(self, numbers: Sequence[int], degraded: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, C, f, h, w], their velocity targets and times [B] for the latents of samples `numbers`."""
        config, noise = self.config, self.noise(numbers, clean)
        if config.on_policy:
            return self.visited(degraded, clean, noise)
        times = torch.stack([torch.rand((), generator=seeded(config.seed, "state", number)) for number in numbers])
        t = config.t_min + (config.t0 - config.t_min) * times.to(clean) ** config.power
        return *PROCESSES[config.bridge](clean, degraded, noise, t, config.t0), t

    def noise(self, numbers: Sequence[int], clean: Tensor) -> Tensor:
        """The bridge's noise [B, C, f, h, w] of samples `numbers`."""
        noises = []
        for number in numbers:
            generator = seeded(self.config.seed, "state", number)
            torch.rand((), generator=generator)  # the sample's time
            noises.append(torch.randn(clean.shape[1:], generator=generator))
        return torch.stack(noises).to(clean) * (self.backbone.noise if self.config.bridge == "ebr" else 1.0)

    @torch.no_grad()
    def visited(self, degraded: Tensor, clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the fast sampler reaches before one of its steps, the same for the whole batch."""
        table, done = self.path
        begun = StepTable(table.t0, table.times[: done + 1], table.coefficients[:done])
        timesteps = torch.tensor(begun.times[:-1], device=clean.device) * 1000
        steps = [self.live(t[None], self.residual, self.alpha) for t in timesteps]
        velocity = spun(self.backbone.velocity, self.backbone.codec, degraded) if self.views else self.backbone.velocity
        state = sample(velocity, seen(steps, self.views[: len(steps)]), degraded, noise, begun)
        t = clean.new_full((len(clean),), table.times[done])
        return state, (state - clean) / table.times[done], t

    @property
    def path(self) -> tuple[StepTable, int]:
        """On policy: the sampler's steps, and how many of them this iteration's batch has taken."""
        table = make_table("fast", self.config.t0, self.config.steps)
        return table, int(torch.randint(len(table), (1,), generator=seeded(self.config.seed, "visited", self.iteration)))

    @property
    def views(self) -> tuple[View, ...]:
        """How the transformer sees the state in each of the sampler's steps, as restoring has them."""
        return views(self.backbone, make_table("fast", self.config.t0, self.config.steps).times[:-1])

    def view(self, t: Tensor) -> View:
        """How it sees the states of this iteration, at times [B]: on policy as in the sampler's step, else as in any of them."""
        if self.config.on_policy:
            return self.views[self.path[1]]
        chosen = torch.randint(len(self.views), (1,), generator=seeded(self.config.seed, "view", self.iteration))
        return self.views[int(chosen)]._replace(time=t)

    def loss(self, state: Tensor, target: Tensor, t: Tensor, degraded: Tensor | None = None) -> Tensor:
        """The loss of states [B, C, f, h, w] at times [B]; differentiable in the prompt and α.

        Where the latents `degraded` are given, the transformer sees the states as in restoring, otherwise plainly.
        """
        velocity, step = self.backbone.velocity, self.live(t * 1000, self.residual, self.alpha)
        if degraded is not None and self.views:
            velocity, step = spun(velocity, self.backbone.codec, degraded), (step, self.view(t))
        error, t = velocity(state, step) - target, t.view(-1, 1, 1, 1, 1)
        if self.config.loss != "velocity":
            error = error * t
        return self.measured(error, None if degraded is None else degraded - state + t * target)

    def measured(self, error: Tensor, damage: Tensor | None) -> Tensor:
        """The mean square of errors [B, C, f, h, w], weighted as configured; `damage` of the degraded latents, if known."""
        if self.config.loss == "pixel":
            weight = 1 + self.config.tone * self.backbone.codec.tones
            error = error * self.backbone.codec.spread(self.backbone.codec.scale * weight.sqrt())
        if not self.config.even or damage is None:
            return error.square().mean()
        level = damage.square().mean((1, 2, 3, 4)) + SLIGHT
        return (error.square().mean((1, 2, 3, 4)) * (level / level.mean()) ** -self.config.even).mean()

    def prompt(self, training: dict | None = None) -> Prompt:
        """The prompt as it stands, averaged if the run averages."""
        config = self.config
        residual, alpha = (part.detach().cpu().clone() for part in self.average or self.parameters)
        where = {"task": config.task, "base_model": self.backbone.identity, "t0": config.t0, "t_min": config.t_min}
        summary = shareable(asdict(config)) | (training or {})
        steps = config.steps or self.backbone.spec.learning.steps
        how = {"steps": steps, "detail": config.detail, "supersample": config.supersample, "deconvolve": config.deconvolve}
        return Prompt(residual, alpha, config.backbone, **where, **how, training=summary)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit."""
        return {
            "config": json.dumps(asdict(self.config)),
            "residual": self.residual.detach(),
            "alpha": self.alpha.detach(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; `EbrError` when it belongs to a run with other settings (those of `FREE` may differ)."""
        saved, now = json.loads(state["config"]), json.loads(json.dumps(asdict(self.config)))
        if other := [name for name in now if name not in FREE and saved.get(name) != now[name]]:
            raise EbrError(f"the checkpoint was made with other settings ({', '.join(other)}); use --no-resume to start anew")
        with torch.no_grad():
            for parameter, name in zip(self.parameters, ("residual", "alpha")):
                parameter.copy_(state[name])
        if self.average is not None:
            self.average = [part.to(self.backbone.device) for part in state["average"]]
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]


def mapped(pixels: Tensor, restored: Tensor) -> Tensor:
    """Clips [B, 3, F, H, W] in [0, 1] with the tones of `restored`, as restoring has them where the detail is the input's."""
    before, after = (clips.transpose(1, 2).flatten(0, 1) for clips in (pixels, restored))
    slope, offset = affine_map(before, after, noise_of(before))
    return (slope * before + offset).unflatten(0, (len(pixels), -1)).transpose(1, 2)


def initial(config: LearnConfig, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Rows [L, D] or [blocks, L, D] and strengths [blocks] to begin from; `EbrError` for a prompt of another shape."""
    shape = (backbone.blocks,) * config.per_block + (config.tokens, backbone.width)
    if not config.start:
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed)) * INITIAL_STD
        return rows, torch.full((backbone.blocks,), config.alpha)
    begun = load_prompt(Path(config.start))
    begun.check(backbone.name, backbone.width, backbone.blocks)
    rows = begun.residual.float()
    if config.per_block and rows.ndim == 2:  # every block begins with what all of them shared
        rows = rows.expand(backbone.blocks, -1, -1).clone()
    if rows.shape != shape:
        own = f"tokens={rows.shape[-2]} and per_block={str(rows.ndim == 3).lower()}"
        raise EbrError(f"{config.start}: learn on with {own}, which this prompt was learned with")
    return rows, begun.alpha.float()


def check_fits(config: LearnConfig, backbone: Backbone, world: World) -> None:
    """`EbrError` where a configuration asks for what the backbone or the processes cannot do."""
    backbone.check_start(config.t0)
    if any(side % backbone.multiple for side in config.crop):
        raise EbrError(f"{backbone.name} takes crops whose sides are multiples of {backbone.multiple}, not {config.size}")
    if (frames := backbone.codec.frames(config.frames)) != config.frames:
        raise EbrError(f"{backbone.name} takes clips of 4n + 1 frames, not {config.frames}; use {frames}")
    _, size = place_of(config, world)
    if config.batch % (size * config.accumulate):
        shares = f"{size} process(es) in {config.accumulate} part(s)"
        raise EbrError(f"a batch of {config.batch} cannot be divided among {shares}")
    if backbone.spec.injection == "add" and config.tokens > len(backbone.text["context"]):
        raise EbrError(f"a prompt of {config.tokens} tokens does not fit on {len(backbone.text['context'])} text tokens")


def place_of(config: LearnConfig, world: World) -> tuple[int, int]:
    """This process's place among those that share a batch, and how many do: one, where they share every sample's tokens."""
    return (0, 1) if config.sequence_parallel else (world.rank, world.size)


def prepared(config: LearnConfig, backbone: Backbone) -> Backbone:
    """The backbone ready to learn on: its conditioner on the trunk's device, blocks checkpointed or compiled where asked."""
    tune.for_long()
    for part in (backbone.conditioner, backbone.trunk):
        part.to(backbone.device).requires_grad_(False)
    if backbone.device.type == "cpu" and sum(weight.nbytes for weight in backbone.trunk.parameters()) <= PACKED:
        pack_trunk(backbone.trunk, learns=True)
    if config.compile:
        backend.keep_compiled()
        for block in blocks_of(backbone.trunk):
            block.compile(dynamic=False)
    if config.checkpointing:
        checkpoint_blocks(backbone.trunk)
    return replace(backbone, text={name: tensor.to(backbone.device) for name, tensor in backbone.text.items()})


def blocks_of(trunk: nn.Module) -> list[nn.Module]:
    """The blocks of a trunk, in order."""
    return [block for blocks in block_lists(trunk) for block in blocks]


def checkpoint_blocks(trunk: nn.Module) -> None:
    """Keep only what enters each block; the backward pass computes the rest again."""
    for block in blocks_of(trunk):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def make_optimizer(config: LearnConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Adam or AdamW on the prompt and α, the only tensors with optimizer state."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.Adam(parameters, lr=config.learning_rate)


def rate_factor(iteration: int, config: LearnConfig) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    warm = min(1.0, (iteration + 1) / config.warmup)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / config.iterations))))


def shareable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for a file that is given away: of what lies on this machine, the names without their folders."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in settings.items()
    }
