"""What is wrong with a picture: a small classifier of degradations, several labels at once; it needs nothing but torch.

Two looks at the picture: a glance at all of it, much reduced, which shows haze and darkness, and patches at full resolution,
each without its own mean and contrast, which show streaks, flakes and lost detail. Learned on procedural scenes by
`training/classifier.py`; its figures on real photos are those of `python -m benchmarks.quality auto-task`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.errors import EbrError
from ebr_engine.media.tiling import pad_to_multiple
from ebr_engine.prompts.catalogue import ASSETS, TASKS

FORMAT = "ebr-engine classifier 1"
WEIGHTS = ASSETS / "classifier.safetensors"
GLANCE = 64  # side of the reduced picture
PATCH = 96  # side of a patch
PATCHES = 4  # at most so many across, and down
LONGEST = 1024  # a larger picture is reduced to it first: what is not seen there, nobody complains of
SURE = 0.5  # probability from which a label counts
STRIDE = 16  # pixels that the deepest features are apart
WIDTHS = (24, 48, 64, 64)


class Classifier(nn.Module):
    """A glance [B, 3, 64, 64] and patches [B, N, 3, h, w] of pictures in [0, 1] → logits [B, 5], a label of TASKS each."""

    def __init__(self) -> None:
        super().__init__()
        self.glance, self.patches = _encoder(), _encoder()
        self.head = nn.Sequential(nn.Linear(4 * WIDTHS[-1], 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, len(TASKS)))

    def forward(self, glance: Tensor, patches: Tensor) -> Tensor:
        level = patches.mean((2, 3, 4), keepdim=True)
        contrast = patches.std((2, 3, 4), keepdim=True)
        patches = (patches - level) / (contrast + 0.02)
        count = patches.shape[1]
        seen = self.patches(patches.flatten(0, 1)).unflatten(0, (-1, count)).transpose(1, 2)  # [B, C, N, h, w]
        return self.head(torch.cat((_pooled(self.glance(2 * glance - 1)), _pooled(seen)), dim=1))


@dataclass(frozen=True)
class Diagnosis:
    """How probable each degradation of TASKS is in a picture, and the tasks to choose for it."""

    probability: dict[str, float]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The labels that are sure enough; none for a picture with nothing to repair.

        In the order to mend them, which is that of TASKS from its end: what came to the picture last goes first.
        """
        return tuple(task for task in reversed(TASKS) if self.probability[task] >= SURE)

    @property
    def likeliest(self) -> str:
        """The most probable degradation, however improbable."""
        return max(self.probability, key=self.probability.__getitem__)

    def __str__(self) -> str:
        chosen = self.tasks
        if not chosen:
            return f"nothing to repair (likeliest: {self.likeliest} {self.probability[self.likeliest]:.0%})"
        return " + ".join(f"{task} {self.probability[task]:.0%}" for task in chosen)


@torch.no_grad()
def diagnose(pictures: Sequence[Tensor], model: Classifier | None = None) -> Diagnosis:
    """What is wrong with a picture [3, H, W] in [0, 1], or with all of several frames of a clip: their logits' mean.

    `model`: another classifier than the bundled one. Raises `EbrError` when its file is missing or damaged.
    """
    model = model or bundled()
    logits = torch.stack([model(*views(picture))[0] for picture in pictures]).mean(0)
    return Diagnosis(dict(zip(TASKS, logits.sigmoid().tolist())))


def views(picture: Tensor) -> tuple[Tensor, Tensor]:
    """The glance [1, 3, 64, 64] and the patches [1, N, 3, h, w] of a picture [3, H, W] in [0, 1]."""
    whole = picture[None].float()
    longest = max(whole.shape[-2:])
    if longest > LONGEST:
        shape = [max(1, round(side * LONGEST / longest)) for side in whole.shape[-2:]]
        whole = F.interpolate(whole, shape, mode="bilinear", antialias=True)
    glance = F.interpolate(whole, (GLANCE, GLANCE), mode="bilinear", antialias=True)
    if min(whole.shape[-2:]) < PATCH:
        whole = pad_to_multiple(whole, STRIDE)
    tops, lefts = (_spread(side) for side in whole.shape[-2:])
    patches = [whole[..., top : top + PATCH, left : left + PATCH] for top in tops for left in lefts]
    return glance, torch.stack(patches, dim=1)


def load_classifier(path: Path) -> Classifier:
    """A classifier written by `training.classifier.train`; `EbrError` for a file that is missing, damaged or of another kind."""
    model = Classifier()
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EbrError(f"{path}: no classifier of degradations could be read there ({' '.join(str(error).split())})") from error
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    if metadata.get("format") != FORMAT or metadata.get("labels") != " ".join(TASKS):
        raise EbrError(f"{path}: is not a classifier of {', '.join(TASKS)}")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in (state | counters).items()} != shapes:
        raise EbrError(f"{path}: does not hold the tensors of this version's classifier")
    model.load_state_dict(state | counters)
    return model.eval().requires_grad_(False)


@cache
def bundled() -> Classifier:
    """The classifier that comes with the package."""
    return load_classifier(WEIGHTS)


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
    before = 12
    for width in WIDTHS:
        stride = 1 if before == 12 else 2
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers)


def _pooled(features: Tensor) -> Tensor:
    """Mean and spread over all places: [B, C, ...] → [B, 2C]."""
    features = features.flatten(2)
    return torch.cat((features.mean(2), features.var(2, unbiased=False).add(1e-6).sqrt()), dim=1)


def _spread(side: int) -> list[int]:
    """Starts of the patches along a side: enough to cover it, at most PATCHES, evenly."""
    if side <= PATCH:
        return [0]
    count = min(PATCHES, math.ceil(side / PATCH))
    return [round(index * (side - PATCH) / (count - 1)) for index in range(count)]
