"""D. Where the bridge starts and how it is walked: T0 (a prompt learned for each), number of steps, order of the solver."""

import sys
from collections.abc import Sequence
from itertools import product

from benchmarks.claims.common import Study, broad_arguments, study_of
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.bridge.schedules import FAST_POWER
from ebr_engine.prompts.catalogue import TASKS

T0 = 0.2
STEPS = (1, 2, 3, 5, 8)
OTHERS = (0.1, 0.4)  # T0
FEWER = (1, 2, 5)  # evaluations at those, of second order


def arm_name(t0: float, count: int, order: int) -> str:
    """What an arm is called."""
    return f"T0 {t0:g}, {count} steps, order {order}"


def arms(study: Study) -> dict:
    """Both orders in every number of steps, and other starts; one step has no second order."""
    others, fewer, counts = ((0.4,), (1, 2), (1, 2)) if study.quick else (OTHERS, FEWER, STEPS)

    def walked(t0: float, count: int, order: int):
        table = study.ebr_table(t0, count, order)
        return lambda case, seed: study.restore(case, study.prompt(case.task, seed, t0=t0), table)

    runs = [(T0, count, order) for count, order in product(counts, (1, 2)) if order == 1 or count > 1]
    runs += [(t0, count, min(count, 2)) for t0, count in product(others, fewer)]
    return {arm_name(*run): walked(*run) for run in runs}


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("d_schedule", broad_arguments(__doc__).parse_args(given), TASKS)
    rows = study.measure(arms(study))
    reference = arm_name(T0, study.steps, 2)
    notes = [f"each T0 has prompts learned for it; t_i = T0 (1 - i/N)^{FAST_POWER:g}"]
    finish(study, "D. T0, steps, order", rows, reference, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
