"""M. Past the paper: strengths, order and way of mixing chosen on the picture itself, without a reference, by the frozen model.

A prompt that has done its work finds nothing more to do: the result is given to the model again, and the way whose result
changes least is chosen. Four judges, none of which has a number to fit:

* own: the same way once more
* probe: one run for all ways, every prompt in turn at its full strength
* empty: the frozen model with the empty prompt
* classifier: that of `--task auto`, the sum of its probabilities

The ways: in turn with each prompt at 0.5, 1 or 1.5 of its strength, in turn the other way round, residuals in one run, the mean
of velocities, one prompt alone; for a single degradation five strengths. Nothing is learned: the prompts are the bundled ones.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from benchmarks.claims.common import Row, Study, arguments, scores, study_of
from benchmarks.claims.f_mixtures import MIXTURES, mixture
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.mini.model import WEIGHTS
from ebr_engine.engine.classify import diagnose
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.photos import Case

Way = Callable[[Tensor], Tensor]
SINGLE = ("haze", "rain", "lowlight")
STRENGTHS = (0.5, 1.0, 1.5)
FINER = (0.5, 0.75, 1.0, 1.25, 1.5)
JUDGES = ("own", "probe", "empty", "classifier")
REFERENCE = "in turn, as they are"


def runner(restorer: Restorer, tasks: Sequence[str], weights: Sequence[float], mix: str = "turn") -> Way:
    """A run with bundled prompts at these strengths, its result as a file holds it."""
    plan = restorer.plan("+".join(f"{task}:{weight}" for task, weight in zip(tasks, weights)), mix=mix, supersample=1)

    def run(picture: Tensor) -> Tensor:
        return (restorer.run(picture, plan).clamp(0, 1) * 255).round() / 255

    return run


def ways(restorer: Restorer, tasks: Sequence[str], strengths: Sequence[float] = STRENGTHS) -> dict[str, Way]:
    """All ways to restore what was degraded by `tasks`, one after the other; in turn means the last one first."""
    turn = tuple(reversed(tasks))
    if len(tasks) == 1:
        found = {(one,): runner(restorer, tasks, (one,)) for one in FINER}
        return {named(weights): way for weights, way in found.items()}
    found = {named(weights): runner(restorer, turn, weights) for weights in product(strengths, repeat=len(tasks))}
    ones = (1.0,) * len(tasks)
    found |= {"the other way round": runner(restorer, tasks, ones)}
    found |= {f"residuals, {weight:g}": runner(restorer, turn, [weight] * len(tasks), "residual") for weight in (0.5, 1.0)}
    found |= {"mean of velocities": runner(restorer, turn, ones, "velocity")}
    return found | {f"{task} alone": runner(restorer, (task,), (1.0,)) for task in tasks}


def named(weights: Sequence[float]) -> str:
    """What prompts in turn at these strengths are called."""
    return REFERENCE if set(weights) == {1.0} else "in turn, " + " and ".join(f"{weight:g}" for weight in weights)


def change(before: Tensor, after: Tensor) -> float:
    """Root of the mean square."""
    return (after - before).square().mean().sqrt().item()


def judged(study: Study, tasks: Sequence[str]) -> Callable[[Case, int], list[Row]]:
    """A function that gives the rows of a case: every way's scores, and what each judge makes of it, less being better."""
    restorer = study.restorer
    known = ways(restorer, tasks, STRENGTHS[1:2] if study.quick else STRENGTHS)
    probe = known[REFERENCE]
    table = study.ebr_table(study.learning.t0)

    def rows(case: Case, seed: int) -> list[Row]:
        found = []
        for name, way in known.items():
            result = way(case.degraded)
            judges = {
                "own": change(result, way(result)),
                "probe": change(result, probe(result)),
                "empty": change(result, study.restore(Case("", "", result, result), None, table)),
                "classifier": sum(diagnose(list(result)).probability.values()),
            }
            found.append(
                {"arm": name, "task": case.task, "photo": case.photo, "seed": seed} | scores(result, case.clean) | judges
            )
        return found

    return rows


