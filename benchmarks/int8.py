"""What int8 layers cost and gain on a CPU.

Pictures: every task and photo of `ebr-engine eval`, restored by the trunk in float32, and by its int8 layers, the rest float32:
PSNR of the one from the other, and of both against the truth. Activations have 8 bits or, as on a CPU whose products would
saturate, 7. Time: evaluations of `mini` and of four blocks of Wan 1.3B's width in interleaved rounds, processor time of all
threads, with the packed float32 products that are the default, and in int8.
"""

import copy
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.models import random_model, work_of
from benchmarks.report import columns, mean, spread
from ebr_engine.backbones.layers import Int8Linear, pack_trunk, quantize_trunk
from ebr_engine.bridge.sampler import make_table
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation import quality
from ebr_engine.evaluation.photos import NAMES, make_case
from ebr_engine.kernels import int8_linear
from ebr_engine.prompts.catalogue import TASKS

LEVELS = {"int8": 127, "int8, 7-bit activations": 63}


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=128, help="side of the photos in pixels")
    parser.add_argument("--photos", type=int, default=len(NAMES), help="how many of the photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one photo, one task, a tiny model, to try the benchmark itself")


def measure(options: Namespace) -> dict[str, Any]:
    """What int8 layers cost in dB and gain in time, on a CPU."""
    if not int8_linear.can_int8():
        options.error("this CPU or this torch has no int8 products")
    tasks, photos = (TASKS[:1], NAMES[:1]) if options.quick else (TASKS, NAMES[: options.photos])
    pictures = compared(options.size, tasks, photos)
    return {"size": options.size, "pictures": pictures, "seconds": times(options.rounds, options.quick)}


@torch.no_grad()
def compared(size: int, tasks: tuple[str, ...], photos: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row a task, photo and form: PSNR from float32's picture, and of both from the truth."""
    exact, rounded = (Restorer("mini", device="cpu", precision="fp32", compile="off") for _ in range(2))
    quantize_trunk(rounded.trunk, Int8Linear)
    exact_levels, rows = int8_linear.activation_levels(), []
    for task in tasks:
        plan = exact.plan(task)
        for photo in photos:
            case = make_case(photo, task, size)
            wanted = exact.run(case.degraded, plan)
            for form, levels in LEVELS.items():
                if levels > exact_levels:
                    continue
                with patch.object(int8_linear, "activation_levels", lambda levels=levels: levels):
                    result = rounded.run(case.degraded, plan)
                scores = [quality.psnr(a, b) for a, b in ((result, wanted), (result, case.clean), (wanted, case.clean))]
                names = ("from_float32", "from_truth", "float32_from_truth")
                rows.append({"task": task, "photo": photo, "form": form} | dict(zip(names, scores)))
            print(f"{task}, {photo}: {rows[-1]['from_float32']:.1f} dB from float32's", flush=True)
    return rows


@torch.no_grad()
def times(rounds: int, quick: bool) -> dict[str, dict[str, Any]]:
    """{case: {form: spread of an evaluation's seconds}}."""
    cases = {"wan-width": wan_width(quick)}
    if not quick:
        cases["mini"] = mini(512)
    found = {}
    for name, forms in cases.items():
        taken: dict[str, list[float]] = {form: [] for form in forms}
        for function in forms.values():
            function()
        for _ in range(rounds):
            for form, function in forms.items():
                started = time.process_time()
                function()
                taken[form].append(time.process_time() - started)
        print(f"{name}: " + ", ".join(f"{form} {median(values):.3f} s" for form, values in taken.items()), flush=True)
        found[name] = {form: spread(values) for form, values in taken.items()}
    return found


def wan_width(quick: bool) -> dict[str, Callable[[], Tensor]]:
    case = random_model(work_of("wan-width", quick), "cpu", torch.float32)
    step = case.bake(case.timesteps(make_table("fast", case.t0)))[0]
    return forms_of(case.trunk, case.degraded, step)


def mini(size: int) -> dict[str, Callable[[], Tensor]]:
    engine = Restorer("mini", device="cpu", precision="fp32", compile="off")
    latent = engine.codec.encode(torch.rand(1, 3, 1, size, size))
    return forms_of(engine.trunk, latent, engine.plan("rain").tables[0][0])


def forms_of(trunk: torch.nn.Module, latent: Tensor, step: Any) -> dict[str, Callable[[], Tensor]]:
    narrow = copy.deepcopy(trunk)
    quantize_trunk(narrow, Int8Linear)
    forms = {"float32": trunk, "int8": narrow}
    for one in forms.values():
        pack_trunk(one)
    return {form: lambda one=one: one(latent, step) for form, one in forms.items()}


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    rows = []
    for form in dict.fromkeys(row["form"] for row in result["pictures"]):
        for task in dict.fromkeys(row["task"] for row in result["pictures"]):
            mine = [row for row in result["pictures"] if (row["form"], row["task"]) == (form, task)]
            least, change = min(row["from_float32"] for row in mine), mean(mine, "from_truth") - mean(mine, "float32_from_truth")
            distances = f"{median(row['from_float32'] for row in mine):.1f}", f"{least:.1f}"
            rows.append([f"{form}: {task}", *distances, f"{mean(mine, 'float32_from_truth'):.2f}", f"{change:+.3f}"])
    header = ["PSNR in dB", "from float32's, median", "least", "float32 from truth", "change"]
    lines = [f"mini, {result['size']} x {result['size']}", "", columns(header, rows), ""]
    for name, forms in result["seconds"].items():
        medians = {form: values["median"] for form, values in forms.items()}
        gain = medians["float32"] / medians["int8"]
        lines.append(f"{name}: {medians['float32'] * 1e3:.0f} ms in float32, {medians['int8'] * 1e3:.0f} ms in int8, x{gain:.2f}")
    return "\n".join(lines)
