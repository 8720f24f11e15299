"""`python -m benchmarks.quality evaluations`: learned prompts in few evaluations, beside one another.

The four photos of `ebr-engine eval`, degraded as there and mildly, and left clean, are restored on `mini` by the prompts of one
or several folders, in every number of evaluations: the bundled ones, as restoring chooses them for pictures of this size, or
those of the folders that are named. PSNR and SSIM are against the clean photo. *grid* is what the tokens' grid leaves: the mean
step of luminance across the borders of 8×8 pixels over the mean step elsewhere, less the clean photo's own, in 1/255.
Seconds are of the CPU, for a photo. The digests of the prompts say which files the figures are of.
"""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import columns
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.photos import NAMES, STRENGTH, Case, load_photo, make_case
from ebr_engine.media.calm import luma_of
from ebr_engine.prompts.catalogue import ASSETS, TASKS, fine_file
from ebr_engine.prompts.prompt import load_prompt

COUNTS = (1, 2, 3, 5)
STRENGTHS = (STRENGTH, 0.25, 0.0)  # 0: the clean photo
HOP = 8  # pixels between the tokens of `mini`


def folder(text: str) -> tuple[str, Path]:
    """LABEL=FOLDER."""
    label, equals, path = text.partition("=")
    if not equals or not Path(path).is_dir():
        raise ArgumentTypeError(f"{text}: write LABEL=FOLDER, a folder of TASK.safetensors")
    return label, Path(path)


def options(parser: ArgumentParser) -> None:
    own = ("bundled", ASSETS / "mini" / "prompts")
    parser.add_argument(
        "--prompts", type=folder, action="append", metavar="LABEL=FOLDER", help=f"default: {own[0]}={own[1].name}"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, metavar="N", help="evaluations")
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS, metavar="X", help="0: the clean photo")
    parser.add_argument("--size", type=int, default=256, help="side of the photos in pixels")
    parser.add_argument("--quick", action="store_true", help="one photo, one strength, to try the benchmark itself")
    parser.set_defaults(own=own)


def measure(options: Namespace) -> dict[str, Any]:
    """Prompts in few evaluations, beside one another: PSNR, SSIM and the grid, by strength and on clean photos."""
    torch.manual_seed(0)
    restorer = Restorer("mini", device="cpu", precision="fp32")
    photos, strengths = (NAMES[:1], options.strengths[:1]) if options.quick else (NAMES, options.strengths)
    rows = []
    for task in options.tasks:
        for strength in strengths:
            cases = [case_of(photo, task, options.size, strength) for photo in photos]
            rows += [{"task": task, "strength": strength} | row for row in rows_of(restorer, cases, options)]
    return {"size": options.size, "photos": list(photos), "prompts": digests(options), "rows": rows}


def digests(options: Namespace) -> dict[str, dict[str, str]]:
    """{label: {task: SHA-256 of the prompt's file}}."""
    files = {label: [file_of(where, task, options) for task in options.tasks] for label, where in prompts(options)}
    return {
        label: {file.stem: sha256(file.read_bytes()).hexdigest() for file in found if file.exists()}
        for label, found in files.items()
    }


def prompts(options: Namespace) -> list[tuple[str, Path]]:
    """Labels and folders that were asked for, or the bundled ones."""
    return options.prompts or [options.own]


def file_of(where: Path, task: str, options: Namespace) -> Path:
    """A task's prompt in a folder; of the bundled ones that which sees small pictures finer, where there is one."""
    file = where / f"{task}.safetensors"
    return file if options.prompts else fine_file(file) or file


def case_of(photo: str, task: str, size: int, strength: float) -> Case:
    """A photo and its degraded form; at strength 0 nothing is degraded."""
    if strength:
        return make_case(photo, task, size, strength)
    clean, _ = load_photo(photo, size)
    return Case(photo, task, clean, clean)


def rows_of(restorer: Restorer, cases: list[Case], options: Namespace) -> Iterator[dict[str, Any]]:
    """The input's row, unless it is the clean photo, and one for each prompt and number of evaluations."""
    if not all(torch.equal(case.degraded, case.clean) for case in cases):
        yield {"prompt": "input", "evaluations": 0, "seconds": 0.0} | scores([case.degraded for case in cases], cases)
    for label, where in prompts(options):
        file = file_of(where, cases[0].task, options)
        for count in options.counts if file.exists() else ():
            plan = restorer.plan(prompt=load_prompt(file), steps=count)
            started = process_time()
            restored = [(restorer.restore(case.degraded, plan=plan) * 255).round() / 255 for case in cases]
            seconds = (process_time() - started) / len(cases)
            yield {"prompt": label, "evaluations": count, "seconds": seconds} | scores(restored, cases)


def scores(results: list[Tensor], cases: list[Case]) -> dict[str, float]:
    """Means over the photos."""
    pairs = [(result, case.clean) for result, case in zip(results, cases)]
    return {
        "psnr": fmean(psnr(*pair) for pair in pairs),
        "ssim": fmean(ssim(*pair) for pair in pairs),
        "grid": fmean(grid(result) - grid(clean) for result, clean in pairs),
    }


def grid(pixels: Tensor) -> float:
    """The excess of steps across the borders of tokens, in 1/255, of a picture [1, 3, H, W]."""
    luma, excess = luma_of(pixels)[0] * 255, []
    for axis in (0, 1):
        steps = luma.diff(dim=axis).abs().mean(1 - axis)
        border = torch.arange(len(steps)) % HOP == HOP - 1
        excess.append((steps[border].mean() - steps[~border].mean()).item())
    return fmean(excess)


def table(found: dict[str, Any]) -> str:
    """What a person reads."""
    kinds = {
        "task": "",
        "strength": "g",
        "prompt": "",
        "evaluations": "d",
        "seconds": ".2f",
        "psnr": ".2f",
        "ssim": ".3f",
        "grid": ".2f",
    }
    rows = [[format(row[name], kind) for name, kind in kinds.items()] for row in found["rows"]]
    return "\n".join(
        [f"mini, {found['size']} x {found['size']}, means of {len(found['photos'])} photo(s)", columns(list(kinds), rows)]
    )