def measure(study: Study) -> list[Row]:
    """Every way in every cell; what the store holds is not made again."""
    rows = []
    for name in study.tasks:
        tasks = name.split("+")
        one = None
        for seed in study.seeds:
            key = study.settings | {"task": name, "seed": seed, "ways": "bundled prompts"}

            def compute(seed: int = seed, name: str = name, tasks: Sequence[str] = tasks) -> list[Row]:
                nonlocal one
                one = one or judged(study, tasks)
                return [row for case in study.cases(name, seed, mixture(tasks)) for row in one(case, seed)]

            rows += study.store.run(key, compute)
    return rows


def chosen(rows: Iterable[Row], arm: str, worth: Callable[[Row], float]) -> list[Row]:
    """The row of least `worth` in each cell, under the name of an arm."""
    best: dict[tuple, Row] = {}
    for row in rows:
        cell = row["task"], row["photo"], row["seed"]
        if cell not in best or worth(row) < worth(best[cell]):
            best[cell] = row
    return [row | {"arm": arm, "way": row["arm"]} for row in best.values()]


def inputs(study: Study) -> list[Row]:
    """The degraded photos' rows."""
    return [
        {"arm": "input", "task": name, "photo": case.photo, "seed": seed} | scores(case.degraded, case.clean)
        for name in study.tasks
        for seed in study.seeds
        for case in study.cases(name, seed, mixture(name.split("+")))
    ]


def best_fixed(rows: Sequence[Row]) -> list[Row]:
    """The best one way for each task, chosen with the truth: what a table of weights by task could reach."""
    means: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        means.setdefault((row["task"], row["arm"]), []).append(row["psnr"])
    mean = {key: sum(values) / len(values) for key, values in means.items()}
    return chosen(rows, "best way of each task (truth)", lambda row: -mean[row["task"], row["arm"]])


def rank_correlation(rows: Sequence[Row], judge: str) -> float:
    """Spearman's, of a judge and PSNR over the ways, its mean over the cells: 1 is a judge that knows the truth."""
    by_cell: dict[tuple, list[Row]] = {}
    for row in rows:
        by_cell.setdefault((row["task"], row["photo"], row["seed"]), []).append(row)
    found = []
    for cell in by_cell.values():
        ranks = [torch.tensor([row[what] for row in cell]).argsort().argsort().double() for what in ("psnr", judge)]
        found.append(-torch.corrcoef(torch.stack(ranks))[0, 1].item())
    return sum(found) / len(found)


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    parser = arguments(__doc__)
    options = parser.parse_args(given)
    if options.tasks or options.model != WEIGHTS:
        parser.error("mixtures and prompts are fixed; leave --tasks and --model out")
    torch.manual_seed(0)
    study = study_of("m_weights", options, ["+".join(tasks) for tasks in MIXTURES] + list(SINGLE))
    # In the quick form too the backbone that bundled prompts fit; its evaluations are not quick.
    study = replace(study, model=WEIGHTS, photos=study.photos[:1] if study.quick else study.photos)
    rows = measure(study)
    picked = {judge: chosen(rows, f"chosen by {judge}", lambda row, judge=judge: row[judge]) for judge in JUDGES}
    told = inputs(study) + [row for row in rows if row["arm"] == REFERENCE]
    told += [row for arm in picked.values() for row in arm] + best_fixed(rows) + chosen(rows, "oracle", lambda row: -row["psnr"])
    notes = [
        "every degradation at a strength drawn for the photo; two evaluations a prompt",
        "rank correlation of a judge with PSNR over the ways, mean over the cells: "
        + ", ".join(f"{judge} {rank_correlation(rows, judge):+.2f}" for judge in JUDGES),
    ]
    command = command_of(__file__, given, sys.argv[1:])
    finish(study, "M. Weights found on the picture itself", told, REFERENCE, command, notes, learned=False)


if __name__ == "__main__":
    main()
