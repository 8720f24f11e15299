"""K. Past the paper: prompts that see where. A residual of low rank for each token, from the frozen trunk's features.

    z_n = V·LN(f_n),   f_n: token n after the first block, V: 4 × 256
    block b > 0 adds U_b·z_n to what its cross-attention gives token n, U_b: 256 × 4, beginning at 0

6144 numbers beside a prompt of 16 tokens, learned together with it; no evaluation more, for the features are the run's own. Three
arms say what a gain would come from: a prompt of as many numbers more (40 tokens), the same map from the mean of all tokens, and
from each token's difference to that mean.
Haze is densest at the top, rain shows before dark ground: damage that varies over the picture.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims.common import Row, Study, arguments, in_order, study_of
from benchmarks.claims.learning import bundled, config_of, fitted, path_of, variant
from benchmarks.claims.reporting import command_of, difference, finish
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.mini.model import WEIGHTS
from ebr_engine.backbones.wan.model import BlockStep, WanTrunk
from ebr_engine.evaluation.photos import Case
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.learner import Learner, Progress, make_optimizer

RANK = 4
SCALE = 0.1  # of U: Adam moves its numbers as far as a prompt's
RATE = 0.012  # of learning on from a bundled prompt
FURTHER = ("rain",)  # where bundled prompts learn on: where the map wins from nothing
REFERENCE = "one prompt"
LEARNED_ON = "bundled prompt, learned on"


@dataclass
class Map:
    """From a token's features to its residual in every block but the first."""

    down: Tensor  # [D, R]
    up: Tensor  # [blocks - 1, R, D]
    sees: str = "token"  # each token its own features, their "mean" over all, or its own "difference" to that

    @classmethod
    def start(cls, width: int, blocks: int, sees: str, seed: int) -> "Map":
        """One that adds nothing yet."""
        down = torch.randn(width, RANK, generator=torch.Generator().manual_seed(seed)) / width**0.5
        return cls(down, torch.zeros(blocks - 1, RANK, width), sees)

    def codes(self, features: Tensor) -> Tensor:
        """z [B, N or 1, R] of a stream [B, N, D]."""
        z = F.layer_norm(features.float(), features.shape[-1:]) @ self.down
        mean = z.mean(1, keepdim=True)
        return {"token": z, "mean": mean, "difference": z - mean}[self.sees]


@contextmanager
def seeing(trunk: WanTrunk, map: Map) -> Iterator[None]:
    """While it lasts, the trunk's blocks add the map's residuals."""
    codes: list[Tensor] = []

    def look(_, given: tuple, result: tuple[Tensor, Tensor, Tensor]) -> None:
        x, branch, gate = result
        codes[:] = [map.codes(x.float() + branch.float() * gate.unsqueeze(1))]

    def added(cross: Callable, up: Tensor) -> Callable[[Tensor, BlockStep], Tensor]:
        def with_residuals(normed: Tensor, step: BlockStep) -> Tensor:
            mixed = cross(normed, step)
            return mixed + (codes[0] @ (SCALE * up)).to(mixed.dtype)

        return with_residuals

    first, *others = trunk.blocks
    hook = first.register_forward_hook(look)
    try:
        for block, up in zip(others, map.up):
            block.cross = added(block.cross, up)
        yield
    finally:
        hook.remove()
        for block in others:
            block.__dict__.pop("cross", None)


