"""O. Past the paper: which codec for `mini`? Blocks or lapped functions, with equal minutes, prompts and sampling.

All begin with the weights that were pre-trained over blocks of 4×4 pixels, a token of 2×2 of them, and are pre-trained on for the
same processor time: as they are, turned to blocks of 8×8, and turned to the lapped transform, which differs from these in its
filter over the borders alone. *moved, levelled*: the grid of tokens lies elsewhere in each step and the mean of the picture's
detail is kept, as `mini` ships; *plain*: neither.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.common import TINY, Row, Study, arguments, save_random, study_of
from benchmarks.claims.learning import config_of, fitted, path_of
from benchmarks.claims.reporting import command_of, finish, means_by_task
from benchmarks.evaluations import grid
from benchmarks.report import ROOT
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.mini.codec import OrthonormalCodec, PixelCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import MINI, Mini, load_mini
from ebr_engine.engine.fallback import Fitting
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.photos import TEN, Case
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.training import procedural
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.learner import Learner
from ebr_engine.training.pretrain import COURSE, MEASURED, PretrainConfig, measured_codec, pretrain
from ebr_engine.training.turning import turned
from ebr_engine.training.validation import InPlace

OVER_BLOCKS = "dd19407:ebr_engine/assets/mini/mini.safetensors"  # in the repository: the weights before the lapped codec
TASKS = ("haze", "rain", "snow", "lowlight")
DETAIL = {"haze": "input", "lowlight": "input"}  # whose detail, as the bundled prompts have it
MINUTES = 8.0  # of processor time of each pre-training
CONTINUED = {"batch": 64, "size_odds": (0.2, 0.5, 0.3), "learning_rate": 1e-3, "decay": 0.7, "ema": 0.99}
FEW_SCENES = {"pool": 256, "scenes_per_second": 0.4, "compile": False, "seed": 2}
PROMPT = {"tokens": 64, "per_block": True, "unroll": 2}
REFERENCE = "lapped: moved, levelled"


class EightCodec(LappedCodec):
    """Blocks of 8×8 pixels: the lapped codec without its filter over their borders."""

    def __init__(self, mean: Tensor | None = None, scale: Tensor | None = None):
        super().__init__(mean, scale)
        self.overlap.copy_(torch.eye(len(self.overlap)))


CODECS = {"blocks of 4": PixelCodec, "blocks of 8": EightCodec, "lapped": LappedCodec}
SAMPLING = {  # what `OrthonormalCodec`s say of it
    "moved, levelled": {"offsets": LappedCodec.offsets, "levels": True, "noise": LappedCodec.noise},
    "plain": {"offsets": ((0, 0),), "levels": False, "noise": LappedCodec.noise},
}


@dataclass(frozen=True)
class GridStudy(Study):
    """A study that also measures the grid which a picture shows beyond the clean one's."""

    def _rows(self, restore, task, seed, arm, how) -> list[Row]:
        found = []

        def remembered(case: Case, number: int) -> Tensor:
            found.append((restore(case, number).clamp(0, 1) * 255).round() / 255)
            return found[-1]

        rows = super()._rows(remembered, task, seed, arm, how)
        cases = self.cases(task, seed, how)
        return [row | {"grid": grid(result) - grid(case.clean)} for row, result, case in zip(rows, found, cases)]


