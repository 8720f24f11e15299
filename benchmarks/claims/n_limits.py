"""N. Past the paper: what limits a bundled prompt? More learning, more rows, another loss; and the frozen weights set free.

Every arm begins with the bundled prompt. *learned on*: more of the same. *256 rows*: each row four times with a little noise,
which is the same prompt to begin with. *SSIM in the loss*: `--set ssim_weight`. *all weights free* is no prompt any more: the
transformer's own weights learn with it, by Adam. It says what the same network could do, were it not frozen.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.common import Study, arguments, study_of
from benchmarks.claims.k_where import by_task, further
from benchmarks.claims.learning import bundled, config_of, fitted, variant
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.mini.model import WEIGHTS
from ebr_engine.engine.fallback import Fitting
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.photos import TEN, Case
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.distributed import World
from ebr_engine.training.learner import Learner, Progress, initial, make_optimizer, rate_factor
from ebr_engine.training.loop import backbone_of
from ebr_engine.training.validation import InPlace

TASKS = ("haze", "rain", "snow", "blur")
TIMES = 4  # as many rows
SPREAD = 0.15  # of the noise that tells the copies of a row apart; the rows' own is 0.8
DISSIMILAR = 0.01
WEIGHTS_RATE = 3e-4  # of Adam on all weights
LARGEST = 1.0  # norm of their gradient
BUNDLED, REFERENCE = "bundled prompt", "learned on"


@dataclass
class FreeLearner(Learner):
    """The engine's learner of a prompt, and the trunk's weights beside it."""

    free: torch.optim.Optimizer | None = None

    def step(self, batch) -> Progress:
        """See `Learner.step`."""
        rate = WEIGHTS_RATE * rate_factor(self.iteration, self.config)
        progress = super().step(batch)
        nn.utils.clip_grad_norm_(self.backbone.trunk.parameters(), LARGEST)
        for group in self.free.param_groups:
            group["lr"] = rate
        self.free.step()
        self.free.zero_grad()
        return progress


def freed(config: LearnConfig, _: Backbone) -> FreeLearner:
    """A learner over a trunk of its own, in float32, which learns too."""
    backbone = backbone_of(replace(config, precision="fp32"), "cpu")
    weights = list(backbone.trunk.requires_grad_(True).parameters())
    residual, alpha = (part.requires_grad_() for part in initial(config, backbone))
    optimizer, free = make_optimizer(config, [residual, alpha]), torch.optim.Adam(weights, lr=WEIGHTS_RATE)
    return FreeLearner(config, backbone, residual, alpha, optimizer, World(), backbone.live(config.tokens), free=free)


def widened(study: Study, task: str, times: int = TIMES) -> Path:
    """The bundled prompt with each row so many times, a little apart; kept in `work`."""
    path = study.work / "prompts" / f"{task}-{times}-times.safetensors"
    if not path.exists():
        prompt = load_prompt(bundled(task))
        rows = torch.cat([prompt.residual.float()] * times, -2)
        rows = rows + SPREAD * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(prompt, residual=rows).save(path)
    return path


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """The bundled prompt as it is, learned on in three ways, and with the weights."""

    def restored(case: Case, prompt: Prompt, restorer: Restorer = study.restorer) -> Tensor:
        return restorer.run(case.degraded, restorer.plan(prompt=prompt), detail=prompt.detail)

    def learned(name: str, change: Callable[[str], dict[str, Any]] = lambda task: {}):
        def run(case: Case, seed: int) -> Tensor:
            return restored(case, variant(study, case.task, seed, name, **further(case.task) | change(case.task)))

        return run

    @cache
    def without_frost(task: str, seed: int) -> tuple[Prompt, Restorer]:
        learner = fitted(study, config_of(study, task, seed, **further(task)), freed)
        learner.backbone.trunk.requires_grad_(False)
        engine = InPlace(learner.backbone, learner.backbone.device, "none", "off", Fitting())
        return learner.prompt(), Restorer.from_backbone(engine)

    def wider(task: str) -> dict[str, Any]:
        path = widened(study, task)
        return {"start": str(path), "tokens": load_prompt(path).residual.shape[-2]}

    return {
        "input": lambda case, seed: case.degraded,
        BUNDLED: lambda case, seed: restored(case, load_prompt(bundled(case.task))),
        REFERENCE: learned(REFERENCE),
        "256 rows": learned("wider", wider),
        "SSIM in the loss": learned("ssim", lambda task: {"ssim_weight": DISSIMILAR}),
        "all weights free": lambda case, seed: restored(case, *without_frost(case.task, seed)),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    parser = arguments(__doc__)
    parser.set_defaults(photos=TEN, seeds=(0,), size=256, iterations=100, batch=8, crop=96, scenes=256)
    study = replace(study_of("n_limits", parser.parse_args(given), TASKS), model=WEIGHTS)  # bundled prompts fit no other
    rows = study.measure(arms(study))
    notes = [
        "each from the bundled prompt, through its own number of steps; the weights in float32, the prompts as `auto` chooses"
    ]
    notes += [by_task(rows, arm, REFERENCE) for arm in arms(study) if arm not in ("input", REFERENCE)]
    finish(study, "N. What limits a prompt?", rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
