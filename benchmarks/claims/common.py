"""What the experiments share: options, cells of (task, photo, seed), learned prompts, a store that a run can go on from.

A seed is one run of learning, and one draw of every photo's degradation: arms are compared within the same cells.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS
from ebr_engine.backbones.layers import trunk_dtype
from ebr_engine.backbones.mini.model import WEIGHTS, Mini, load_mini, save_mini
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.bridge.sampler import StepTable, step_table
from ebr_engine.bridge.schedules import FAST_POWER, FAST_STEPS, power_times
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.photos import NAMES, STRENGTH, TEN, Case, load_photo
from ebr_engine.media.degradations import degrade, seeds
from ebr_engine.media.images import write_atomically
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.pretrainee import Pretrainee, finished

Row = dict[str, Any]  # arm, task, photo, seed, psnr, ssim
Degrade = Callable[[Tensor, torch.Generator, Tensor | None], Tensor]  # clean, generator, depth → degraded
STORM = 1000  # between the test seeds of one draw and the next
TINY = WanConfig((1, 2, 2), 2, 12, 48, 48, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)


@dataclass(frozen=True)
class Learning:
    """What every prompt of a study is learned with, unless an arm says otherwise."""

    iterations: int = 100
    batch: int = 32
    size: int = 64  # pixels a side of the crops
    t0: float = 0.2
    tokens: int = 16
    alpha: float = 0.1
    loss: str = "pixel"
    power: float = 1.0
    scenes: int = 512


@dataclass(frozen=True)
class Study:
    """One experiment's options. `model`: the frozen backbone's weights."""

    name: str
    model: Path
    out: Path  # the table, the plot, and the store
    work: Path  # learned prompts
    tasks: tuple[str, ...]
    photos: tuple[str, ...] = NAMES
    seeds: tuple[int, ...] = (0, 1, 2)
    size: int = 128  # pixels a side of the photos
    steps: int = FAST_STEPS
    learning: Learning = Learning()
    quick: bool = False

    @cached_property
    def restorer(self) -> Restorer:
        """The frozen backbone."""
        return Restorer("mini", model=self.model, precision="fp32" if self.quick else "auto")

    @cached_property
    def mini(self) -> Mini:
        """The same backbone in its parts, for what the engine has no call for; in the precision that prompts learn in."""
        return load_mini(self.model, dtype=trunk_dtype("fp32" if self.quick else "auto", torch.device("cpu")))

    @cached_property
    def store(self) -> "Store":
        """What earlier runs have measured."""
        return Store(self.out / f"{self.name}.json")

    @property
    def settings(self) -> dict[str, Any]:
        """All that a cell's result depends on besides its arm, task and seed."""
        where = {"model": fingerprint(self.model), "photos": self.photos, "size": self.size, "steps": self.steps}
        where["schedule_power"] = FAST_POWER
        return where | {"learning": asdict(self.learning)}

    def named(self, name: str, tasks: Sequence[str]) -> "Study":
        """The same study under another name, on other tasks."""
        return replace(self, name=name, tasks=tuple(tasks))

    def cases(self, task: str, seed: int, how: Degrade | None = None) -> list[Case]:
        """The photos degraded for a task, or by `how`; a draw of its own for every seed, the benchmark's own for seed 0."""
        return [make_case(photo, task, self.size, seed, how) for photo in self.photos]

    def prompt(self, task: str, seed: int, **changes: Any) -> Prompt:
        """A prompt learned with the study's settings and these changes; kept in `work`, so that arms share it."""
        chosen = asdict(self.learning) | {"task": task, "seed": seed} | changes
        path = self.work / "prompts" / f"{key_of(chosen | {'model': fingerprint(self.model)})}.safetensors"
        if not path.exists():
            learn_prompt(self, chosen, path)
        return load_prompt(path)

    def restore(self, case: Case, prompt: Prompt | None, table: StepTable) -> Tensor:
        """A case's photo restored with a prompt (None: the empty one) along a step table."""
        plan = self.restorer.bake([(prompt, 1.0)] if prompt else [], table)
        return self.restorer.run(case.degraded, plan)

    def ebr_table(self, t0: float, steps: int | None = None, order: int = 2) -> StepTable:
        """The fast schedule."""
        return step_table(power_times(steps or self.steps, t0, FAST_POWER), t0, order)

    def measure(self, arms: dict[str, Callable[[Case, int], Tensor]], how: Degrade | None = None, **more: Any) -> list[Row]:
        """Rows of all arms, tasks and seeds; what the store holds already is not made again.

        An arm gives the restored picture [1, 3, H, W] of a case and a seed. `more`: what else its result depends on.
        """
        rows = []
        for task in self.tasks:
            for seed in self.seeds:
                for arm, restore in arms.items():
                    key = self.settings | {"arm": arm, "task": task, "seed": seed} | more
                    rows += self.store.run(key, lambda r=restore, t=task, s=seed, a=arm: self._rows(r, t, s, a, how))
        return rows

    def _rows(self, restore: Callable[[Case, int], Tensor], task: str, seed: int, arm: str, how: Degrade | None) -> list[Row]:
        return [
            {"arm": arm, "task": task, "photo": case.photo, "seed": seed, **scores(restore(case, seed), case.clean)}
            for case in self.cases(task, seed, how)
        ]


class Store:
    """Rows by the settings that made them, in one JSON file that is written whole after every run."""

    def __init__(self, path: Path):
        self.path = path
        self.runs: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, settings: dict[str, Any], compute: Callable[[], list[Row]]) -> list[Row]:
        """The rows of these settings: the stored ones, or those of `compute`, which are then stored."""
        key = key_of(settings)
        if key not in self.runs:
            started = time.monotonic()
            rows = [
                {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in compute()
            ]
            self.runs[key] = {"settings": settings, "seconds": round(time.monotonic() - started, 1), "rows": rows}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (told(self.runs) + "\n").encode())
        return self.runs[key]["rows"]


