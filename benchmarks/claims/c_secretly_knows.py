"""C. Does the frozen transformer know how to restore before a prompt is learned? The same prompts on four frozen backbones.

The given one; two that are pre-trained here for the same short time, one with degraded images among its clean ones, one without;
and a random one. If the prompt did the work, all would restore.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from benchmarks.claims.common import TINY, Study, broad_arguments, fingerprint, save_random, study_of
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.mini.model import MINI, load_mini
from ebr_engine.evaluation.photos import Case
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.training.pretrain import PretrainConfig, pretrain

REFERENCE = "input"


MINUTES = 2.0  # of processor time of each pre-training
# More steps for so few minutes than the settings of the bundled one give.
SHORT = {"batch": 24, "pool": 256, "scenes_per_second": 0.5, "compile": False}
DEGRADED = {"degraded seen": PretrainConfig().degraded, "clean only": 0.0}  # share of degraded images


def pretrained(folder: Path, name: str, minutes: float) -> Path:
    """A backbone pre-trained for minutes of processor time on one of the `DEGRADED` shares; an interrupted run goes on."""
    path = folder / f"{name.replace(' ', '_')}_{minutes:g}.safetensors"
    if not path.exists() or path.with_suffix(".ckpt").exists():
        pretrain(path, PretrainConfig(minutes=minutes, degraded=DEGRADED[name], **SHORT), clock=time.process_time)
        path.with_suffix(".ckpt").unlink(missing_ok=True)
    return path


def short_runs(folder: Path, minutes: float) -> dict[str, Path]:
    """Both short pre-trainings by what they are called: side by side, so that they share the machine alike."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(DEGRADED), context) as processes:
        running = {name: processes.submit(pretrained, folder, name, minutes) for name in DEGRADED}
        return {f"{name}, {minutes:g} minutes": future.result() for name, future in running.items()}


def arms(study: Study, backbones: dict[str, Path]) -> dict[str, Callable[[Case, int], Tensor]]:
    """The input, and on every backbone the empty prompt and a prompt learned on it."""
    found: dict[str, Callable[[Case, int], Tensor]] = {REFERENCE: lambda case, seed: case.degraded}
    for name, model in backbones.items():
        own = replace(study, model=model)
        table = own.ebr_table(study.learning.t0)
        found[f"{name}: empty prompt"] = lambda case, seed, own=own, table=table: own.restore(case, None, table)
        found[f"{name}: learned prompt"] = lambda case, seed, own=own, table=table: own.restore(
            case, own.prompt(case.task, seed), table
        )
    return found


def told_training(model: Path) -> str:
    """How long a backbone was pre-trained, all its runs together."""
    run, minutes, iterations = load_mini(model).training, 0.0, 0
    while run:
        minutes, iterations = minutes + float(run["minutes"]), iterations + int(run["iterations"])
        run = run.get("before")
    return f"{iterations} iterations in {minutes:.0f} minutes"


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    parser = broad_arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of processor time, for each of the two pre-trainings (2)")
    options = parser.parse_args(given)
    study = study_of("c_secretly_knows", options, TASKS)
    study.work.mkdir(parents=True, exist_ok=True)
    if study.quick:
        short = {name: save_random(study.work / f"tiny{i}.safetensors", TINY, i, gain=10) for i, name in enumerate(DEGRADED, 1)}
        random = save_random(study.work / "tiny3.safetensors", TINY, 3, gain=10)
    else:
        short = short_runs(study.work, options.minutes)
        random = study.work / "random.safetensors"
        if not random.exists():  # its bytes name what is learned on it, and another file of the same numbers has others
            save_random(random, MINI, codec=load_mini(study.model).codec)
    backbones = {"given": study.model, **short, "random": random}
    more = {f"{name} backbone": fingerprint(path) for name, path in backbones.items()}
    rows = study.measure(arms(study, backbones), **more)
    notes = [
        "'degraded seen' and 'clean only': pre-trained from nothing, with the same settings but for the share of degraded images",
        *(f"{name}: {told_training(path)}" for name, path in backbones.items() if not study.quick and name != "random"),
    ]
    question = "C. What the frozen transformer knows"
    finish(study, question, rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
