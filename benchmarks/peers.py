"""`python -m benchmarks.peers`: the released algorithm over diffusers' modules beside the engine, feature by feature.

One process, one set of weights, one latent; every form runs once a round, so that whatever the machine does meanwhile
meets all alike. The first two rungs are the released algorithm (`benchmarks/released.py`), eager and with
torch.compile; the others are the engine, each with one feature more than the rung before. Tables are baked before the clock
starts: they are the same for every picture. On a CPU in float32 two rungs stand aside: the engine's run with its transformer
exported to ONNX Runtime and to OpenVINO, in the same process. Every result is compared with the first rung's. For `mini`, whose
prompts are learned, the first rung and the last are also compared with the converged solution (200 second-order steps), for
every task.

On a CPU the cases are `mini` and four blocks of Wan 1.3B's width; `--device cuda` runs the full models, with random weights.
`--runtimes` compares one evaluation with OpenVINO and ONNX Runtime instead (`benchmarks/runtimes.py`).
"""

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import clock, report, runtimes
from benchmarks.models import FLUX, PRECISIONS, Model, random_model, work_of
from benchmarks.report import Benchmark, columns
from benchmarks.steps import load_task, scores
from ebr_engine.backbones.layers import pack_trunk, quantize_trunk
from ebr_engine.backbones.mini.model import Mini, load_mini
from ebr_engine.bridge.sampler import StepTable, make_table, sample
from ebr_engine.engine.execute import compile_trunk
from ebr_engine.export.graph import ExportedTrunk
from ebr_engine.kernels import backend
from ebr_engine.prompts.catalogue import TASKS

STEPS = 20
CONVERGED = 200
TASK, PHOTO = "haze", "coffee"

CASES = {
    "mini": "mini with its haze prompt, one photo",
    "wan-width": "four blocks of Wan 1.3B's width, random weights, 5 latent frames of 16 x 16",
    "wan-1.3b": "Wan 1.3B, random weights, 480 x 832, 33 frames",
    "flux-dev": "FLUX.1-dev, random weights, 1024 x 1024",
}


@dataclass
class Rung:
    """One form of the task: `run()` gives the restored latent; `plainly` keeps our own kernels out of it."""

    name: str
    run: Callable[[], Tensor]
    evaluations: int
    plainly: bool = False
    aside: bool = False  # another runtime, of the same work as the rungs beside it: the next one's gain is not over it

    def __call__(self) -> Tensor:
        """The result."""
        with patch.object(backend, "ASKED", "torch") if self.plainly else nullcontext():
            return self.run()


def mini_model(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Model, Mini]:
    """`mini` with a learned prompt and a real photo, as both."""
    mini = load_mini(device=device, dtype=dtype)
    task = load_task(mini, TASK, [PHOTO], size)
    latents = task.degraded.to(device), task.noise.to(device)
    prompt, text = (task.prompt.residual, task.prompt.alpha), {"context": mini.context}
    halves = mini.trunk.config, mini.conditioner, mini.trunk
    return Model(*halves, text, prompt, *latents, dtype, task.prompt.t0, codec=mini.codec).add_transformer(), mini


def ladder(case: Model, steps: int, compiled: bool, others: bool = False) -> Iterator[Rung]:
    """The rungs, made one by one, so that each can be skipped with its own reason; `others`: other runtimes too."""
    cuda = case.device.type == "cuda"
    yield Rung("released: diffusers, eager", lambda: case.released(case.transformer, steps), steps, True)
    if compiled:
        module = torch.compile(case.transformer, dynamic=False)
        yield Rung("released: diffusers, torch.compile", lambda: case.released(module, steps), steps, True)

    def ours(trunk: Any, table: StepTable, released_times: bool = True, every_row: bool = False) -> Callable[[], Tensor]:
        tables = case.bake(case.timesteps(table, released_times))
        tables = case.every_row(tables) if every_row else tables
        return partial(sample, case.backbone(trunk).velocity, tables, case.degraded, case.noise, table)

    trunk, table = case.trunk, make_table("released", case.t0, steps)
    yield Rung("ours: tables baked once", ours(trunk, table, every_row=case.family is not FLUX), steps, True)
    if case.family is not FLUX:  # whose text rows all differ
        yield Rung("+ equal text rows merged", ours(trunk, table), steps, True)
    if cuda:
        yield Rung("+ fused kernels", ours(trunk, table), steps)
    else:
        trunk = copy.deepcopy(case.trunk)
        if pack_trunk(trunk):
            yield Rung("+ packed products, GELU in them", ours(trunk, table), steps)
        if (
            others and case.dtype == torch.float32
        ):  # ONNX Runtime has no bf16 on a CPU, and OpenVINO's results in it are not finite
            yield from (Rung(f"ours, by {name}", by_runtime(case, name, table), steps, aside=True) for name in runtimes.RUNTIMES)
    if compiled:
        trunk = compile_trunk(trunk)
        yield Rung("+ torch.compile", ours(trunk, table), steps)
    if cuda and backend.has_fp8(case.device):
        narrow = copy.deepcopy(case.trunk)
        quantize_trunk(narrow)
        trunk = compile_trunk(narrow) if compiled else narrow
        yield Rung("+ fp8", ours(trunk, table), steps)
    exact, fast = make_table("exact", case.t0, steps - 1), make_table("fast", case.t0)
    yield Rung("+ without the needless last evaluation", ours(trunk, exact), len(exact))
    yield Rung("+ second order (fast)", ours(trunk, fast, released_times=False), len(fast))