def told(runs: dict[str, dict]) -> str:
    """The JSON of a store, a row a line."""
    parts = []
    for key, run in runs.items():
        head = json.dumps({name: value for name, value in run.items() if name != "rows"})
        rows = ",\n".join(json.dumps(row) for row in run["rows"])
        parts.append(f'"{key}": {head[:-1]}, "rows": [\n{rows}\n]}}')
    return "{\n" + ",\n".join(parts) + "\n}"


def learn_prompt(study: Study, settings: dict[str, Any], path: Path) -> None:
    """Learn a prompt into `path` by the engine's learner, without the report of a run; `seconds` in it are processor time."""
    from benchmarks.claims.learning import config_of, fitted

    started = time.process_time()
    learner = fitted(study, config_of(study, **settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    learner.prompt({"seconds": round(time.process_time() - started, 1)}).save(path)


def make_case(photo: str, task: str, size: int, storm: int, how: Degrade | None = None) -> Case:
    """A photo degraded by the draw numbered `storm`, quantised to 8 bit; draw 0 is that of the quality benchmark."""
    clean, depth = load_photo(photo, size)
    generator = torch.Generator().manual_seed(seeds("test").start + STORM * storm + TEN.index(photo))
    if how is None:
        degraded = degrade(clean, task, generator, depth=depth, strength=STRENGTH)
    else:
        degraded = how(clean, generator, depth)
    return Case(photo, task, clean, (degraded * 255).round() / 255)


def scores(restored: Tensor, clean: Tensor) -> dict[str, float]:
    """PSNR and SSIM of a picture as a file would hold it."""
    restored = (restored.clamp(0, 1) * 255).round() / 255
    return {"psnr": psnr(restored, clean), "ssim": ssim(restored, clean)}


def key_of(settings: dict[str, Any]) -> str:
    """A short name for settings: equal ones have the same on every machine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(model: Path) -> str:
    """A weights file by its content."""
    return hashlib.sha256(model.read_bytes()).hexdigest()[:16]


def save_random(path: Path, sizes: WanConfig, seed: int = 0, codec: Any = None, gain: float = 1.0) -> Path:
    """Write a backbone of random numbers, as pre-training begins with, its output layer scaled by `gain`; returns its path."""
    from ebr_engine.backbones.mini.codec import PixelCodec

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Pretrainee(sizes)
    with torch.no_grad():
        model.trunk.patch_out.weight.mul_(gain)
    save_mini(path, finished(model, dict(model.named_parameters()), codec or PixelCodec(), {"random": seed}))
    return path


# What A to H are measured with.
BREADTH = {"photos": TEN, "size": 256, "steps": 2, "iterations": 80, "batch": 4, "crop": 48, "scenes": 256}


def broad_arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The same options, with the photos and the budget of the experiments on the paper's claims, and these defaults."""
    parser = arguments(description)
    parser.set_defaults(**BREADTH | defaults)
    return parser


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random backbone and a few steps: does it run?")
    parser.add_argument("--model", type=Path, default=WEIGHTS, metavar="FILE", help="the frozen backbone (the bundled one)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK")
    parser.add_argument("--photos", nargs="+", choices=TEN, default=NAMES, metavar="PHOTO")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N")
    parser.add_argument("--size", type=int, default=128, help="side of the square photos in pixels")
    parser.add_argument("--steps", type=int, default=FAST_STEPS, help="evaluations of the fast schedule")
    parser.add_argument("--iterations", type=int, default=Learning.iterations, help="of every run of learning")
    parser.add_argument("--batch", type=int, default=Learning.batch)
    parser.add_argument("--crop", type=int, default=Learning.size, help="side of the crops that prompts learn from")
    parser.add_argument("--scenes", type=int, default=Learning.scenes, help="procedural scenes that prompts learn from")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="table, plot and store (benchmarks/results/claims)")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), metavar="FOLDER", help="learned prompts")
    return parser


def study_of(name: str, options: argparse.Namespace, tasks: Sequence[str]) -> Study:
    """The study that a command line asks for; `tasks` where it names none. A quick one leaves the committed results alone."""
    learning = Learning(iterations=options.iterations, batch=options.batch, size=options.crop, scenes=options.scenes)
    work = options.work
    chosen = tuple(options.tasks or tasks)
    if not options.quick:
        out, photos, numbers = options.out or RESULTS / "claims", tuple(options.photos), tuple(options.seeds)
        return Study(name, options.model, out, work, chosen, photos, numbers, options.size, options.steps, learning)
    work = work / "quick"
    work.mkdir(parents=True, exist_ok=True)
    model = save_random(work / "tiny.safetensors", TINY, gain=10) if options.model == WEIGHTS else options.model
    few = replace(learning, iterations=2, batch=2, size=32, tokens=4, scenes=2)
    return Study(name, model, options.out or work, work, chosen[:1], NAMES[:2], (0, 1), 32, 2, few, quick=True)


def cells(rows: Sequence[Row], arm: str, value: str = "psnr") -> dict[tuple[str, str, int], float]:
    """An arm's values by (task, photo, seed)."""
    return {(row["task"], row["photo"], row["seed"]): row[value] for row in rows if row["arm"] == arm}


def in_order(rows: Sequence[Row], what: str) -> list[Any]:
    """The different values of a column, as they first come."""
    return list(dict.fromkeys(row[what] for row in rows))


def variants(base: Learning, **values: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One setting changed at a time: (name, change) for every value that is not the base's own."""
    for name, choices in values.items():
        for choice in choices:
            if choice != getattr(base, name, False):
                yield f"{name} {choice}", {name: choice}
