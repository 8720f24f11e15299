"""F. Two degradations at once, with prompts that each learned one; and a degradation that no prompt has learned.

Mixing averages velocities (the released way, a transformer run a prompt) or adds residuals (one run). The upper bound is a prompt
that learned the mixture itself.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.claims.common import Degrade, Study, broad_arguments, fingerprint, key_of, study_of
from benchmarks.claims.learning import config_of, fitted
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.engine.classify import diagnose
from ebr_engine.evaluation.photos import STRENGTH, Case
from ebr_engine.media.degradations import degrade
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import SceneSamples, seeded
from ebr_engine.training.learner import Learner
from ebr_engine.training.scenes import ScenePool

MIXTURES = (("haze", "rain"), ("haze", "snow"), ("lowlight", "blur"))
REFERENCE = "input"
UNSEEN = "unseen: noise and coarse levels"
NOISE, LEVELS = 0.08, 24


def mixture(tasks: Sequence[str], strength: float | None = None) -> Degrade:
    """One degradation after the other; `strength` None draws one for each sample and task, as learning does."""

    def how(clean: Tensor, generator: torch.Generator, depth: Tensor | None) -> Tensor:
        for task in tasks:
            clean = degrade(clean, task, generator, depth=depth, strength=strength)
        return clean

    return how


def unseen(clean: Tensor, generator: torch.Generator, depth: Tensor | None) -> Tensor:
    """White noise, then few levels a channel: nothing that a prompt or the backbone has met."""
    noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
    return ((noisy.clamp(0, 1) * LEVELS).round() / LEVELS).clamp(0, 1)


class MixedScenes(SceneSamples):
    """Crops of scenes, degraded by a mixture."""

    def __init__(self, config: LearnConfig, pool: ScenePool, tasks: Sequence[str]):
        super().__init__(config, pool)
        self.how = mixture(tasks)

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """See `Samples`."""
        generator = seeded(self.config.seed, "scene", number)
        clean, depth, _ = self.pool.crops(1, self.config.crop, generator)
        return self.how(clean, generator, depth).movedim(0, 1), clean.movedim(0, 1)


def mixture_prompt(study: Study, tasks: Sequence[str], seed: int) -> Prompt:
    """A prompt learned on a mixture, with the study's settings; kept in `work`."""
    name = "+".join(tasks)
    key = key_of(asdict(study.learning) | {"mixture": name, "seed": seed, "model": fingerprint(study.model)})
    path = study.work / "prompts" / f"{key}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        config = config_of(study, tasks[0], seed)
        learner = fitted(study, config, Learner.start, lambda config, pool: MixedScenes(config, pool, tasks))
        replace(learner.prompt({"mixture": list(tasks)}), task=name).save(path)
    return load_prompt(path)


def mixed_arms(study: Study, tasks: Sequence[str]) -> dict[str, Callable[[Case, int], Tensor]]:
    """Every way to restore a mixture with what is known of its parts."""
    table, restorer = study.ebr_table(study.learning.t0), study.restorer

    def mixed(mix: str, weight: float):
        def restored(case: Case, seed: int) -> Tensor:
            prompts = [(study.prompt(task, seed), weight) for task in tasks]
            return restorer.run(case.degraded, restorer.bake(prompts, table, mix))

        return restored

    def in_turn(picture: Tensor, order: Iterable[str], seed: int) -> Tensor:
        for task in order:
            picture = restorer.run(picture, restorer.bake([(study.prompt(task, seed), 1.0)], table))
        return picture

    def one_by_one(case: Case, seed: int) -> Tensor:
        return in_turn(case.degraded, reversed(tasks), seed)  # what was added last goes first

    def chosen(case: Case, seed: int) -> Tensor:
        return in_turn(case.degraded, diagnose(list(case.degraded)).tasks, seed)  # as `--task auto` does

    own = cache(lambda seed: mixture_prompt(study, tasks, seed))
    return {
        REFERENCE: lambda case, seed: case.degraded,
        "first prompt alone": lambda case, seed: study.restore(case, study.prompt(tasks[0], seed), table),
        "second prompt alone": lambda case, seed: study.restore(case, study.prompt(tasks[1], seed), table),
        "velocity mean (released)": mixed("velocity", 1.0),
        "residuals, weights 1": mixed("residual", 1.0),
        "residuals, weights 0.5": mixed("residual", 0.5),
        "one after the other": one_by_one,
        "automatic choice": chosen,
        "prompt learned on the mixture": lambda case, seed: study.restore(case, own(seed), table),
    }


def unseen_arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """Every single prompt on a degradation that none of them has learned."""
    table = study.ebr_table(study.learning.t0)

    def prompted(task: str):
        return lambda case, seed: study.restore(case, study.prompt(task, seed), table)

    tasks = TASKS[:2] if study.quick else TASKS
    found = {f"{task} prompt": prompted(task) for task in tasks}
    empty = {"empty prompt": lambda case, seed: study.restore(case, None, table)}
    return {REFERENCE: lambda case, seed: case.degraded} | empty | found


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write a table and a plot for the mixtures and for the unseen degradation."""
    parser = broad_arguments(__doc__)
    options = parser.parse_args(given)
    if options.tasks:
        parser.error("the mixtures are fixed; leave --tasks out")
    study = study_of("f_mixtures", options, [])
    command = command_of(__file__, given, sys.argv[1:])
    rows = []
    for tasks in MIXTURES[:1] if study.quick else MIXTURES:
        part = study.named("f_mixtures", ("+".join(tasks),))
        rows += part.measure(mixed_arms(part, tasks), mixture(tasks, STRENGTH), mixture=tasks)
    names = tuple(dict.fromkeys(row["task"] for row in rows))
    notes = ["a mixture is degraded by its first task, then by its second, each at the benchmark's strength"]
    finish(study.named("f_mixtures", names), "F. Mixtures of degradations", rows, REFERENCE, command, notes)
    alone = study.named("f_unseen", (UNSEEN,))
    notes = [f"white noise of deviation {NOISE}, then {LEVELS + 1} levels a channel"]
    found = alone.measure(unseen_arms(alone), unseen, noise=NOISE, levels=LEVELS)
    finish(alone, "F. A degradation that no prompt has learned", found, REFERENCE, command, notes)


if __name__ == "__main__":
    main()
