"""Pre-training of a bundled backbone from nothing, by flow matching on procedural material with captions; then it is frozen.

What is learned from is `mini`'s images, or another `Course`: `pretrain_sound.py` has that of `mini-audio`.

Objective: v = ε − x0 at x_t = (1−t)·x0 + t·ε (Lipman et al., arXiv 2210.02747). About half of the images are degraded, and the
caption says so; captions are dropped at random so that the empty text works. No photo and no pair of a degraded and a clean
image is ever seen: restoration is what prompts learn later.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.layers import cpu_has_bf16
from ebr_engine.backbones.mini.codec import OrthonormalCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import CODECS, CONTEXT_TOKENS, MINI, Mini, MiniTextEncoder, load_mini, save_mini
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.errors import EbrError
from ebr_engine.kernels import backend, learned_linear, tune
from ebr_engine.media import degradations
from ebr_engine.training import procedural
from ebr_engine.training.muon import Muon
from ebr_engine.training.pretrainee import Pretrainee, finished, use_learned_linear
from ebr_engine.training.scenes import ScenePool
from ebr_engine.training.supply import Recipe, Supply, crops_of, usable_cores
from ebr_engine.training.turning import turned

REPORTED = 50  # steps between two reports
GPU_BATCH = 384  # in place of 96: a GPU waits for the host with less
MEASURED = 64  # scenes that a new codec's statistics are taken over


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

    @property
    def recipe(self) -> Recipe:
        """What crops are made of."""
        counts = {size: max(1, round(self.batch * (self.sizes[0] / size) ** 2)) for size in self.sizes}
        return Recipe(self.sizes, counts, self.size_odds, self.degraded, self.caption_dropout)

    def __post_init__(self) -> None:
        if self.seed not in degradations.seeds("train"):
            raise EbrError(f"the seed must be one of training, from 0 to {degradations.seeds('train').stop - 1}, got {self.seed}")


@dataclass(frozen=True)
class Course:
    """What a backbone is pre-trained on."""

    model: WanConfig
    vocabulary: list[str] | None  # of captions; None: `mini`'s
    codec: Callable[[WanConfig], type]  # of a model's sizes
    measured: Callable[[type, Any, torch.Generator], OrthonormalCodec]  # (codec, pool, generator) → it with its statistics
    batch: Callable[..., tuple[Tensor, Tensor]]  # as `batch` below
    save: Callable[[Path, Mini], None]
    begin: Callable[[Path], Mini]  # a finished backbone to go on from
    pool: Callable[[PretrainConfig, int], Any] | None = None  # (settings, run) → a context with the material; None: scenes


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps, minutes of its budget that have passed, minutes that are left, and since the last report: crops a
    second and the mean loss by the crops' side."""

    iteration: int
    minutes: float
    left: float
    crops_a_second: float
    losses: dict[int, float]


