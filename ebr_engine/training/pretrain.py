"""Pre-training of a bundled backbone from nothing, by flow matching on procedural material with captions; then it is frozen.

What is learned from is a `Course`: here `mini`'s, on images; `pretrain_sound.py` has that of `mini-audio`.

Objective: v = ε − x0 at x_t = (1−t)·x0 + t·ε (Lipman et al., arXiv 2210.02747). About half of the images are degraded, and the
caption says so; captions are dropped at random so that the empty text works. No photo and no pair of a degraded and a clean
image is ever seen: restoration is what prompts learn later.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.mini.codec import OrthonormalCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import CODECS, CONTEXT_TOKENS, MINI, Mini, MiniTextEncoder, load_mini, save_mini
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanStep, WanTrunk
from ebr_engine.errors import EbrError
from ebr_engine.media import degradations
from ebr_engine.training import procedural
from ebr_engine.training.scenes import ScenePool
from ebr_engine.training.turning import turned

CLEAN_WORD = "clean"
MEASURED = 64  # scenes that a new codec's statistics are taken over
VOCABULARY = [*procedural.CAPTION_WORDS, *degradations.CAPTION_WORDS, CLEAN_WORD]


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run; the learning rate follows the share of `minutes` that has passed."""

    minutes: float = 90.0
    seed: int = 0
    batch: int = 96  # crops of 64×64 a step; larger crops come in smaller batches of as many tokens
    sizes: tuple[int, ...] = (64, 128, 256)
    size_odds: tuple[float, ...] = (0.4, 0.4, 0.2)
    learning_rate: float = 2e-3
    warmup: float = 0.02  # share of the run
    decay: float = 0.35  # share of the run, at the end
    weight_decay: float = 0.01
    ema: float = 0.999
    caption_dropout: float = 0.3
    degraded: float = 0.55  # share of images
    pool: int = 1024  # scenes held at a time
    scenes_per_second: float = 2.5
    save_every: float = 5.0  # minutes
    compile: bool = True

    def __post_init__(self) -> None:
        if self.seed not in degradations.seeds("train"):
            raise EbrError(f"the seed must be one of training, from 0 to {degradations.seeds('train').stop - 1}, got {self.seed}")


@dataclass(frozen=True)
class Course:
    """What a backbone is pre-trained on."""

    model: WanConfig
    vocabulary: list[str]  # of captions
    codec: Callable[[WanConfig], type]  # of a model's sizes
    pool: Callable[[PretrainConfig, int], Any]  # (settings, run) → a context with the material
    measured: Callable[[type, Any, torch.Generator], OrthonormalCodec]  # (codec, pool, generator) → it with its statistics
    batch: Callable[..., tuple[Tensor, Tensor]]  # as `batch` below
    save: Callable[[Path, Mini], None]
    begin: Callable[[Path], Mini]  # a finished backbone to go on from