def over_blocks(study: Study) -> Path:
    """The weights that all begin with, from the repository's history; kept in `work`."""
    path = study.work / "over_blocks.safetensors"
    if not path.exists():
        study.work.mkdir(parents=True, exist_ok=True)
        held = subprocess.run(["git", "show", OVER_BLOCKS], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        path.write_bytes(held)
    return path


def begun(mini: Mini, kind: type[OrthonormalCodec]) -> Mini:
    """The weights over blocks of 4×4 for a codec of this kind, whose statistics are measured as pre-training does."""
    if kind is PixelCodec:
        return mini
    clean = torch.stack([torch.from_numpy(procedural.render(seed, 256).image) for seed in range(MEASURED)])
    return turned(mini, measured_codec(kind, clean.permute(0, 3, 1, 2).float() / 255))


def pretrained(study: Study, name: str, minutes: float) -> Path:
    """The weights after more minutes of processor time over one of the `CODECS`; an interrupted run goes on."""
    path, kind = study.work / f"over_{name.replace(' ', '_')}_{minutes:g}.safetensors", CODECS[name]
    if not path.exists() or path.with_suffix(".ckpt").exists():
        course = replace(COURSE, codec=lambda sizes: kind, begin=lambda start: begun(load_mini(start), kind))
        settings = PretrainConfig(minutes=minutes, **CONTINUED, **FEW_SCENES)
        pretrain(path, settings, start=over_blocks(study), course=course, clock=time.process_time)
        path.with_suffix(".ckpt").unlink(missing_ok=True)
    return path


def sampled(backbone: Backbone, name: str, how: str) -> Backbone:
    """The backbone over one of the `CODECS`, sampled in one of these ways."""
    codec = CODECS[name](backbone.codec.mean, backbone.codec.scale)
    for field, value in SAMPLING[how].items():
        setattr(codec, field, value)
    changed = copy(backbone)
    changed.codec = codec
    return changed


def arms(study: Study, backbones: dict[str, Path]) -> dict[str, Callable[[Case, int], Tensor]]:
    """The input, and prompts learned over every codec in both ways of sampling, which they are learned for and restore with."""

    @lru_cache(maxsize=1)  # arms come one after the other
    def engine(name: str, how: str) -> tuple[Backbone, Restorer]:
        config = config_of(study, study.tasks[0], 0)
        loaded = sampled(Restorer("mini", model=backbones[name], precision=config.precision).backbone, name, how)
        return loaded, Restorer.from_backbone(InPlace(loaded, loaded.device, "none", "off", Fitting()))

    def restored(name: str, how: str):
        own = replace(study, model=backbones[name])

        @cache
        def prompt(task: str, seed: int):
            changes = PROMPT | {"detail": DETAIL.get(task, "model")} | ({"tokens": 4} if study.quick else {})
            path = path_of(own, task, seed, {"variant": f"{name}: {how}"} | changes)
            if not path.exists():

                def start(config: LearnConfig, _: Backbone) -> Learner:
                    return Learner.start(config, engine(name, how)[0])

                fitted(own, config_of(own, task, seed, **changes), start).prompt().save(path)
            return load_prompt(path)

        def run(case: Case, seed: int) -> Tensor:
            learned = prompt(case.task, seed)
            restorer = engine(name, how)[1]
            return restorer.run(case.degraded, restorer.plan(prompt=learned), detail=learned.detail)

        return run

    found: dict[str, Callable[[Case, int], Tensor]] = {"input": lambda case, seed: case.degraded}
    for how in SAMPLING:
        for name in reversed(CODECS):
            found[f"{name}: {how}"] = restored(name, how)
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of processor time, for each pre-training ({MINUTES:g})")
    parser.set_defaults(photos=TEN, seeds=(0,), size=256, steps=2, iterations=120, batch=8, crop=96, scenes=256)
    options = parser.parse_args(given)
    study = study_of("o_codec", options, TASKS)
    study = GridStudy(**{field.name: getattr(study, field.name) for field in fields(study)})
    if study.quick:
        sizes = {"blocks of 4": TINY, "blocks of 8": small(MINI), "lapped": small(MINI)}
        backbones = {
            name: save_random(study.work / f"{name}.safetensors", sizes[name], codec=kind(), gain=10)
            for name, kind in CODECS.items()
        }
    else:
        backbones = {name: pretrained(study, name, options.minutes) for name in CODECS}
    notes = [f"{name}: {load_mini(path).training.get('iterations', 0)} iterations on" for name, path in backbones.items()]
    rows = study.measure(arms(study, backbones), minutes=options.minutes)
    notes += means_by_task(rows, "ssim", "SSIM", 3) + means_by_task(rows, "grid", "grid in 1/255", 2)
    finish(study, "O. Which codec?", rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


def small(sizes: Any) -> Any:
    """A model over the lapped codec's channels that is as small as the other quick ones."""
    return replace(TINY, patch_size=sizes.patch_size, in_channels=sizes.in_channels, out_channels=sizes.out_channels)


if __name__ == "__main__":
    main()
