"""All experiments on the paper's claims one after the other (`all`), or how long they take on this machine (without it).

`python -m benchmarks.claims all` takes the options of an experiment (see `python -m benchmarks.claims.b_process --help`) and runs
them in one process, so that scenes are rendered once and shared prompts are learned once; stopped, it goes on where it was. The
estimate is made from a few measured iterations and one restoration.
"""

import importlib
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.claims.common import broad_arguments, make_case, study_of
from benchmarks.report import about, columns, describe
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.training.procedural import render

FEW, MORE = 2, 12  # iterations: their difference is free of what a run begins with
# Experiment: of each task and seed, prompts (and what else takes as long) learned, and restorations of a photo.
WORK = {
    "b_process": (3, 9),
    "a_space": (3, 6),
    "g_baselines": (4, 6),
    "e_prompt": (5, 5),
    "d_schedule": (3, 15),
    "h_adaptive": (3, 4),
    "f_mixtures": (3, 7),  # three mixtures and what none has learned, as if there were five
    "c_secretly_knows": (4, 9),
}


def measured(options: Namespace, folder: Path) -> tuple[float, float]:
    """Processor seconds of a run of learning, and of a restoration."""
    study = replace(study_of("estimate", options, ("haze",)), work=folder)
    seconds = []
    for count in (FEW, FEW, MORE):  # the first one also loads and renders
        few = replace(study, learning=replace(study.learning, iterations=count, scenes=2), seeds=(len(seconds),))
        started = time.process_time()
        prompt = few.prompt("haze", len(seconds))
        seconds.append(time.process_time() - started)
    case, table = make_case("chelsea", "haze", study.size, 0), study.ebr_table(study.learning.t0)
    study.restore(case, prompt, table)
    started = time.process_time()
    study.restore(case, prompt, table)
    restored = time.process_time() - started
    return (seconds[2] - seconds[1]) / (MORE - FEW) * study.learning.iterations, restored


def estimate(options: Namespace) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        learn, restore = measured(options, Path(folder))
    started = time.process_time()
    render(0)
    scenes = (time.process_time() - started) * options.scenes
    cells, lines = len(options.tasks or TASKS) * len(options.seeds), []
    for name, (prompts, pictures) in WORK.items():
        prompts, pictures = prompts * cells, pictures * cells * len(options.photos)
        lines.append([name, str(prompts), str(pictures), f"{(prompts * learn + pictures * restore) / 60:.0f}"])
    print(columns(["experiment", "prompts", "restorations", "core minutes, estimated"], lines))
    print(f"a run of learning {learn:.0f} s, a restoration {restore:.2f} s of processor time; the scenes {scenes:.0f} s, once")
    print("shared prompts are learned once; c_secretly_knows also pre-trains two backbones")
    print("\n".join(describe(about())))


def main(given: Sequence[str] | None = None) -> None:
    """Run all, or estimate."""
    given = list(sys.argv[1:] if given is None else given)
    if given[:1] != ["all"]:
        estimate(broad_arguments(__doc__).parse_args(given))
        return
    for name in WORK:
        importlib.import_module(f"benchmarks.claims.{name}").main(given[1:])


if __name__ == "__main__":
    main()
