"""L. Past the paper: few pairs of a damage that the generator does not have, from nothing and from the nearest bundled prompt.

Two damages are simulated (`simulators.py`): an old film's scratches and dirt, and moiré. A pair is a scene of 256 × 256 pixels
and its damaged form, drawn once; crops and mirroring are all that varies. *Nearest* is the bundled prompt that restores the
middle of these very pairs best. Both begin with prompts of one shape, 64 tokens for each block: the nearest, or random ones.
They are learned through one step of the sampler (`--set unroll=1`) and run in one evaluation. `endless`: new damage on another
crop for every sample.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.claims.common import STORM, Degrade, Study, arguments, scores, study_of
from benchmarks.claims.learning import bundled, kept_pool, variant
from benchmarks.claims.reporting import command_of, finish
from benchmarks.claims.simulators import SIMULATORS
from ebr_engine.evaluation.photos import Case
from ebr_engine.media.degradations import seeds
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import seeded
from ebr_engine.training.learner import Learner
from ebr_engine.training.scenes import ScenePool

PAIRS = (4, 8, 16, 64)
SHAPE = {"tokens": 64, "per_block": True, "unroll": 1, "learning_rate": 0.015}
SEEN = 4  # pairs at most that the nearest prompt is found on
REFERENCE = "input"


class FewPairs:
    """Crops of a few pairs; or, of 0 pairs, of all scenes with new damage every time. See `training.data.Samples`."""

    def __init__(self, how: str, count: int, config: LearnConfig, pool: ScenePool):
        self.how, self.config, self.pool = SIMULATORS[how], config, pool
        self.pairs = [pair_of(pool, how, count * config.seed + i) for i in range(count)]

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """Degraded and clean crop [3, 1, h, w]."""
        generator = seeded(self.config.seed, "pair", number)
        if not self.pairs:
            clean, _, _ = self.pool.crops(1, self.config.crop, generator)
            return self.how(clean, generator).movedim(0, 1), clean.movedim(0, 1)
        which, top, left, flip = torch.randint(0, 2**31, (4,), generator=generator).tolist()
        both = torch.cat(self.pairs[which % len(self.pairs)])  # degraded, clean
        height, width = self.config.crop
        top, left = top % (both.shape[-2] - height + 1), left % (both.shape[-1] - width + 1)
        crop = both[..., top : top + height, left : left + width]
        return tuple((crop.flip(-1) if flip % 2 else crop).unsqueeze(2))


def pair_of(pool: ScenePool, how: str, index: int) -> tuple[Tensor, Tensor]:
    """A scene with its damage, both [1, 3, H, W] as a file would hold them."""
    index %= len(pool.pixels)
    clean = pool.pixels[index : index + 1, :3].float() / 255
    degraded = SIMULATORS[how](clean, torch.Generator().manual_seed(seeds("train").start + STORM + index))
    return (degraded * 255).round() / 255, clean


def nearest(study: Study, how: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> str:
    """The task of the bundled prompt that restores pairs best, in its own number of evaluations."""
    worth = {}
    for task in TASKS[:2] if study.quick else TASKS:
        plan = study.restorer.plan(task, supersample=1)
        middles = [[square_middle(picture, study.size) for picture in pair] for pair in pairs]
        results = [scores(study.restorer.run(degraded, plan), clean)["psnr"] for degraded, clean in middles]
        worth[task] = sum(results) / len(results)
    return max(worth, key=worth.__getitem__)


def square_middle(picture: Tensor, size: int) -> Tensor:
    """The middle `size` × `size` pixels."""
    top, left = ((side - size) // 2 for side in picture.shape[-2:])
    return picture[..., top : top + size, left : left + size]


class FewShot:
    """The prompts of a study, each learned when it is first asked for."""

    def __init__(self, study: Study):
        self.study = study
        self.nearest = cache(self._nearest)

    def _nearest(self, how: str, count: int, seed: int) -> str:
        pool = kept_pool(self.study.learning.scenes, self.study.work)
        return nearest(
            self.study, how, [pair_of(pool, how, count * seed + i) for i in range(1 if self.study.quick else min(count, SEEN))]
        )

    def prompt(self, how: str, count: int, seed: int, begun: bool) -> Prompt:
        """Learned from so many pairs (0: endless), `begun` with the nearest bundled prompt."""
        changes = SHAPE | {"data": how}
        if begun:
            start = bundled(self.nearest(how, count, seed))
            changes |= {"start": str(start), "t0": load_prompt(start).t0}
        name = f"{count} pairs"
        return variant(self.study, how, seed, name, Learner.start, partial(FewPairs, how, count), **changes)


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """The nearest prompt as it is, and prompts learned from so many pairs, from nothing and begun with it."""
    learned = FewShot(study)
    counts = PAIRS[:1] if study.quick else PAIRS

    def untouched(case: Case, seed: int) -> Tensor:
        prompt = load_prompt(bundled(learned.nearest(case.task, counts[0], seed)))
        return study.restorer.run(case.degraded, study.restorer.plan(prompt=prompt))

    def few(count: int, begun: bool):
        def run(case: Case, seed: int) -> Tensor:
            prompt = learned.prompt(case.task, count, seed, begun)
            return study.restore(case, prompt, study.ebr_table(prompt.t0, 1))

        return run

    found = {REFERENCE: lambda case, seed: case.degraded, "nearest prompt as it is": untouched}
    for count in counts:
        found |= {f"{count} pairs": few(count, False), f"{count} pairs, from the nearest": few(count, True)}
    return found | {"endless": few(0, False)}


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    parser = arguments(__doc__)
    options = parser.parse_args(given)
    if options.tasks:
        parser.error("the damages are fixed; leave --tasks out")
    study = study_of("l_few_pairs", options, tuple(SIMULATORS))
    if study.quick:  # bundled prompts fit the bundled backbone only
        study = replace(study, model=parser.get_default("model"))
    rows = []
    for how, degrade in SIMULATORS.items():
        if how in study.tasks:
            rows += replace(study, tasks=(how,)).measure(arms(study), alone(degrade), shape=SHAPE)
    found = FewShot(study)
    close = [f"{how} {found.nearest(how, PAIRS[0], seed)}" for how in study.tasks for seed in study.seeds]
    notes = [
        "one evaluation, but two for the nearest prompt as it is; all but `endless` see the same pairs at every iteration count",
        f"nearest, by task and seed, of {PAIRS[0]} pairs: {', '.join(close)}",
    ]
    finish(study, "L. Few pairs", rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


def alone(degrade: Degrade) -> Degrade:
    """A simulator as the studies call it."""
    return lambda clean, generator, depth: degrade(clean, generator)


if __name__ == "__main__":
    main()
