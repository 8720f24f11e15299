"""M. Which of two prompts goes first: both orders for every pair of tasks, and one order for all of them.

That haze goes before rain, snow and blur was found on the first table's photos; the second table confirms it, or does not, on
other photos and other draws. Nothing is learned: the prompts are the bundled ones. `--task auto` mends in that order.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

from torch import Tensor

from benchmarks.claims.common import Study, arguments, study_of
from benchmarks.claims.f_mixtures import mixture
from benchmarks.claims.m_weights import runner
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.mini.model import WEIGHTS
from ebr_engine.evaluation.photos import Case
from ebr_engine.prompts.catalogue import TASKS

LAST, FIRST = "what came last goes first", "what came first goes first"
ORDER = ("lowlight", "haze", "blur", "snow", "rain")
TONES = "tones first"
PAIRS = tuple("+".join(tasks) for tasks in combinations(TASKS, 2))
OTHERS = ("camera", "coins", "brick", "grass")  # photos that neither prompts nor the order have seen


def arms(study: Study, name: str) -> dict[str, Callable[[Case, int], Tensor]]:
    """Two prompts in turn, in every order."""
    tasks = name.split("+")

    def run(order: Sequence[str]):
        way = runner(study.restorer, order, [1.0] * len(order))
        return lambda case, seed: way(case.degraded)

    orders = {LAST: tasks[::-1], FIRST: tasks, TONES: sorted(tasks, key=ORDER.index)}
    return {"input": lambda case, seed: case.degraded} | {arm: run(order) for arm, order in orders.items()}


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the tables and the plots."""
    parser = arguments(__doc__)
    options = parser.parse_args(given)
    if options.tasks or options.model != WEIGHTS:
        parser.error("tasks and prompts are fixed; leave --tasks and --model out")
    study = replace(study_of("m_order", options, ()), model=WEIGHTS, tasks=PAIRS[:1] if options.quick else PAIRS)
    other = replace(study, name="m_order_confirmed", photos=OTHERS[:1] if options.quick else OTHERS)
    other = replace(other, seeds=tuple(seed + len(study.seeds) for seed in study.seeds))
    notes = ["degraded in the order of the names, each at a strength drawn for the photo; two evaluations a prompt"]
    notes.append(f"tones first: {', '.join(ORDER)}")
    command = command_of(__file__, given, sys.argv[1:])
    for one, title in ((study, "Which of two prompts goes first"), (other, "The order for all, on other photos and draws")):
        rows = [
            row for name in one.tasks for row in replace(one, tasks=(name,)).measure(arms(one, name), mixture(name.split("+")))
        ]
        finish(one, f"M. {title}", rows, LAST, command, notes, learned=False)


if __name__ == "__main__":
    main()
