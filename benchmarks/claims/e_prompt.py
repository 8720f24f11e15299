"""E. What a prompt is made of and learned by: tokens, sharing between blocks, loss, states or results."""

import sys
from collections.abc import Sequence

from benchmarks.claims.common import Study, broad_arguments, study_of, variants
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.prompts.catalogue import TASKS

SWEEP = {
    "tokens": (1, 16),
    "per_block": (False, True),
    "loss": ("pixel", "velocity"),
    "unroll": (0, 2),
}
QUICK = {"tokens": (1, 4), "per_block": (True,), "loss": ("pixel", "velocity")}


def arms(study: Study) -> dict:
    """The base settings, and one of them changed at a time."""
    learning = study.learning
    sweep = QUICK if study.quick else SWEEP
    table = study.ebr_table(learning.t0)

    def learned(changes: dict):
        return lambda case, seed: study.restore(case, study.prompt(case.task, seed, **changes), table)

    return {base_name(study): learned({})} | {name: learned(changes) for name, changes in variants(learning, **sweep)}


def base_name(study: Study) -> str:
    """What the arm is called that the others differ from."""
    learning = study.learning
    shared = f"tokens {learning.tokens}, alpha {learning.alpha:g}, loss {learning.loss}, power {learning.power:g}"
    return f"base: {shared}"


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("e_prompt", broad_arguments(__doc__).parse_args(given), TASKS)
    rows = study.measure(arms(study))
    question = "E. The prompt: tokens, sharing, loss, states or results"
    notes = ["per_block: a prompt of its own for each block; unroll 2: learned from the result of two steps, through both"]
    finish(study, question, rows, base_name(study), command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
