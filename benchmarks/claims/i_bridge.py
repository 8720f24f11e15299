"""I. Past the paper: the bridge of arXiv 2604.10983 in its own form beside the released code's, DDBM's taken apart, T0 by task.

Both forms learn from the same states with the same loss, and their samplers are crossed. DDBM differs from EBR in the path of
its mean and in its noise, which vanishes at T0: each is changed alone. η is the level of the noise (1: the paper's; 0.2: what
`mini`'s runs start with). All samplers are first order and deterministic after their start; see `bridges.py` for the mathematics.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.claims.bridges import Bridge, BridgeLearner, sampled
from benchmarks.claims.common import Study, arguments, scores, study_of
from benchmarks.claims.learning import variant
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.views import views
from ebr_engine.bridge.sampler import draw_noise
from ebr_engine.bridge.schedules import FAST_POWER, power_times
from ebr_engine.evaluation.photos import Case
from ebr_engine.media.degradations import degrade, seeds
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.procedural import render

SEED = 42
REFERENCE = "EBR, η 0.2"
QUIET = Bridge(level=0.2)
PATH = "DDBM's path, η 0.2"
BRIDGES = {
    REFERENCE: QUIET,
    "EBR, η 1": Bridge(),
    "EBR, η 0": Bridge(level=0.0),
    "EBR's path, DDBM's noise": Bridge(noise="vanishing"),
    PATH: Bridge("snr", level=0.2),
    "DDBM": Bridge("snr", "vanishing"),
    "paper's form, η 1": Bridge(form="paper"),
    "paper's form, η 0.2": Bridge(form="paper", level=0.2),
}
FARTHER = 0.4  # the other T0
LONGER = 4  # times the iterations, for the two that matter
HELD_OUT = 6  # scenes that T0 is chosen on


def learned(study: Study, bridge: Bridge, task: str, seed: int, t0: float) -> Prompt:
    """A prompt learned on a bridge; kept in `work`."""
    return variant(study, task, seed, repr(bridge), BridgeLearner.on(bridge), t0=t0)


def restored(study: Study, picture: Tensor, prompt: Prompt | None, bridge: Bridge, t0: float, count: int | None = None) -> Tensor:
    """A picture [1, 3, H, W] by a prompt, or the empty one, and a bridge's own sampler in `count` steps, or the study's."""
    backbone = study.restorer.backbone
    times = power_times(count or study.steps, t0, FAST_POWER)
    prompts = [(prompt.residual, prompt.alpha)] if prompt else []
    steps = backbone.bake(torch.tensor(times[:-1]) * 1000, prompts)
    degraded = backbone.codec.encode(picture.unsqueeze(2))
    noise = draw_noise(degraded.shape, SEED)
    found = sampled(backbone, bridge, steps, views(backbone, times[:-1]), degraded, noise, times, t0)
    return backbone.codec.decode(found).squeeze(2).clamp(0, 1)


@cache
def scenes(size: int) -> list[Tensor]:
    """Held-out scenes [1, 3, size, size]."""
    return [
        torch.from_numpy(render(seeds("validation").start + i, size).image).movedim(-1, 0)[None] / 255 for i in range(HELD_OUT)
    ]


def on_scenes(study: Study, bridge: Bridge, task: str, seed: int, t0: float) -> float:
    """PSNR on held-out scenes: what T0 is chosen by."""
    prompt, found = learned(study, bridge, task, seed, t0), []
    for i, clean in enumerate(scenes(study.size)):
        degraded = degrade(clean, task, torch.Generator().manual_seed(seeds("validation").start + i))
        found.append(scores(restored(study, degraded, prompt, bridge, t0), clean)["psnr"])
    return sum(found) / len(found)


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """Every bridge with its own sampler, both forms crossed, and T0 as it is, farther, and chosen."""
    t0 = study.learning.t0

    def own(learns: Bridge, runs: Bridge, t0: float = t0):
        return lambda case, seed: restored(study, case.degraded, learned(study, learns, case.task, seed, t0), runs, t0)

    @cache
    def best(task: str, seed: int) -> float:
        return max((t0, FARTHER), key=lambda one: on_scenes(study, QUIET, task, seed, one))

    def chosen(case: Case, seed: int) -> Tensor:
        start = best(case.task, seed)
        return restored(study, case.degraded, learned(study, QUIET, case.task, seed, start), QUIET, start)

    paper = BRIDGES["paper's form, η 0.2"]
    return {
        "input": lambda case, seed: case.degraded,
        "empty prompt": lambda case, seed: restored(study, case.degraded, None, QUIET, t0),
        **{name: own(bridge, bridge) for name, bridge in BRIDGES.items()},
        "paper's form's prompt, released sampler": own(paper, QUIET),
        "released form's prompt, paper's sampler": own(QUIET, paper),
        "DDBM's prompt, EBR's sampler, η 0.2": own(BRIDGES["DDBM"], QUIET),
        f"{REFERENCE}, T0 {FARTHER:g}": own(QUIET, QUIET, FARTHER),
        f"{REFERENCE}, T0 chosen on scenes": chosen,
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("i_bridge", arguments(__doc__).parse_args(given), ("haze", "rain", "lowlight"))
    rows = study.measure(arms(study), seed_of_noise=SEED)
    notes = [
        f"t_i = T0 (1 - i/N)^{FAST_POWER:g}, first order; arms without a form are in the released one",
        f"T0 is chosen among {study.learning.t0:g} and {FARTHER:g} on {HELD_OUT} held-out scenes, for each task and seed",
    ]
    command = command_of(__file__, given, sys.argv[1:])
    finish(study, "I. Bridges: the paper's form, DDBM taken apart, T0 by task", rows, REFERENCE, command, notes)
    longer = replace(study.learning, iterations=study.learning.iterations * LONGER)
    study = replace(study.named("i_long", study.tasks), learning=longer, seeds=study.seeds[:1])
    found = {name: arm for name, arm in arms(study).items() if name in ("input", REFERENCE, PATH)}
    rows = study.measure(found, seed_of_noise=SEED)
    finish(study, f"I. Two paths, {LONGER} times as many iterations", rows, REFERENCE, command, notes[:1])


if __name__ == "__main__":
    main()
