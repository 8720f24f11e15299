"""`python -m benchmarks.quality auto-task`: how well `--task auto` sees what is wrong with a photo, and what that is worth in dB.

Seeing: ten photos of scikit-image, which no training has seen, each whole (reduced) and as two crops at full resolution, clean
and degraded by every task and every pair of tasks, with strengths from a quarter to full and test seeds. Told: precision and
recall of every label, and how often all labels are right. Mending: the quality benchmark's photos at strength 0.75, restored by
what auto chose and by an oracle who knows the tasks, two one after the other; where auto sees nothing, the input stays. For
pairs also the ways to mix two prompts in one run: residuals with weights of 1 or of a half, and the mean of velocities.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import columns, mean
from ebr_engine.engine.classify import Classifier, bundled, diagnose, load_classifier
from ebr_engine.evaluation.metrics import psnr
from ebr_engine.evaluation.photos import NAMES, STRENGTH, load_photo
from ebr_engine.media.degradations import degrade, seeds
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.training.classifier import as_stored, spoil

GREY = ("camera", "coins", "brick", "grass", "gravel")
PHOTOS = (*NAMES, "rocket", *GREY)
SIDE = 256
LEAST = 0.25  # strength
SETS = ((), *((task,) for task in TASKS), *combinations(TASKS, 2))


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="another one than the bundled")
    parser.add_argument("--part", choices=("seeing", "mending"), help="only this part")
    parser.add_argument("--size", type=int, default=128, help="side of the photos that are restored")
    parser.add_argument("--quick", action="store_true", help="one photo, to try the benchmark itself")


def measure(options: Namespace) -> dict[str, Any]:
    """How well `--task auto` sees what is wrong with a photo, and what that is worth in dB."""
    model = load_classifier(options.classifier) if options.classifier else bundled()
    result: dict[str, Any] = {}
    if options.part != "mending":
        result["seeing"] = summed(list(seen(model, PHOTOS[:1] if options.quick else PHOTOS)))
    if options.part != "seeing":
        result |= {"size": options.size, "mending": list(mended(model, options.size, options.quick))}
    return result


def table(result: dict[str, Any]) -> str:
    """What a person reads of both parts."""
    parts = [seeing_table(result["seeing"])] if "seeing" in result else []
    return "\n\n".join(parts + ([mending_table(result["mending"], result["size"])] if "mending" in result else []))


def seen(model: Classifier, photos: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every case: {photo, view, tasks, found, probability}."""
    for number, photo in enumerate(photos):
        for view, (clean, depth) in enumerate(views(photo)):
            for index, tasks in enumerate(SETS):
                generator = torch.Generator().manual_seed(seeds("test").start + 1000 * (3 * number + view) + index)
                labels = torch.tensor([[float(task in tasks) for task in TASKS]])
                picture = as_stored(_spoilt(clean, depth, labels, generator), 0.5, generator)[0]
                diagnosis = diagnose([picture], model)
                found = [task for task in TASKS if task in diagnosis.tasks]
                yield {"photo": photo, "view": view, "tasks": list(tasks), "found": found, "probability": diagnosis.probability}


