"""D. Where the bridge starts and how it is walked: T0 (a prompt learned for each), number of steps, order of the solver."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import steps
from benchmarks.claims.common import Study, arguments, study_of
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.bridge.sampler import draw_noise
from ebr_engine.bridge.schedules import FAST_POWER
from ebr_engine.evaluation.photos import Case

T0 = (0.1, 0.2, 0.3, 0.4, 0.6)
STEPS = (1, 2, 3, 5, 8, 20)
ORDERS = (1, 2)


def arm_name(t0: float, count: int, order: int) -> str:
    """What an arm is called."""
    return f"T0 {t0:g}, {count} steps, order {order}"


def arms(study: Study) -> dict:
    """Every T0 with every schedule; one step has no second order."""
    mini = load_mini(study.model)
    starts, counts = ((0.2, 0.4), (1, 2)) if study.quick else (T0, STEPS)

    def walked(t0: float, run: steps.Run):
        def restored(case: Case, seed: int) -> Tensor:
            degraded = mini.codec.encode(case.degraded.unsqueeze(2))
            prompt = study.prompt(case.task, seed, t0=t0)
            task = steps.Task(case.task, prompt, case.clean, degraded, draw_noise(degraded.shape, steps.SEED))
            with torch.no_grad():
                return mini.codec.decode(steps.restore(mini, task, run)).squeeze(2).clamp(0, 1)

        return restored

    runs = [(count, order) for count in counts for order in ORDERS if order == 1 or count > 1]
    return {arm_name(t0, n, order): walked(t0, steps.Run("fast", n, order)) for t0 in starts for n, order in runs}


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("d_schedule", arguments(__doc__).parse_args(given), ("haze", "rain", "lowlight"))
    rows = study.measure(arms(study))
    reference = arm_name(study.learning.t0, study.steps, 2)
    notes = [f"each T0 has prompts learned for it; t_i = T0 (1 - i/N)^{FAST_POWER:g}; the transformer runs in float32"]
    finish(study, "D. T0, steps, order", rows, reference, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
