"""Learning to see what is wrong with a picture: procedural scenes, clean, degraded once or twice; several labels at once.

Whatever tells nothing is made to vary in all pictures alike: sharpness (crops at two scales), tones, a little noise, and the
traces of JPEG. No photo is seen; the benchmark of `--task auto` measures on photos.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.engine.classify import FORMAT, GLANCE, PATCH, Classifier
from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import TASKS, degrade, seeds
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training.scenes import ScenePool

SIZES = (128, 128, 192)  # sides of the crops, a batch of one each


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of a run."""

    iterations: int = 800
    batch: int = 32
    scenes: int = 800
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    clean: float = 0.22  # share of pictures without a degradation
    two: float = 0.33  # share with two
    jpeg: float = 0.5  # share that was a JPEG
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed not in seeds("train"):
            raise EbrError(f"the seed must be one of training, from 0 to {seeds('train').stop - 1}, got {self.seed}")


def train(
    out: Path, config: ClassifierConfig = ClassifierConfig(), callback: Callable[[int, int, float], None] | None = None
) -> Classifier:
    """Learn a classifier and write it to `out`; `callback(iteration, iterations, loss)` after each iteration."""
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.iterations, pct_start=0.1)
    started = time.monotonic()
    with ScenePool(config.scenes, workers=1) as pool:
        for iteration in range(config.iterations):
            pictures, labels = draw_batch(pool, config, SIZES[iteration % len(SIZES)], generator)
            loss = F.binary_cross_entropy_with_logits(model(*glimpses(pictures, generator)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if callback is not None:
                callback(iteration + 1, config.iterations, loss.item())
    summary = asdict(config) | {"seconds": round(time.monotonic() - started)}
    save_classifier(out, model.eval(), summary)
    return model


def save_classifier(path: Path, model: Classifier, training: dict) -> None:
    """Write a classifier as safetensors, atomically."""
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    write_tensors(path, state, {"format": FORMAT, "labels": " ".join(TASKS), "training": json.dumps(training)})


def draw_batch(pool: ScenePool, config: ClassifierConfig, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, size, size] in [0, 1], and labels [B, 5], 1 where a task of TASKS is due."""
    clean, depth, _ = pool.crops(config.batch, size, generator)
    labels = draw_labels(config, generator)
    pictures = spoil(varied(clean, generator), depth, labels, generator)
    return as_stored(pictures, config.jpeg, generator), labels


def draw_labels(config: ClassifierConfig, generator: torch.Generator) -> Tensor:
    """Labels [B, 5] of none, one or two tasks, all tasks equally often."""
    labels = torch.zeros(config.batch, len(TASKS))
    for row in labels:
        u = torch.rand((), generator=generator).item()
        count = 0 if u < config.clean else 2 if u > 1 - config.two else 1
        row[torch.randperm(len(TASKS), generator=generator)[:count]] = 1
    return labels


def spoil(
    pictures: Tensor, depth: Tensor | None, labels: Tensor, generator: torch.Generator, strengths: Tensor | None = None
) -> Tensor:
    """Pictures [B, 3, H, W] degraded by every task that `labels` [B, 5] sets, in the order of TASKS.

    `strengths` [5], of each task; None draws them.
    """
    spoiled = pictures.clone()
    for task in TASKS:
        rows = labels[:, TASKS.index(task)].bool()
        if rows.any():
            strength = None if strengths is None else float(strengths[TASKS.index(task)])
            known = None if depth is None else depth[rows]
            spoiled[rows] = degrade(spoiled[rows], task, generator, depth=known, strength=strength)
    return spoiled


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The same pictures with other tones, as photographers and cameras leave them, and a little noise."""
    shape = (len(pictures), 1, 1, 1)

    def uniform(low: float, high: float, shape: tuple[int, ...] = shape) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    gamma, contrast = torch.exp(uniform(-0.35, 0.35)), uniform(0.75, 1.2)
    tint = uniform(0.94, 1.06, (len(pictures), 3, 1, 1))
    toned = ((pictures.clamp_min(1e-4) ** gamma - 0.45) * contrast + 0.45) * tint
    noise = torch.randn(pictures.shape, generator=generator) * uniform(0, 0.012)
    return (toned + noise).clamp(0, 1)


def as_stored(pictures: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Pictures rounded to 8 bit, a share of them as a JPEG of quality 60 to 95 gives them back."""
    import pyvips

    stored = (pictures * 255).round() / 255
    for index in range(len(stored)):
        chance, quality = torch.rand(2, generator=generator).tolist()
        if chance < share:
            array = (stored[index] * 255).byte().permute(1, 2, 0).contiguous().numpy()
            data = pyvips.Image.new_from_array(array).jpegsave_buffer(Q=60 + int(35 * quality))
            decoded = np.array(pyvips.Image.jpegload_buffer(data).numpy())
            stored[index] = torch.from_numpy(decoded).permute(2, 0, 1) / 255
    return stored


def glimpses(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the classifier looks at: a glance [B, 3, 64, 64] and two patches [B, 2, 3, 96, 96] at random places."""
    glance = F.interpolate(pictures, (GLANCE, GLANCE), mode="bilinear", antialias=True)
    room = pictures.shape[-1] - PATCH + 1
    places = torch.randint(0, room, (2, 2), generator=generator).tolist()
    patches = [pictures[..., top : top + PATCH, left : left + PATCH] for top, left in places]
    return glance, torch.stack(patches, dim=1)