def views(photo: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The photo reduced to a square, and two of its corners as they are, with their depth where it is known."""
    yield load_photo(photo, SIDE)
    pixels, depth = load_photo(photo, None)
    for corner in ((..., slice(SIDE), slice(SIDE)), (..., slice(-SIDE, None), slice(-SIDE, None))):
        yield pixels[corner], None if depth is None else depth[corner]


def summed(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Precision and recall by label, and the share of cases whose labels are all right, by the number of tasks."""
    labels = {}
    for task in TASKS:
        hits = sum(task in case["tasks"] and task in case["found"] for case in cases)
        labels[task] = {
            "precision": hits / max(1, sum(task in case["found"] for case in cases)),
            "recall": hits / max(1, sum(task in case["tasks"] for case in cases)),
        }
    right = {}
    for count, name in enumerate(("clean", "one task", "two tasks")):
        of = [case for case in cases if len(case["tasks"]) == count]
        right[name] = {
            "cases": len(of),
            "all right": sum(case["tasks"] == case["found"] for case in of) / len(of),
            "one of them right": sum(bool(set(case["tasks"]) & set(case["found"])) for case in of) / len(of),
        }
    return {"labels": labels, "right": right, "cases": cases}


def mended(model: Classifier, size: int, quick: bool) -> Iterator[dict[str, Any]]:
    """PSNR of every photo and set of tasks, by way: {photo, tasks, found, input, auto, oracle, ...}."""
    from ebr_engine.engine.restorer import Restorer

    restorer = Restorer("mini", device="cpu", precision="fp32")
    sets = [*((task,) for task in TASKS), *combinations(TASKS, 2)]
    plans: dict[tuple, Any] = {}

    def restored(picture: Tensor, tasks: Sequence[str], weight: float = 1.0, mix: str = "auto") -> Tensor:
        key = (*tasks, weight, mix)
        if key not in plans:
            plans[key] = restorer.plan("+".join(f"{task}:{weight}" for task in tasks), mix=mix)
        return (restorer.run(picture, plans[key]) * 255).round() / 255

    for number, photo in enumerate(NAMES[:1] if quick else NAMES):
        clean, depth = load_photo(photo, size)
        for tasks in sets[:1] + sets[5:6] if quick else sets:
            generator = torch.Generator().manual_seed(seeds("test").start + number)
            picture = clean
            for task in sorted(tasks, key=TASKS.index):
                picture = degrade(picture, task, generator, depth=depth, strength=STRENGTH)
            picture = (picture * 255).round() / 255
            found = diagnose([picture[0]], model).tasks
            record = {"photo": photo, "tasks": list(tasks), "found": list(found), "input": psnr(picture, clean)}
            record["auto"] = psnr(restored(picture, found), clean) if found else record["input"]
            record["oracle"] = psnr(restored(picture, sorted(tasks, key=TASKS.index, reverse=True)), clean)
            if len(tasks) == 2:
                record["oracle, residuals"] = psnr(restored(picture, tasks, mix="residual"), clean)
                record["oracle, halves"] = psnr(restored(picture, tasks, 0.5, "residual"), clean)
                record["oracle, velocities"] = psnr(restored(picture, tasks, mix="velocity"), clean)
                record["better of one"] = max(psnr(restored(picture, (task,)), clean) for task in tasks)
            yield record


def _spoilt(clean: Tensor, depth: Tensor | None, labels: Tensor, generator: torch.Generator) -> Tensor:
    strengths = LEAST + (1 - LEAST) * torch.rand(len(TASKS), generator=generator)
    return spoil(clean, depth, labels, generator, strengths)


def seeing_table(result: dict[str, Any]) -> str:
    """What a person reads of the first part."""
    labels = [(task, f"{row['precision']:.0%}", f"{row['recall']:.0%}") for task, row in result["labels"].items()]
    right = [
        (name, str(row["cases"]), f"{row['all right']:.0%}", f"{row['one of them right']:.0%}" if name != "clean" else "")
        for name, row in result["right"].items()
    ]
    header = ("picture", "cases", "all right", "one of them right")
    return "\n".join((columns(("label", "precision", "recall"), labels), "", columns(header, right)))


def mending_table(records: Sequence[dict[str, Any]], size: int) -> str:
    """What a person reads of the second part: means over photos, and over all cases of one and of two tasks."""
    ways = [way for way in max(records, key=len) if way not in ("photo", "tasks", "found")]
    groups = {" + ".join(record["tasks"]): [] for record in records}
    for record in records:
        groups[" + ".join(record["tasks"])].append(record)
    groups |= {name: found for count, name in ((1, "one task"), (2, "two tasks")) if (found := _of(records, count))}
    rows = [(name, *(f"{mean(found, way):.2f}" if way in found[0] else "" for way in ways)) for name, found in groups.items()]
    return f"mini, {size} x {size}, PSNR in dB, mean of the photos\n" + columns(("tasks", *ways), rows)


def _of(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [record for record in records if len(record["tasks"]) == count]
