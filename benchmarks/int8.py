"""What int8 layers cost and gain on a CPU.

Pictures: every task and photo of `ebr-engine eval`, restored by the trunk in float32, and by its int8 layers, the rest float32:
PSNR of the one from the other, and of both against the truth. Activations have 8 bits or, as on a CPU whose products would
saturate, 7. Time: evaluations of `mini` and of four blocks of Wan 1.3B's width in interleaved rounds, processor time of all
threads, with packed float32 products, and as `--precision int8` has it: layers that are not int8 in bf16 where the CPU has it.
"""

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
from ebr_engine.backbones.layers import Int8Linear, pack_trunk, quantize_trunk, trunk_dtype
from ebr_engine.bridge.sampler import make_table
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation import quality
from ebr_engine.evaluation.photos import NAMES, make_case
from ebr_engine.kernels import int8_linear
from ebr_engine.prompts.catalogue import TASKS

Made = tuple[torch.nn.Module, Tensor, Any]  # a trunk, a latent, a step's tables
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
        plan = exact.plan(task, supersample=1)
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
    def made(dtype: torch.dtype) -> Made:
        case = random_model(work_of("wan-width", quick), "cpu", dtype)
        return case.trunk, case.degraded, case.bake(case.timesteps(make_table("fast", case.t0)))[0]

    return forms_of(made)


def mini(size: int) -> dict[str, Callable[[], Tensor]]:
    def made(dtype: torch.dtype) -> Made:
        engine = Restorer("mini", device="cpu", precision="bf16" if dtype == torch.bfloat16 else "fp32", compile="off")
        latent = engine.codec.encode(torch.rand(1, 3, 1, size, size))
        return engine.trunk, latent, engine.plan("rain").tables[0][0]

    return forms_of(made)


def forms_of(made: Callable[[torch.dtype], Made]) -> dict[str, Callable[[], Tensor]]:
    """An evaluation by packed layers in float32, and with int8 layers, the others in what `--precision int8` has them in."""
    forms = {}
    for form, dtype in {"float32": torch.float32, "int8": trunk_dtype("int8", torch.device("cpu"))}.items():
        trunk, latent, step = made(dtype)
        if form == "int8":
            quantize_trunk(trunk, Int8Linear)
        pack_trunk(trunk)
        forms[form] = lambda trunk=trunk, latent=latent, step=step: trunk(latent, step)
    return forms


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