def pretrain(
    out: Path,
    config: PretrainConfig,
    resume: bool = True,
    sizes: WanConfig | None = None,
    start: Path | None = None,
    *,
    course: Course | None = None,
    device: str = "cpu",
    data: Path | None = None,
    scenes: Path | None = None,
    ahead: bool | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] | None = None,
) -> None:
    """Train a backbone and write `out` (safetensors); an interrupted run goes on from its checkpoint (`.ckpt`).

    `course`: what it learns from, `mini`'s by default, and `sizes` of the model, if they are not the course's.
    `start`: weights to begin from in place of random ones, with a fresh optimizer; what is written tells both runs' training.
    `device`: `auto`, `cpu` or `cuda`. `data`: a folder of your own pictures and clips in place of procedural scenes. `scenes`: a
    file that keeps the first pool of scenes for the next run. `ahead`: whether processes make crops ahead, which a GPU needs and
    a CPU has no cores for (None: by the device). `tell` hears of every 50 steps, and of the last. `clock`: seconds that the
    minutes are counted by (None: the wall's), such as `time.process_time` where runs share a core.
    """
    course, clock = course or COURSE, clock or time.monotonic
    place = resolve_device(device)
    tune.for_long()
    if course.pool and (data or scenes):
        raise EbrError("pictures of your own, and scenes that are kept, are mini's; leave --data and --scenes out")
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    begun = course.begin(start) if start else None
    model = Pretrainee(begun.trunk.config if begun else sizes or course.model, course.vocabulary)
    if begun:
        model.begin_from(begun)
    model.to(place)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    precision = training_precision(place)
    if place.type == "cpu" and precision == torch.bfloat16 and learned_linear.serves():
        use_learned_linear(model.trunk)
    optimizers = make_optimizers(model, config, precision)
    checkpoint, kind = out.with_suffix(".ckpt"), course.codec(model.trunk.config)
    passed, iteration, runs = 0.0, 0, 0
    codec = begun.codec if begun else None
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=place)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        codec = kind(saved["mean"].cpu(), saved["scale"].cpu())
        passed, iteration, runs = saved["minutes"], saved["iteration"], saved["runs"] + 1
        generator.manual_seed(config.seed + runs)  # crops differ from the run before; scenes go on where it stopped

    history = {"before": begun.training} if begun else {}
    history |= {"data": "a folder of pictures"} if data else {}

    def save() -> None:
        state = {"model": model.state_dict(), "average": average, "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"mean": codec.mean.cpu(), "scale": codec.scale.cpu(), "minutes": passed, "iteration": iteration, "runs": runs}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)
        mine = {name: value.cpu() for name, value in average.items()}
        about = asdict(config) | {"minutes": round(passed, 1), "iterations": iteration} | history
        course.save(out, finished(model, mine, copy.deepcopy(codec).cpu(), about))

    if config.compile:
        backend.keep_compiled()
        # One graph a block and size, shared by all blocks: the whole model as one takes several times as long to compile.
        for block in model.trunk.blocks:
            block.compile(dynamic=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    cores, gpu = usable_cores(), place.type == "cuda"
    renewing = {"rate": math.inf, "renewers": max(1, cores // 4)} if gpu else {"rate": config.scenes_per_second}
    own = {"data": data} if data else {}
    kept = {"keep": scenes} if scenes and not runs else {}
    with ExitStack() as stack:
        log = stack.enter_context(out.with_suffix(".log.jsonl").open("a"))
        if gpu:
            stack.enter_context(backend.in_place())
        pool = stack.enter_context(
            course.pool(config, runs)
            if course.pool
            else ScenePool(config.pool, 256, first=runs * 10_000_000, workers=max(2, cores), **renewing, **own, **kept)
        )
        if codec is None:
            codec = course.measured(kind, pool, generator)
        codec = codec.to(place)
        supply = None
        if not course.pool and (gpu if ahead is None else ahead):
            places, workers = model.text_encoder.index, max(1, cores - cores // 4 - 1)
            seed = config.seed + 1000 * (runs + 1)
            supply = stack.enter_context(Supply(pool, config.recipe, places, CONTEXT_TOKENS, workers, place, seed))
        saved_at, sums, seen, recent = passed, {}, 0, clock()
        while passed < config.minutes:
            started = clock()
            scale = rate_factor(passed / config.minutes, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * scale
            # The first runs of a size compile; that happens early and counts in the budget as any other step does.
            size = config.recipe.size(generator)
            size = size if iteration >= len(config.sizes) else config.sizes[iteration]
            if supply is None:
                latent, ids = (x.to(place) for x in course.batch(pool, codec, model.text_encoder, config, size, generator))
            else:
                images, ids = supply.draw(size, generator)
                latent = codec.encode(images.unsqueeze(2))
            loss = step(model, latent, ids, generator, precision)
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
            passed += (clock() - started) / 60
            seen += len(latent)
            sums.setdefault(size, []).append(loss)
            if iteration % REPORTED == 0 or passed >= config.minutes:
                losses = {s: sum(v).item() / len(v) for s, v in sums.items()}
                seconds = max(clock() - recent, 1e-9)
                tell(Progress(iteration, passed, max(config.minutes - passed, 0.0), seen / seconds, losses))
                if iteration % REPORTED == 0:
                    record = {"iteration": iteration, "minutes": round(passed, 2), "lr": config.learning_rate * scale}
                    record |= {f"loss{s}": round(value, 4) for s, value in losses.items()}
                    record["seconds_per_iteration"] = round(seconds / REPORTED, 3)
                    record |= {"crops made": supply.made} if supply else {}
                    print(json.dumps(record), file=log, flush=True)
                    sums, seen, recent = {}, 0, clock()
            if passed - saved_at >= config.save_every:
                save()
                saved_at = passed
        save()


def step(model: Pretrainee, latent: Tensor, ids: Tensor, generator: torch.Generator, precision: torch.dtype) -> Tensor:
    """Forward and backward on clean latents: the loss, still on its device; gradients are in the parameters."""
    device = latent.device
    t = torch.sigmoid(torch.randn(len(latent), generator=generator) * 1.2 - 0.8).to(device)
    # Noise of a batch is drawn where it is needed: on a GPU the host would take longer than the step.
    noise = torch.randn(latent.shape, generator=generator if device.type == "cpu" else None, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        velocity = model(torch.lerp(latent, noise, t.view(-1, 1, 1, 1, 1)), t * 1000, ids)
    loss = F.mse_loss(velocity.float(), noise - latent)
    loss.backward()
    return loss.detach()


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is a device; `EbrError` where there is none and it is asked for."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EbrError("torch sees no CUDA device here; leave --device at auto")
    return torch.device(device)


def training_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where products of it are quick: on a GPU, and on a CPU that has instructions for them which oneDNN uses."""
    quick = device.type != "cpu" or (cpu_has_bf16() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if quick else torch.float32


def make_optimizers(
    model: nn.Module, config: PretrainConfig, precision: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (Jordan et al. 2024, with Adam-like step sizes), AdamW for everything else."""
    matrices = [p for name, p in model.trunk.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = [{"params": matrices, "initial_lr": config.learning_rate}]
    adam = [{"params": rest, "initial_lr": config.learning_rate / 2}]
    return [
        Muon(muon, weight_decay=config.weight_decay, precision=precision),
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
    images, words = crops_of(pool, config.recipe, size, generator)
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


COURSE = Course(
    model=MINI,
    vocabulary=None,
    codec=lambda sizes: CODECS[sizes.in_channels],
    measured=lambda kind, pool, generator: measured_codec(kind, *pool.crops(512, 64, generator)[:1]),
    batch=lambda *arguments: batch(*arguments),
    save=lambda out, mini: save_mini(out, mini),
    begin=lambda start: begin(load_mini(start)),
)


def line(progress: Progress) -> str:
    """A report for a person."""
    losses = ", ".join(f"{loss:.4f} at {size}" for size, loss in sorted(progress.losses.items()))
    speed = f"{progress.crops_a_second:.3g} crops a second"
    return f"step {progress.iteration}, {progress.minutes:.1f} minutes, {progress.left:.1f} left, {speed}, loss {losses}"


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m ebr_engine.training.pretrain`: as `ebr-engine train-backbone mini`, for machines without what that needs.

    Every field of `PretrainConfig` that is a number is an option.
    """
    parser = argparse.ArgumentParser(prog="python -m ebr_engine.training.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", "-o", type=Path, default=Path("mini.safetensors"))
    parser.add_argument("--device", default="auto")
    for name in ("data", "scenes"):
        parser.add_argument(f"--{name}", type=Path, help=f"as of train-backbone --{name}")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-resume", dest="resume", action="store_false")
    numbers = {field.name: field.type for field in fields(PretrainConfig) if field.type in (int, float)}
    for name, kind in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in numbers if getattr(options, name) is not None}
    try:
        config = PretrainConfig(**batch_for(options.device) | given, compile=options.compile)
        where = {"device": options.device, "data": options.data, "scenes": options.scenes}
        pretrain(options.out, config, options.resume, **where, tell=lambda progress: print(line(progress), flush=True))
    except EbrError as error:
        raise SystemExit(f"error: {error}") from error
    print(options.out)


def batch_for(device: str) -> dict[str, int]:
    """The setting that a GPU has another default of."""
    return {"batch": GPU_BATCH} if resolve_device(device).type == "cuda" else {}


if __name__ == "__main__":
    main()
