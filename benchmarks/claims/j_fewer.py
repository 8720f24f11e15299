"""J. Past the paper: one and two evaluations. How must a prompt be learned so that one evaluation equals five?

* states: at states of the bridge, as the paper has it
* consistency: as states, at the times of the sampler's five steps, and the clean estimate D at t is also drawn to D at s, where s
  is the sampler's next time and the state there is the one that its own step from t leads to; no gradient goes into the later one
* unroll 1, unroll 2: from the result of one and of two steps, the gradient going through them (`--set unroll=N`)
* DDBM's path: states, and unroll 2, on the path of DDBM's mean with a constant level of noise and its own first-order sampler

Each is learned in the same number of iterations, from the same crops, and runs in 1, 2 and 5 evaluations.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.claims.bridges import Bridge, BridgeLearner, estimate
from benchmarks.claims.common import Study, arguments, study_of
from benchmarks.claims.i_bridge import restored
from benchmarks.claims.learning import variant
from benchmarks.claims.reporting import command_of, difference, finish
from ebr_engine.bridge.sampler import make_table
from ebr_engine.bridge.schedules import FAST_STEPS
from ebr_engine.evaluation.photos import Case
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.data import seeded
from ebr_engine.training.learner import Learner

COUNTS = (1, 2, 5)
REFERENCE = "states, 5 evaluations"
NEAR = {"psnr": 0.1, "ssim": 0.005}  # what counts as equal


@dataclass
class ConsistencyLearner(Learner):
    """The engine's learner whose clean estimates agree along the sampler's own steps."""

    def state_loss(self, numbers: Sequence[int], degraded: Tensor, clean: Tensor) -> Tensor:
        """See `Learner.state_loss`; the whole batch is at one of the sampler's times."""
        t0, bridge = self.config.t0, Bridge(level=self.backbone.noise)
        times = clean.new_tensor(make_table("fast", t0, FAST_STEPS).times)
        i = int(torch.randint(FAST_STEPS, (1,), generator=seeded(self.config.seed, "consistency", self.iteration)))
        noise = self.noise(numbers, clean) / self.backbone.noise  # the bridge scales it
        state = bridge.state(clean, degraded, noise, times[i], t0)
        found = self.estimate(bridge, state, degraded, times, i)
        known = self.measured(found - clean, degraded - clean)
        if i + 1 == FAST_STEPS:
            return known
        with torch.no_grad():
            after = bridge.step(state, found, degraded, noise, times[i], times[i + 1], t0)
            later = self.estimate(bridge, after, degraded, times, i + 1)
        return known + self.measured(found - later, degraded - clean)

    def estimate(self, bridge: Bridge, state: Tensor, degraded: Tensor, times: Tensor, i: int) -> Tensor:
        """The clean estimate in step i."""
        step = self.live(times[i : i + 1] * 1000, self.residual, self.alpha)
        view = self.views[i] if self.views else None
        return estimate(self.backbone, bridge, state, degraded, step, times[i], self.config.t0, view)


PATH = Bridge("snr", level=0.2)  # DDBM's path with `mini`'s noise, which `i_bridge` found better from nothing
LEARNED = {
    "states": (Learner.start, {}),
    "consistency": (ConsistencyLearner.start, {}),
    "unroll 1": (Learner.start, {"unroll": 1}),
    "unroll 2": (Learner.start, {"unroll": 2}),
    "DDBM's path, states": (BridgeLearner.on(PATH), {}),
    "DDBM's path, unroll 2": (BridgeLearner.on(PATH), {"unroll": 2}),
}


def prompt_of(study: Study, how: str, task: str, seed: int) -> Prompt:
    """A prompt learned one of the ways; kept in `work`."""
    start, changes = LEARNED[how]
    return variant(study, task, seed, how, start, **changes)


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """Every way to learn in every number of evaluations."""

    def run(how: str, count: int):
        t0 = study.learning.t0
        table = study.ebr_table(t0, count)

        def restore(case: Case, seed: int) -> Tensor:
            prompt = prompt_of(study, how, case.task, seed)
            if how.startswith("DDBM"):
                return restored(study, case.degraded, prompt, PATH, t0, count)
            return study.restore(case, prompt, table)

        return restore

    found = {f"{how}, {name_of(count)}": run(how, count) for how in LEARNED for count in COUNTS}
    return {"input": lambda case, seed: case.degraded} | found


def name_of(count: int) -> str:
    """What so many evaluations are called."""
    return f"{count} evaluation{'s' * (count > 1)}"


def equal(rows: Sequence[dict], arm: str) -> bool:
    """Whether an arm's means are not below the reference's by more than what counts as equal."""
    return all(difference(rows, arm, REFERENCE, what).mean >= -least for what, least in NEAR.items())


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("j_fewer", arguments(__doc__).parse_args(given), ("haze", "rain"))
    rows = study.measure(arms(study))
    few = {count: [f"{how}, {name_of(count)}" for how in LEARNED] for count in COUNTS[:2]}
    seconds = {
        how: fmean(prompt_of(study, how, task, seed).training["seconds"] for task in study.tasks for seed in study.seeds)
        for how in LEARNED
    }
    notes = [
        "second order from the second step on, as the fast schedule has it; first order on DDBM's path",
        *(
            f"in {name_of(count)} not below {REFERENCE!r} by more than {NEAR['psnr']:g} dB and {NEAR['ssim']:g} in the mean: "
            + (", ".join(arm.rpartition(",")[0] for arm in arms if equal(rows, arm)) or "none")
            for count, arms in few.items()
        ),
        "SSIM in one evaluation against it: "
        + ", ".join(f"{arm.rpartition(',')[0]} {signed(difference(rows, arm, REFERENCE, 'ssim'))}" for arm in few[1]),
        "processor seconds of learning a prompt: " + ", ".join(f"{how} {value:.0f}" for how, value in seconds.items()),
    ]
    finish(study, "J. One and two evaluations", rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


def signed(gap) -> str:
    """A difference in SSIM."""
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


if __name__ == "__main__":
    main()
