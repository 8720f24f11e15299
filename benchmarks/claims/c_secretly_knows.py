"""C. Does the frozen transformer know how to restore before a prompt is learned? The same prompts on three frozen backbones.

One has seen degraded images in pre-training, one only clean ones, one is random. If the prompt did the work, all would restore.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from benchmarks.claims.common import TINY, Study, arguments, fingerprint, save_random, study_of
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.mini import MINI, load_mini
from ebr_engine.catalogue import TASKS
from ebr_engine.evaluation.photos import Case
from ebr_engine.training.pretrain import PretrainConfig, pretrain

REFERENCE = "input"


def clean_only(path: Path, model: Path, minutes: float | None, compile_blocks: bool = True) -> Path:
    """Pre-train a backbone on clean images only, for as long as `model` was unless `minutes` says otherwise; resumable."""
    if not path.exists() or path.with_suffix(".ckpt").exists():
        minutes = minutes or float(load_mini(model).training["minutes"])
        pretrain(path, PretrainConfig(minutes=minutes, degraded=0.0, compile=compile_blocks))
        path.with_suffix(".ckpt").unlink(missing_ok=True)
    return path


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


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    parser = arguments(__doc__)
    parser.add_argument("--clean-model", type=Path, metavar="FILE", help="pre-trained on clean images (made, if missing)")
    parser.add_argument("--minutes", type=float, help="of that pre-training; as long as the backbone's own by default")
    options = parser.parse_args(given)
    study = study_of("c_secretly_knows", options, TASKS)
    study.work.mkdir(parents=True, exist_ok=True)
    if study.quick:
        clean, random = (save_random(study.work / f"tiny{i}.safetensors", TINY, i, gain=10) for i in (1, 2))
    else:
        clean = clean_only(options.clean_model or study.work / "clean.safetensors", study.model, options.minutes)
        random = save_random(study.work / "random.safetensors", MINI, codec=load_mini(study.model).codec)
    backbones = {"degraded seen": study.model, "clean only": clean, "random": random}
    more = {f"{name} backbone": fingerprint(path) for name, path in backbones.items()}
    rows = study.measure(arms(study, backbones), **more)
    notes = ["'clean only' was pre-trained with the same settings but for the share of degraded images, which is 0"]
    question = "C. What the frozen transformer knows"
    finish(study, question, rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