def by_runtime(case: Model, name: str, table: StepTable) -> Callable[[], Tensor]:
    """The engine's run with its transformer exported to a runtime, when it is first asked for."""
    made: list[tuple[TemporaryDirectory, ExportedTrunk, Any]] = []

    def run() -> Tensor:
        if not made:
            folder, tables = TemporaryDirectory(), case.bake(case.timesteps(table, True))
            latent = tuple(case.degraded.shape[1:])
            graph = runtimes.exported(name, copy.deepcopy(case.trunk), tables[0], latent, case.dtype, Path(folder.name))
            made.append((folder, graph, tables))
        _, graph, tables = made[0]
        return sample(case.backbone(graph).velocity, tables, case.degraded, case.noise, table)

    return run


def climb(case: Model, name: str, steps: int, rounds: int, compiled: bool, others: bool = False) -> dict[str, Any]:
    """Warm every rung up, compare its result with the first's, then time all rungs in interleaved rounds."""
    rungs, results, skipped = [], [], {}
    for rung in ladder(case, steps, compiled, others):
        try:
            result = rung()
        except Exception as error:  # a compiler that is missing or fails raises almost anything
            if not rungs:
                raise
            skipped[rung.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        rungs.append(rung)
        results.append(result)
        print(f"{name}: {rung.name}", flush=True)
    seconds = clock.in_turns({rung.name: rung for rung in rungs}, rounds, case.device)
    medians = [seconds[rung.name]["median"] for rung in rungs]
    before = [medians[max((j for j in range(i) if not rungs[j].aside), default=0)] for i in range(len(rungs))]
    rows = [
        {
            "rung": rung.name,
            "evaluations": rung.evaluations,
            "seconds": seconds[rung.name],
            "gain": last / median,
            "aside": rung.aside,
            "total_gain": medians[0] / median,
            "rms_difference": clock.relative_rms(result, results[0]),
            "largest_difference": (result - results[0]).abs().max().item(),
        }
        for rung, result, last, median in zip(rungs, results, before, medians)
    ]
    return {
        "case": name,
        "latent": list(case.degraded.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "t0": case.t0,
        "rungs": rows,
        "skipped": skipped,
        "bake_seconds": bake_seconds(case, rounds),
    }


def bake_seconds(case: Model, rounds: int) -> dict[str, Any]:
    """What baking the fast schedule's tables takes, once a prompt."""
    timesteps = case.timesteps(make_table("fast", case.t0))
    return clock.in_turns({"bake": lambda: case.bake(timesteps)}, rounds, case.device)["bake"]


def accuracy(case: Model, mini: Mini, size: int, steps: int, converged_steps: int) -> list[dict[str, Any]]:
    """For every task: PSNR, sharpness and distance to the converged solution, of the released run and of the fast one."""
    rows = []
    for name in TASKS:
        task = load_task(mini, name, [PHOTO], size)
        prompt = task.prompt.residual, task.prompt.alpha
        latents = task.degraded.to(case.device), task.noise.to(case.device)
        one = replace(case, prompt=prompt, degraded=latents[0], noise=latents[1], t0=task.prompt.t0)
        table, long = (make_table("fast", one.t0, count) for count in (None, converged_steps))
        fast, converged = (sample(one.trunk, one.bake(one.timesteps(t)), one.degraded, one.noise, t) for t in (table, long))
        results = {"released": one.released(one.transformer, steps), "fast": fast}
        rows.append({"task": name} | {key: scores(mini, task, latent.cpu(), converged.cpu()) for key, latent in results.items()})
        print(f"accuracy: {name}", flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    return runtimes.table(result) if "runtimes" in result else "\n\n".join(map(case_table, result["cases"]))


def case_table(result: dict[str, Any]) -> str:
    """What a person reads of one case."""
    header = ["rung", "evaluations", "median ms", "quartiles", "gain", "in all", "RMS difference", "largest"]
    rows = []
    for rung in result["rungs"]:
        seconds = rung["seconds"]
        low, high = (f"{quartile * 1e3:.1f}" for quartile in seconds["quartiles"])
        gains = f"x{rung['gain']:.2f}", f"x{rung['total_gain']:.2f}"
        differences = f"{rung['rms_difference']:.1e}", f"{rung['largest_difference']:.1e}"
        times = f"{seconds['median'] * 1e3:.1f}", f"{low} to {high}"
        rows.append([rung["rung"], str(rung["evaluations"]), *times, *gains, *differences])
    rounds = len(result["rungs"][0]["seconds"]["all"])
    shape = " x ".join(map(str, result["latent"]))
    lines = [
        f"{result['case']}: {CASES[result['case']]}; latent {shape}, {result['dtype']}, T0 {result['t0']:g}, {rounds} rounds",
        "",
        columns(header, rows),
        f"baking the tables, once a prompt: {result['bake_seconds']['median'] * 1e3:.1f} ms",
        *(f"skipped {name}: {reason}" for name, reason in result["skipped"].items()),
    ]
    if "accuracy" in result:
        header = ["task", *(f"{name}, {run}" for name in ("distance", "PSNR dB", "sharpness") for run in ("released", "fast"))]
        digits = {"distance": 4, "psnr": 2, "sharpness": 3}
        rows = [
            [row["task"], *(f"{row[run][name]:.{places}f}" for name, places in digits.items() for run in ("released", "fast"))]
            for row in result["accuracy"]
        ]
        lines += ["", columns(header, rows)]
    return "\n".join(lines)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--case", nargs="+", help="default: mini wan-width; on a GPU wan-1.3b flux-dev")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--size", type=int, default=128, help="side of mini's photo in pixels")
    parser.add_argument("--steps", type=int, default=STEPS, help="evaluations of the released schedule")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtimes", action="store_true", help="one evaluation beside OpenVINO and ONNX Runtime, on a CPU")
    parser.add_argument("--runtime", nargs="+", metavar="NAME", help="with --runtimes: only these of its rows")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rungs out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three steps, one round, not compiled: does it run?")


def measure(options: Namespace) -> dict[str, Any]:
    """The released algorithm over diffusers' modules beside the engine, feature by feature."""
    if options.steps < 2 or options.rounds < 1 or options.size < 16 or options.size % 8:
        options.error("--steps must be at least 2, --rounds at least 1, --size a multiple of 8 from 16 on")
    cases, rows = (runtimes.CASES if options.runtimes else CASES), (*runtimes.EBR_KERNELS, *runtimes.RUNTIMES)
    for given, known in ((options.case, cases), (options.runtime, rows)):
        if unknown := set(given or ()) - set(known):
            options.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.runtimes:
        return runtimes.measure(options)
    device, quick = torch.device(options.device), options.quick
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        options.error(f"there is no device {options.device}: {torch.cuda.device_count()} CUDA device(s) found")
    names = options.case or (["mini", "wan-width"] if device.type == "cpu" else ["wan-1.3b", "flux-dev"])
    dtype = PRECISIONS[options.precision or ("fp32" if device.type == "cpu" else "bf16")]
    size, steps, rounds, converged = (32, 3, 1, 12) if quick else (options.size, options.steps, options.rounds, CONVERGED)
    results = []
    for name in names:
        if name == "mini":
            case, mini = mini_model(size, device, dtype)
        else:
            case, mini = random_model(work_of(name, quick), device, dtype).add_transformer(), None
        results.append(climb(case, name, steps, rounds, not (quick or options.no_compile), others=not quick))
        if mini is not None:
            results[-1]["accuracy"] = accuracy(case, mini, size, steps, converged)
        del case  # before the next one needs the memory
    return {"device": str(device), "cases": results}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, and print a ladder each."""
    report.main("peers", __doc__, Benchmark(options, measure, table), arguments)


if __name__ == "__main__":
    main()
