"""What a prompt does while it is learned: pairs that it is not learned from, restored and scored every so often."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebr_engine.backbones.loading import Backbone
from ebr_engine.bridge import make_table
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.media.images import write_image
from ebr_engine.sampler import draw_noise, sample
from ebr_engine.spinning import seen, spun
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import pair_samples
from ebr_engine.training.degradations import degrade, seeds
from ebr_engine.training.learner import Learner
from ebr_engine.training.procedural import render

SEED = 42  # of the sampler's noise, as the engine's


@dataclass
class Validation:
    """Degraded and clean clips [3, F, H, W], the same every time; `sheets` are the last pictures."""

    pairs: list[tuple[Tensor, Tensor]]
    parts: Backbone
    folder: Path
    sheets: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, config: LearnConfig, parts: Backbone, folder: Path) -> "Validation":
        """The validation that a configuration names: the middles of pairs, or of unseen procedural scenes."""
        if config.validation:
            samples = pair_samples(config, config.validation, whole=True)
            pairs = [samples.pixels(i) for i in range(min(config.validation_count, len(samples)))]
        else:
            pairs = [_scene(config, i) for i in range(config.validation_count)]
        return cls(pairs, parts, folder / "samples")

    @torch.no_grad()
    def scores(self, learner: Learner) -> dict[str, float]:
        """Mean PSNR in dB and SSIM of 8-bit results; writes a sheet a pair: degraded, restored, clean."""
        config = learner.config
        prompt = learner.prompt()
        table = make_table("fast", config.t0, config.on_policy or None)
        timesteps = torch.tensor(table.times[:-1], device=self.parts.device) * 1000
        tables = [self.live_step(learner, t, prompt) for t in timesteps]
        found: dict[str, list[float]] = {"psnr": [], "ssim": []}
        self.sheets = []
        for i, (degraded, clean) in enumerate(self.pairs):
            latent = self.parts.codec.encode(degraded[None].to(self.parts.device))
            noise = draw_noise(latent.shape, SEED, latent.device) * self.parts.noise
            velocity = spun(self.parts.velocity, self.parts.codec, latent) if learner.views else self.parts.velocity
            restored = self.parts.codec.decode(sample(velocity, seen(tables, learner.views), latent, noise, table))[0]
            restored = (restored.cpu().clamp(0, 1) * 255).round() / 255
            frames = list(zip(restored.unbind(1), clean.unbind(1)))
            found["psnr"] += [psnr(one[None], other[None]) for one, other in frames]
            found["ssim"] += [ssim(one[None], other[None]) for one, other in frames]
            middle = clean.shape[1] // 2
            row = torch.cat([x[:, middle] for x in (degraded, restored, clean)], dim=2)
            self.sheets.append(row.permute(1, 2, 0).numpy())
            self.folder.mkdir(parents=True, exist_ok=True)
            write_image(self.folder / f"{learner.iteration:08d}_{i}.png", self.sheets[-1])
        return {name: sum(values) / len(values) for name, values in found.items()}

    @staticmethod
    def live_step(learner: Learner, t: Tensor, prompt) -> object:
        """The trunk's step at timestep `t` with a prompt."""
        return learner.live(t[None], prompt.residual.to(t.device), prompt.alpha.to(t.device))


def _scene(config: LearnConfig, number: int) -> tuple[Tensor, Tensor]:
    """The middle of a procedural scene that no run learns from, degraded."""
    seed = seeds("validation").start + number
    scene = render(seed, max(config.crop))
    h, w = config.crop
    top, left = ((side - length) // 2 for side, length in zip(scene.image.shape[:2], config.crop))
    clean = torch.from_numpy(scene.image).permute(2, 0, 1)[None, :, top : top + h, left : left + w].float() / 255
    depth = torch.from_numpy(scene.depth)[None, None, top : top + h, left : left + w].float()
    degraded = degrade(clean.contiguous(), config.task, torch.Generator().manual_seed(seed), depth=depth)
    return degraded.movedim(0, 1), clean.movedim(0, 1)
