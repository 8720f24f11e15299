"""What a prompt does while it is learned, and in the end: pairs that it is not learned from, restored and scored."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.engine.fallback import Fitting
from ebr_engine.engine.restorer import Restorer
from ebr_engine.engine.run import Engine
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.pictures import sheet
from ebr_engine.evaluation.run import Row, means
from ebr_engine.evaluation.statistics import EMPTY, INPUT, RESTORED, worst
from ebr_engine.media.degradations import degrade, seeds
from ebr_engine.media.images import write_image
from ebr_engine.prompts.mixing import scaled
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.config import SCENE_SIDE, LearnConfig
from ebr_engine.training.data import pair_samples
from ebr_engine.training.learner import Learner
from ebr_engine.training.procedural import render


class InPlace(Engine):
    """Fits runs into memory without moving the transformer, which is being learned on."""

    def fallbacks(self, *how):
        """See `Engine.fallbacks`."""
        ways, work = super().fallbacks(*how)
        return [way for way in ways if way.offload == "none"], work


@dataclass
class Validation:
    """Degraded and clean clips [3, F, H, W] by name, the same every time; `sheets` are the last pictures."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    restorer: Restorer
    folder: Path
    sheets: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, config: LearnConfig, backbone: Backbone, folder: Path) -> "Validation":
        """The validation that a configuration names: the middles of pairs, or unseen procedural scenes."""
        if config.validation:
            samples = pair_samples(config, config.validation, whole=True)
            names = [pair.name for pair in samples.pairs[: config.validation_count]]  # by targets, which several may share
            names = [name if names.count(name) == 1 else f"{name}, pair {i}" for i, name in enumerate(names, 1)]
            pairs = {name: samples.pixels(i) for i, name in enumerate(names)}
        else:
            pairs = {f"scene {i}": _scene(config, i) for i in range(config.validation_count)}
        restorer = Restorer.from_backbone(InPlace(backbone, backbone.device, "none", "off", Fitting()))
        return cls(pairs, restorer, folder)

    def scores(self, learner: Learner) -> dict[str, float]:
        """Mean PSNR in dB and SSIM of what is restored now; writes a sheet a pair into samples/: degraded, restored, clean."""
        rows, self.sheets = [], []
        for i, (name, (degraded, clean)) in enumerate(self.pairs.items()):
            restored = self.restored(degraded, learner.prompt(), learner.config.steps)
            rows.append({"name": name, "scores": _scores(restored, clean)})
            self.sheets.append(_sheet({"degraded": degraded, "restored": restored, "clean": clean}))
            _write(self.folder / "samples" / f"{learner.iteration:08d}_{i}.png", self.sheets[-1])
        return {name: found["mean"] for name, found in means(rows, SCORES).items()}

    def rows(self, learner: Learner) -> tuple[list[Row], dict[str, str]]:
        """The rows of a report, with the input and the empty prompt beside the result; and of the worst name → file in worst/."""
        prompt, steps, rows, shown = learner.prompt(), learner.config.steps, [], {}
        for name, (degraded, clean) in self.pairs.items():
            ways = {INPUT: degraded, EMPTY: self.restored(degraded, scaled(prompt, 0.0), steps)}
            ways[RESTORED] = self.restored(degraded, prompt, steps)
            scores = {way: _scores(frames, clean) for way, frames in ways.items()}
            size = dict(zip(("frames", "height", "width"), clean.shape[1:]))
            rows.append({"name": name, **size, "scores": scores.pop(RESTORED), "beside": scores})
            shown[name] = _sheet(ways | {"target": clean})
        sheets = {name: f"{place}.png" for place, name in enumerate(worst(rows, "psnr"), 1)}
        for name, file in sheets.items():
            _write(self.folder / "worst" / file, shown[name])
        return rows, sheets

    @torch.no_grad()
    def restored(self, degraded: Tensor, prompt: Prompt, steps: int | None) -> Tensor:
        """A clip [3, F, H, W] as `Restorer.restore` gives it in `steps` (None: the default), in 8 bit."""
        plan = self.restorer.plan(prompt=prompt, steps=steps)
        return (self.restorer.run(degraded[None], plan)[0] * 255).round() / 255


SCORES = {"psnr": psnr, "ssim": ssim}


def _scores(result: Tensor, clean: Tensor) -> dict[str, float]:
    """Means over the frames of clips [3, F, H, W]."""
    frames = list(zip(result.unbind(1), clean.unbind(1)))
    return {name: sum(score(one[None], other[None]) for one, other in frames) / len(frames) for name, score in SCORES.items()}


def _sheet(clips: dict[str, Tensor]) -> np.ndarray:
    return sheet({name: clip[:, clip.shape[1] // 2] for name, clip in clips.items()})


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, pixels)


def _scene(config: LearnConfig, number: int) -> tuple[Tensor, Tensor]:
    """A procedural scene that no run learns from, whole, degraded."""
    seed = seeds("validation").start + number
    scene = render(seed, SCENE_SIDE)
    clean = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 255
    depth = torch.from_numpy(scene.depth)[None, None].float()
    degraded = degrade(clean.contiguous(), config.task, torch.Generator().manual_seed(seed), depth=depth)
    return degraded.movedim(0, 1), clean.movedim(0, 1)