class Pretrainee(nn.Module):
    """Text encoder, conditioner and trunk as one module under training."""

    def __init__(self, config: WanConfig = MINI, vocabulary: list[str] = VOCABULARY):
        super().__init__()
        self.text_encoder = MiniTextEncoder(vocabulary, config.text_dim)
        self.conditioner = WanConditioner(config)
        self.trunk = WanTrunk(config)
        self.initialise()

    def initialise(self) -> None:
        """Xavier weights, zero biases, and gates at a small value, so that a block starts near the identity."""
        for module in (self.conditioner, self.trunk):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.conditioner.kv_weight, std=self.conditioner.config.width**-0.5)
        nn.init.normal_(self.conditioner.time_in.weight, std=0.02)
        nn.init.zeros_(self.conditioner.time_proj.weight)
        with torch.no_grad():
            self.conditioner.scale_shift[:, 2::3] = 0.1
        nn.init.normal_(self.trunk.patch_out.weight, std=0.02)

    def begin_from(self, mini: Mini) -> None:
        """Take over a finished backbone's weights; `EbrError` when its captions have other words."""
        if mini.text_encoder.vocabulary != self.text_encoder.vocabulary:
            raise EbrError("these weights were trained with captions of other words; start from nothing")
        for part in ("text_encoder", "conditioner", "trunk"):
            getattr(self, part).load_state_dict(getattr(mini, part).state_dict())

    def forward(self, latent: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Velocity of noisy latents [B, C, F, h, w] at timesteps [B] with captions as token ids [B, 16]."""
        modulation, head = self.conditioner.modulations(timestep)
        context = self.conditioner.encode_text(self.text_encoder(ids))
        key, value = self.conditioner.keys_values(context)
        no_prompt = key.new_zeros(key.shape[0], 0, key.shape[2], 1, key.shape[4])
        weight = modulation.new_zeros(key.shape[0], 0)
        log_count = modulation.new_zeros(CONTEXT_TOKENS)
        return self.trunk(latent, WanStep(modulation, head, key, value, log_count, no_prompt, no_prompt, weight))


def pretrain(
    out: Path,
    config: PretrainConfig,
    resume: bool = True,
    sizes: WanConfig | None = None,
    start: Path | None = None,
    course: Course | None = None,
) -> None:
    """Train a backbone and write `out` (safetensors); an interrupted run goes on from its checkpoint (`.ckpt`).

    `course`: what it learns from, `mini`'s by default, and `sizes` of the model, if they are not the course's. `start`: weights
    to begin from in place of random ones, with a fresh optimizer; what is written tells both runs' training.
    """
    course = course or COURSE
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    begun = course.begin(start) if start else None
    model = Pretrainee(begun.trunk.config if begun else sizes or course.model, course.vocabulary)
    if begun:
        model.begin_from(begun)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = make_optimizers(model, config)
    checkpoint, kind = out.with_suffix(".ckpt"), course.codec(model.trunk.config)
    passed, iteration, runs = 0.0, 0, 0
    codec = begun.codec if begun else None
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        codec = kind(saved["mean"], saved["scale"])
        passed, iteration, runs = saved["minutes"], saved["iteration"], saved["runs"] + 1
        generator.manual_seed(config.seed + runs)  # crops differ from the run before; scenes go on where it stopped

    history = {"before": begun.training} if begun else {}

    def save() -> None:
        state = {"model": model.state_dict(), "average": average, "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"mean": codec.mean, "scale": codec.scale, "minutes": passed, "iteration": iteration, "runs": runs}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)
        course.save(
            out,
            finished(model, average, codec, asdict(config) | {"minutes": round(passed, 1), "iterations": iteration} | history),
        )

    if config.compile:
        # One graph a block and size, shared by all blocks: the whole model as one takes several times as long to compile.
        for block in model.trunk.blocks:
            block.compile(dynamic=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log.jsonl").open("a")
    with course.pool(config, runs) as pool:
        if codec is None:
            codec = course.measured(kind, pool, generator)
        saved_at, sums, recent = passed, {}, time.monotonic()
        while passed < config.minutes:
            started = time.monotonic()
            scale = rate_factor(passed / config.minutes, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * scale
            # The first runs of a size compile; that happens early and counts in the budget as any other step does.
            which = int(torch.multinomial(torch.tensor(config.size_odds), 1, generator=generator))
            size = config.sizes[which] if iteration >= len(config.sizes) else config.sizes[iteration]
            latent, ids = course.batch(pool, codec, model.text_encoder, config, size, generator)
            t = torch.sigmoid(torch.randn(len(latent), generator=generator) * 1.2 - 0.8)
            noise = torch.randn(latent.shape, generator=generator)
            view = t.view(-1, 1, 1, 1, 1)
            with torch.autocast("cpu", torch.bfloat16):
                velocity = model(torch.lerp(latent, noise, view), t * 1000, ids)
            loss = F.mse_loss(velocity.float(), noise - latent)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if torch.isfinite(norm):
                for optimizer in optimizers:
                    optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            decay = min(config.ema, (iteration + 1) / (iteration + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - decay)
            iteration += 1
            passed += (time.monotonic() - started) / 60
            sums.setdefault(size, []).append(loss.item())
            if iteration % 50 == 0:
                record = {"iteration": iteration, "minutes": round(passed, 2), "lr": config.learning_rate * scale}
                record |= {f"loss{s}": round(sum(v) / len(v), 4) for s, v in sums.items()}
                record["seconds_per_iteration"] = round((time.monotonic() - recent) / 50, 3)
                print(json.dumps(record), file=log, flush=True)
                sums, recent = {}, time.monotonic()
            if passed - saved_at >= config.save_every:
                save()
                saved_at = passed
        save()
    log.close()


def make_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (Jordan et al. 2024, with Adam-like step sizes), AdamW for everything else."""
    matrices = [p for name, p in model.trunk.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = [{"params": matrices, "initial_lr": config.learning_rate}]
    adam = [{"params": rest, "initial_lr": config.learning_rate / 2}]
    return [
        torch.optim.Muon(muon, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(progress: float, config: PretrainConfig) -> float:
    """Warm-up, constant, then linear to zero; `progress` is the share of the run's time that has passed."""
    warm = min(1.0, (progress + 1e-3) / config.warmup)
    return warm * min(1.0, max(0.0, 1 - progress) / config.decay)


def batch(
    pool: ScenePool,
    codec: OrthonormalCodec,
    text: MiniTextEncoder,
    config: PretrainConfig,
    size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Latents [B, C, 1, h, w] of clean and degraded crops, shuffled by construction, and their captions' ids [B, 16]."""
    count = max(1, round(config.batch * (config.sizes[0] / size) ** 2))
    clean, depth, captions = pool.crops(count, size, generator)
    tasks = torch.randint(len(degradations.TASKS), (count,), generator=generator)
    tasks[torch.rand(count, generator=generator) >= config.degraded] = -1
    strength = torch.rand(count, generator=generator)
    dropped = torch.rand(count, generator=generator) < config.caption_dropout
    images = clean.clone()
    for number, task in enumerate(degradations.TASKS):
        chosen = (tasks == number).nonzero().flatten()
        if len(chosen):
            images[chosen] = degradations.degrade(clean[chosen], task, generator, depth=depth[chosen], strength=strength[chosen])
    words = []
    for i, caption in enumerate(captions):
        damage = (CLEAN_WORD,)
        if tasks[i] >= 0:
            damage = (degradations.strength_word(float(strength[i])), degradations.TASKS[tasks[i]])
        words.append(() if dropped[i] else (*damage, *caption))
    return codec.encode(images.unsqueeze(2)), text.tokenize(words)


def measured_codec(kind: type, clean: Tensor) -> OrthonormalCodec:
    """A codec with its channels' statistics over clean crops [B, 3, H, W]; fine chroma is kept above quantisation noise."""
    plain = kind()
    latent = plain.encode(clean.unsqueeze(2)).transpose(0, 1).flatten(1)
    mean = torch.where(plain.tones, latent.mean(1), torch.zeros(plain.channels))
    std = latent.std(1).clamp(min=0.01)
    return kind(mean, (std * std.mean()).sqrt())


def begin(mini: Mini) -> Mini:
    """A finished backbone to go on from: one over the block codec is turned to the lapped codec."""
    if isinstance(mini.codec, LappedCodec):
        return mini
    clean = torch.stack([torch.from_numpy(procedural.render(seed, 256).image) for seed in range(MEASURED)])
    return turned(mini, measured_codec(LappedCodec, clean.permute(0, 3, 1, 2).float() / 255))


def finished(model: Pretrainee, average: dict[str, Tensor], codec: OrthonormalCodec, training: dict) -> Mini:
    """A frozen backbone from the averaged weights."""
    copy = Pretrainee(model.trunk.config, model.text_encoder.vocabulary)
    copy.load_state_dict(average)
    copy.requires_grad_(False)
    context = copy.text_encoder(copy.text_encoder.tokenize([()]))[0]
    return Mini(copy.conditioner, copy.trunk, codec, copy.text_encoder, context, training)


COURSE = Course(
    model=MINI,
    vocabulary=VOCABULARY,
    codec=lambda sizes: CODECS[sizes.in_channels],
    pool=lambda config, run: ScenePool(config.pool, 256, first=run * 10_000_000, rate=config.scenes_per_second),
    measured=lambda kind, pool, generator: measured_codec(kind, *pool.crops(512, 64, generator)[:1]),
    batch=lambda *arguments: batch(*arguments),
    save=save_mini,
    begin=lambda start: begin(load_mini(start)),
)
