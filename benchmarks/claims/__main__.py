"""How long the experiments take on this machine: an estimate from a few measured iterations and one restoration."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.common import Learning, Study, arguments, make_case
from benchmarks.report import about, columns, describe
from ebr_engine.training.procedural import render

FEW, MORE = 2, 6  # iterations: their difference is free of what a run begins with
SEEDS, PHOTOS = 3, 4
# Experiment: prompts (and what else takes as long) learned, and restorations of a photo in five steps.
WORK = {
    "a_space": (3 * 3 * SEEDS, 3 * 6 * SEEDS * PHOTOS),
    "b_process": (5 * 3 * SEEDS, 5 * 9 * SEEDS * PHOTOS),
    "c_secretly_knows": (3 * 4 * SEEDS, 3 * 9 * SEEDS * PHOTOS),
    "d_schedule": (3 * 5 * SEEDS, 3 * 55 * SEEDS * PHOTOS),
    "e_prompt": (3 * 13 * SEEDS, 3 * 13 * SEEDS * PHOTOS),
    "f_mixtures": ((5 + 3) * SEEDS, (3 * 9 + 7) * SEEDS * PHOTOS),
    "g_baselines": (5 * 2 * SEEDS, 5 * 4 * SEEDS * PHOTOS),
    "h_adaptive": (3 * 5 * SEEDS, 3 * 4 * SEEDS * PHOTOS),
}


def measured(model: Path, learning: Learning, size: int) -> tuple[float, float]:
    """Processor seconds of a run of learning, rendering of its scenes included, and of a restoration."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (FEW, MORE):
            few = Learning(iterations=count, batch=learning.batch, size=learning.size, scenes=2)
            study = Study("estimate", model, Path(folder), Path(folder), ("haze",), size=size, learning=few)
            started = time.process_time()
            prompt = study.prompt("haze", 0)
            seconds.append(time.process_time() - started)
        iteration = (seconds[1] - seconds[0]) / (MORE - FEW)
        case, table = make_case("chelsea", "haze", size, 0), study.ebr_table(few.t0)
        study.restore(case, prompt, table)
        started = time.process_time()
        study.restore(case, prompt, table)
        restored = time.process_time() - started
    started = time.process_time()
    render(0)
    return iteration * learning.iterations + (time.process_time() - started) * learning.scenes, restored


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print the estimate."""
    options = arguments(__doc__).parse_args(given)
    learning = Learning(iterations=options.iterations, batch=options.batch, size=options.crop)
    if options.quick:
        learning = Learning(iterations=2, batch=2, size=32, scenes=2)
    learn, restore = measured(options.model, learning, options.size)
    lines = []
    for name, (prompts, pictures) in WORK.items():
        minutes = (prompts * learn + pictures * restore) / 60
        lines.append([name, str(prompts), str(pictures), f"{minutes:.0f}"])
    print(columns(["experiment", "prompts", "restorations", "core minutes, estimated"], lines))
    print(f"a run of learning {learn:.0f} s, a restoration {restore:.2f} s of processor time")
    print("shared prompts are learned once; c_secretly_knows also pre-trains two backbones")
    print("\n".join(describe(about())))


if __name__ == "__main__":
    main()
