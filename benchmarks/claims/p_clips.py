"""P. Past the paper: does `mini` gain by having seen clips? The same weights pre-trained on, on pictures or on clips as well.

Both arms go on from the bundled weights for the same processor time. Clips are procedural scenes in motion (the cameras and
layers of `evaluation/moving.py`); every second step still has pictures. Prompts are learned on each: on pictures, or on clips
whose frames the transformer sees together. The clips that are restored are photos in motion, nine frames each, in chunks of five
that share two. *agree*: restored frames agree along their motion, as the engine has it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import clips
from benchmarks.claims.common import Row, Study, arguments, study_of
from benchmarks.claims.learning import config_of, fitted, path_of
from benchmarks.claims.reporting import command_of, finish, means_by_task
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.mini.codec import OrthonormalCodec
from ebr_engine.backbones.mini.model import MiniTextEncoder, load_mini
from ebr_engine.engine.fallback import Fitting
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.moving import CLIPS, ROOM, Clip, camera, filmed, make_clip, passed_by
from ebr_engine.media import degradations
from ebr_engine.media.motion import agreed
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import SceneSamples, seeded
from ebr_engine.training.learner import Learner
from ebr_engine.training.pretrain import COURSE, PretrainConfig, batch, pretrain
from ebr_engine.training.scenes import ScenePool
from ebr_engine.training.supply import CLEAN_WORD
from ebr_engine.training.validation import InPlace

TASKS = ("rain", "snow")
FRAMES, SHARED = 5, 2  # of a chunk, and of these how many the next one has too
MINUTES = 10.0  # of processor time of each pre-training
CONTINUED = {"batch": 60, "sizes": (64, 128), "size_odds": (0.6, 0.4), "learning_rate": 1e-3, "decay": 0.7, "ema": 0.99}
FEW_SCENES = {"pool": 256, "scenes_per_second": 0.4, "compile": False, "seed": 3}
PROMPT = {"tokens": 64, "per_block": True, "unroll": 2}
MATERIAL = ("pictures", "clips")
WINDOW = 3  # frames on either side that a frame agrees with
REFERENCE = "pictures: frames agree"


def scenes_in_motion(pool: ScenePool, count: int, size: int, generator: torch.Generator) -> tuple[list[Tensor], list[tuple]]:
    """Clean clips [FRAMES, 3, size, size] of scenes, half of them with a piece of another that passes by; their captions."""
    side = min(round(ROOM * size), pool.pixels.shape[-1])
    still, _, captions = pool.crops(2 * count, side, generator)
    made = []
    for i in range(count):
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        clip = filmed(still[i : i + 1], camera(rng, FRAMES), size)
        if i % 2:
            clip = passed_by(rng, clip, filmed(still[count + i : count + i + 1], camera(rng, 1), size)[0])
        made.append(clip)
    return made, captions[:count]


def mixed_batch(
    pool: ScenePool,
    codec: OrthonormalCodec,
    text: MiniTextEncoder,
    config: PretrainConfig,
    size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """As `pretrain.batch`; every second one at random is of clips, latents [B, C, FRAMES, h, w] of as many frames together."""
    if torch.rand(1, generator=generator) < 0.5:
        return batch(pool, codec, text, config, size, generator)
    clean, captions = scenes_in_motion(pool, max(1, config.recipe.counts[size] // FRAMES), size, generator)
    made, words = [], []
    for clip, caption in zip(clean, captions):
        damage, strength = (CLEAN_WORD,), float(torch.rand(1, generator=generator))
        if torch.rand(1, generator=generator) < config.degraded:
            task = degradations.TASKS[int(torch.randint(len(degradations.TASKS), (1,), generator=generator))]
            clip = degradations.degrade_clip(clip, task, generator, strength=strength)
            damage = (degradations.strength_word(strength), task)
        dropped = torch.rand(1, generator=generator) < config.caption_dropout
        made.append(clip)
        words.append(() if dropped else (*damage, *caption))
    return codec.encode(torch.stack(made).transpose(1, 2)), text.tokenize(words)


class MovingSamples(SceneSamples):
    """Clips of procedural scenes in motion, degraded by the task as one camera would see it."""

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """See `Samples`."""
        generator = seeded(self.config.seed, "moving scene", number)
        (clean,), _ = scenes_in_motion(self.pool, 1, self.config.crop[0], generator)
        degraded = degradations.degrade_clip(clean, self.config.task, generator)
        return degraded.transpose(0, 1), clean.transpose(0, 1)


@dataclass(frozen=True)
class ClipStudy(Study):
    """A study whose cells are clips in place of photos."""

    clips: int = CLIPS
    frames: int = 9

    @property
    def settings(self) -> dict:
        """See `Study.settings`."""
        return super().settings | {"photos": self.clips, "frames": self.frames}

    def _rows(self, restore: Callable[[Clip, int], Tensor], task: str, seed: int, arm: str, how: None) -> list[Row]:
        found = []
        for number in range(self.clips):
            clip = make_clip(number, task, self.size, self.frames)
            values = clips.scores(clip, restore(clip, seed))
            found.append({"arm": arm, "photo": values.pop("clip"), "seed": seed} | values)
        return found


def pretrained(study: Study, material: str, minutes: float) -> Path:
    """The bundled weights after more minutes of processor time on this material; an interrupted run goes on."""
    path = study.work / f"on_{material}_{minutes:g}.safetensors"
    if not path.exists() or path.with_suffix(".ckpt").exists():
        course = replace(COURSE, batch=mixed_batch) if material == "clips" else COURSE
        settings = PretrainConfig(minutes=minutes, **CONTINUED, **FEW_SCENES)
        pretrain(path, settings, start=study.model, course=course, clock=time.process_time)
        path.with_suffix(".ckpt").unlink(missing_ok=True)
    return path


def arms(study: Study, backbones: dict[str, Path]) -> dict[str, Callable[[Clip, int], Tensor]]:
    """The input, and prompts on both backbones: frames one by one or seen together, as they are or made to agree."""

    @lru_cache(maxsize=1)
    def engine(material: str, together: bool) -> tuple[Backbone, Restorer]:
        config = config_of(study, study.tasks[0], 0)
        loaded = Restorer("mini", model=backbones[material], precision=config.precision).backbone
        if together:
            loaded = replace(loaded, spec=replace(loaded.spec, knows_time=True, chunk=(FRAMES, SHARED), window=0))
        return loaded, Restorer.from_backbone(InPlace(loaded, loaded.device, "none", "off", Fitting()))

    @cache
    def prompt(material: str, together: bool, task: str, seed: int) -> Prompt:
        own, few = replace(study, model=backbones[material]), {"tokens": 4} if study.quick else {}
        crops = study.learning.batch if together else study.learning.batch * FRAMES
        changes = PROMPT | few | {"batch": crops}
        path = path_of(own, task, seed, {"variant": "together" if together else "one by one"} | changes)
        if not path.exists():

            def start(config: LearnConfig, _: Backbone) -> Learner:
                return Learner.start(config, engine(material, together)[0])

            source = MovingSamples if together else SceneSamples
            fitted(own, config_of(own, task, seed, **changes), start, source).prompt().save(path)
        return load_prompt(path)

    results: dict[tuple, Tensor] = {}  # of clips, which the arm that follows makes agree

    def frames(material: str, together: bool, clip: Clip, seed: int) -> Tensor:
        key = material, together, clip.task, clip.name, seed
        if key not in results:
            learned = prompt(material, together, clip.task, seed)
            restorer = engine(material, together)[1]
            how = {} if together else {"temporal_window": 0}
            restored = restorer.run(clip.degraded.transpose(0, 1)[None], restorer.plan(prompt=learned), **how)
            results[key] = restored[0].transpose(0, 1)
        return results[key]

    def restored(material: str, together: bool, agree: bool) -> Callable[[Clip, int], Tensor]:
        def run(clip: Clip, seed: int) -> Tensor:
            result = frames(material, together, clip, seed)
            if not agree:
                return result
            return torch.from_numpy(agreed(result.movedim(1, -1).contiguous().numpy(), WINDOW)).movedim(-1, 1)

        return run

    found: dict[str, Callable[[Clip, int], Tensor]] = {"input": lambda clip, seed: clip.degraded}
    for material, together in (("pictures", False), ("clips", False), ("clips", True)):
        name = "clips, seen together" if together else material
        found[f"{name}: frames as they are"] = restored(material, together, False)
        found[f"{name}: frames agree"] = restored(material, together, True)
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of processor time, for each pre-training ({MINUTES:g})")
    parser.add_argument("--clips", type=int, default=CLIPS, metavar="N")
    parser.set_defaults(seeds=(0,), size=192, steps=2, iterations=100, batch=4, crop=80, scenes=256)
    options = parser.parse_args(given)
    study = study_of("p_clips", options, TASKS)
    short = {"clips": 2, "frames": 3, "size": 64} if study.quick else {"clips": options.clips}
    study = ClipStudy(**{field.name: getattr(study, field.name) for field in fields(study)} | short)
    if study.quick:
        backbones = dict.fromkeys(MATERIAL, study.model)
    else:
        backbones = {material: pretrained(study, material, options.minutes) for material in MATERIAL}
    notes = [f"{name}: {load_mini(path).training.get('iterations', 0)} iterations on" for name, path in backbones.items()]
    rows = study.measure(arms(study, backbones), minutes=options.minutes)
    notes.insert(0, f"cells are {study.clips} clips of {study.frames} frames in place of photos")
    notes += means_by_task(rows, "ssim", "SSIM", 3) + means_by_task(rows, "unsteady", "warping error in 1/255", 1)
    finish(
        study,
        "P. Does a transformer that has seen clips restore them better?",
        rows,
        REFERENCE,
        command_of(__file__, given, sys.argv[1:]),
        notes,
    )


if __name__ == "__main__":
    main()