@dataclass
class WhereLearner(Learner):
    """The engine's learner of a prompt and a map."""

    map: Map | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The prompt, its strengths and the map."""
        return [self.residual, self.alpha] + ([self.map.down, self.map.up] if self.map else [])

    def step(self, batch) -> Progress:
        """See `Learner.step`."""
        with seeing(self.backbone.trunk, self.map):
            return super().step(batch)

    def prompt(self, training: dict | None = None) -> Prompt:
        """The prompt without its map."""
        self.average = [self.residual, self.alpha]
        return super().prompt(training)


def started(config: LearnConfig, backbone: Backbone, sees: str) -> WhereLearner:
    """A learner whose map adds nothing yet."""
    learner = WhereLearner.start(config, backbone)
    learner.map = Map.start(backbone.width, backbone.blocks, sees, config.seed)
    for part in (learner.map.down, learner.map.up):
        part.requires_grad_()
    learner.optimizer = make_optimizer(config, learner.parameters)
    return learner


def learned(study: Study, task: str, seed: int, sees: str, **changes: Any) -> tuple[Prompt, Map]:
    """A prompt with its map; kept in `work`."""
    prompt = path_of(study, task, seed, {"map": RANK, "scale": SCALE, "sees": sees} | changes)
    path = prompt.with_suffix(".map.safetensors")

    def start(config: LearnConfig, backbone: Backbone) -> WhereLearner:
        return started(config, backbone, sees)

    if not path.exists():
        learner = fitted(study, config_of(study, task, seed, **changes), start)
        learner.prompt().save(prompt)
        save_file({"down": learner.map.down.detach().contiguous(), "up": learner.map.up.detach().contiguous()}, path)
    return load_prompt(prompt), Map(**load_file(path), sees=sees)


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """The one prompt, one of as many numbers as the map has more, the map, and those of the mean and of the difference to it."""
    table = study.ebr_table(study.learning.t0)
    config = study.restorer.backbone.trunk.config
    tokens = study.learning.tokens + RANK * config.num_layers  # a row of a prompt is as wide as one of the map

    def plain(**changes):
        def run(case: Case, seed: int) -> Tensor:
            return study.restore(case, variant(study, case.task, seed, "states", Learner.start, **changes), table)

        return run

    def mapped(sees: str):
        def run(case: Case, seed: int) -> Tensor:
            prompt, map = learned(study, case.task, seed, sees)
            with seeing(study.restorer.backbone.trunk, map):
                return study.restore(case, prompt, table)

        return run

    return {
        "input": lambda case, seed: case.degraded,
        REFERENCE: plain(),
        f"{tokens} tokens": plain(tokens=tokens),
        "sees where": mapped("token"),
        "sees the mean": mapped("mean"),
        "sees where, less the mean": mapped("difference"),
    }


def further(task: str) -> dict[str, Any]:
    """The settings of learning on from a bundled prompt, as it was learned last."""
    prompt = load_prompt(bundled(task))
    shape = {"tokens": prompt.residual.shape[-2], "per_block": prompt.residual.ndim == 3}
    how = {"unroll": prompt.steps, "t0": prompt.t0, "detail": prompt.detail, "learning_rate": RATE}
    return {"start": str(bundled(task))} | shape | how


def arms_from_bundled(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """The bundled prompt as it is, learned on, and learned on with a map."""

    def restored(case: Case, prompt: Prompt) -> Tensor:
        return study.restorer.run(case.degraded, study.restorer.plan(prompt=prompt))

    def alone(case: Case, seed: int) -> Tensor:
        return restored(case, variant(study, case.task, seed, "learned on", **further(case.task)))

    def with_map(case: Case, seed: int) -> Tensor:
        prompt, map = learned(study, case.task, seed, "token", **further(case.task))
        with seeing(study.restorer.backbone.trunk, map):
            return restored(case, prompt)

    return {
        "input": lambda case, seed: case.degraded,
        "bundled prompt": lambda case, seed: restored(case, load_prompt(bundled(case.task))),
        LEARNED_ON: alone,
        "learned on, and sees where": with_map,
    }


def by_task(rows: Sequence[Row], arm: str, reference: str) -> str:
    """An arm's difference in PSNR and SSIM for each task."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        gaps = [difference([row for row in rows if row["task"] == task], arm, reference, what) for what in ("psnr", "ssim")]
        found.append(f"{task} {gaps[0]} dB, SSIM {gaps[1].mean:+.3f} [{gaps[1].low:+.3f}, {gaps[1].high:+.3f}]")
    return f"{arm}, by task: {'; '.join(found)}"


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write a table and a plot for prompts from nothing and for the bundled ones learned on."""
    study = study_of("k_where", arguments(__doc__).parse_args(given), ("haze", "rain"))
    command = command_of(__file__, given, sys.argv[1:])
    rows = study.measure(arms(study))
    notes = [f"a map of rank {RANK}; its residuals begin at 0 and are learned with the prompt, at the same learning rate"]
    notes += [by_task(rows, arm, REFERENCE) for arm in in_order(rows, "arm") if "sees" in arm]
    finish(study, "K. Prompts that see where", rows, REFERENCE, command, notes)
    on = replace(study.named("k_bundled", [task for task in study.tasks if task in FURTHER] or study.tasks), model=WEIGHTS)
    rows = on.measure(arms_from_bundled(on), rate=RATE)
    notes = [f"each from the bundled prompt, through its own number of steps, at a learning rate of {RATE:g}"]
    notes += [by_task(rows, arm, LEARNED_ON) for arm in in_order(rows, "arm") if "sees" in arm]
    finish(on, "K. Bundled prompts that see where", rows, LEARNED_ON, command, notes)


if __name__ == "__main__":
    main()
