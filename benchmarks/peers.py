"""`python -m benchmarks.peers`: the released algorithm over diffusers' modules beside the engine, feature by feature.

One process, one set of weights, one latent; every rung of the ladder runs once a round, so that whatever the machine does
meanwhile meets all rungs alike. The first two rungs are the released algorithm (`benchmarks/released.py`), eager and with
torch.compile; the others are the engine, each with one feature more than the rung before. Tables are baked before the clock
starts: they are the same for every picture. Every result is compared with the first rung's. For `mini`, whose prompts are
learned, the first rung and the last are also compared with the converged solution (200 second-order steps), for every task.

On a CPU the cases are `mini` and four blocks of Wan 1.3B's width; `--device cuda` runs the full models, with random weights.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.released import released_flux, released_wan
from benchmarks.report import columns, provenance, spread, told, write_json
from benchmarks.steps import load_task, scores
from ebr_engine.backbones.flux.model import FluxConfig
from ebr_engine.backbones.flux.weights import load_flux
from ebr_engine.backbones.layers import pack_trunk, quantize_trunk
from ebr_engine.backbones.mini.model import Mini, load_mini
from ebr_engine.backbones.registry import CONFIGS
from ebr_engine.backbones.wan.model import WanConditioning, WanConfig
from ebr_engine.backbones.wan.weights import diffusers_state_dict, load_wan
from ebr_engine.bridge.sampler import StepTable, draw_noise, make_table, released_timesteps, sample
from ebr_engine.engine.execute import compile_trunk
from ebr_engine.kernels import backend
from ebr_engine.prompts.catalogue import TASKS

STEPS, T0 = 20, 0.4
CONVERGED = 200
SEED = 42
TASK, PHOTO = "haze", "coffee"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

CASES = {
    "mini": "mini with its haze prompt, one photo",
    "wan-width": "four blocks of Wan 1.3B's width, random weights, 5 latent frames of 16 x 16",
    "wan-1.3b": "Wan 1.3B, random weights, 480 x 832, 33 frames",
    "flux-dev": "FLUX.1-dev, random weights, 1024 x 1024",
}
LATENTS = {"wan-width": (1, 16, 5, 16, 16), "wan-1.3b": (1, 16, 9, 60, 104), "flux-dev": (1, 16, 128, 128)}
QUICK_LATENTS = {"wan-width": (1, 16, 2, 4, 4), "wan-1.3b": (1, 16, 1, 4, 4), "flux-dev": (1, 16, 4, 4)}
TEXT_ROWS = {"wan": 226, "flux": 512}


@dataclass
class Case:
    """The same weights as diffusers' module and as our halves, and one restoration to do with them."""

    name: str
    backbone: str  # wan or flux: how it is called, and whose timesteps it is fed
    transformer: nn.Module
    conditioner: nn.Module
    trunk: nn.Module
    text: dict[str, Tensor]  # context, and pooled (FLUX)
    prompt: tuple[Tensor, Tensor]  # residual, α
    degraded: Tensor
    noise: Tensor
    t0: float
    dtype: torch.dtype

    def released(self, transformer: Any, steps: int) -> Tensor:
        """The released algorithm's result over diffusers' module, or over what torch.compile made of it."""
        run = released_flux if self.backbone == "flux" else released_wan
        return run(transformer, self.degraded, self.noise, **self.text, prompts=[self.prompt], steps=steps, t0=self.t0)

    @torch.no_grad()
    def bake(self, table: StepTable, timesteps: Tensor) -> Any:
        """The engine's tables for a run."""
        if self.backbone == "flux":
            tables = self.conditioner.bake(self.trunk, timesteps, self.text["context"], self.text["pooled"], [self.prompt])
        else:
            tables = self.conditioner(timesteps, self.text["context"], [self.prompt])
        return tables.to(self.degraded.device, self.dtype)

    @torch.no_grad()
    def every_row(self, tables: WanConditioning) -> WanConditioning:
        """The same tables with a key for every text row, equal or not."""
        key, value = self.conditioner.keys_values(self.conditioner.encode_text(self.text["context"][None]))
        context = (key, value, torch.zeros(key.shape[3]), *tables.context[3:])
        return replace(tables, context=context).to(self.degraded.device, self.dtype)


@dataclass
class Rung:
    """One form of the task: `run()` gives the restored latent; `plainly` keeps our own kernels out of it (on a GPU)."""

    name: str
    run: Callable[[], Tensor]
    evaluations: int
    plainly: bool = False

    def once(self) -> tuple[Tensor, float]:
        """The result and the seconds it took."""
        with patch.object(backend, "ASKED", "torch") if self.plainly else nullcontext():
            started = time.perf_counter()
            result = self.run()
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            return result, time.perf_counter() - started


def cast(transformer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What diffusers' `from_pretrained` makes of a dtype: parameters of the modules that it keeps in float32 stay."""
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return transformer.eval().requires_grad_(False)


def mini_case(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Case, Mini]:
    """`mini` as both, with a learned prompt and a real photo."""
    mini = load_mini(device=device, dtype=dtype)
    config = mini.trunk.config.to_diffusers()
    transformer = WanTransformer3DModel(**config)
    transformer.load_state_dict(diffusers_state_dict(mini.conditioner, mini.trunk))
    task = load_task(mini, TASK, [PHOTO], size)
    prompt, text = (task.prompt.residual, task.prompt.alpha), {"context": mini.context}
    halves = cast(transformer.to(device), dtype), mini.conditioner, mini.trunk
    latents = task.degraded.to(device), task.noise.to(device)
    return Case("mini", "wan", *halves, text, prompt, *latents, task.prompt.t0, dtype), mini


def random_case(name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> Case:
    """Another backbone with the weights that diffusers' module starts with, a random prompt and a random latent."""
    torch.manual_seed(SEED)
    backbone = "flux" if name == "flux-dev" else "wan"
    config, latent = random_config(name, quick), (QUICK_LATENTS if quick else LATENTS)[name]
    with device:
        transformer = (FluxTransformer2DModel if backbone == "flux" else WanTransformer3DModel)(**config.to_diffusers())
    transformer = cast(transformer, dtype)
    rows = TEXT_ROWS[backbone]
    if backbone == "flux":
        conditioner, trunk = load_flux(config, transformer.state_dict(), device, dtype)
        text = {"context": torch.randn(rows, config.joint_attention_dim), "pooled": torch.randn(config.pooled_projection_dim)}
        blocks = config.blocks
    else:
        conditioner, trunk = load_wan(config, transformer.state_dict(), device, dtype)
        text = {"context": torch.zeros(rows, config.text_dim)}
        text["context"][0] = torch.randn(config.text_dim)  # the empty prompt: one token, then padding
        blocks = config.num_layers
    prompt = torch.randn(rows, config.width) * 0.1, torch.randn(blocks) * 0.1
    degraded = torch.randn(latent).to(device)
    noise = draw_noise(latent, SEED, device)
    return Case(name, backbone, transformer, conditioner, trunk, text, prompt, degraded, noise, T0, dtype)


def random_config(name: str, quick: bool) -> WanConfig | FluxConfig:
    """The sizes of a case; the quick form has the same parts, narrow and few."""
    if name == "flux-dev":
        few = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 16}
        return replace(CONFIGS[name], **few) if quick else CONFIGS[name]
    config = replace(CONFIGS["wan-1.3b"], num_layers=4) if name == "wan-width" else CONFIGS[name]
    return replace(config, num_layers=2, num_attention_heads=2, ffn_dim=64, text_dim=16) if quick else config


def ladder(case: Case, steps: int, compiled: bool) -> Iterator[Rung]:
    """The rungs, made one by one, so that each can be skipped with its own reason."""
    cuda = case.degraded.is_cuda
    yield Rung("released: diffusers, eager", lambda: case.released(case.transformer, steps), steps, True)
    if compiled:
        module = torch.compile(case.transformer, dynamic=False)
        yield Rung("released: diffusers, torch.compile", lambda: case.released(module, steps), steps, True)
    table = make_table("released", case.t0, steps)
    tables = case.bake(table, released_timesteps(table.times, case.backbone))

    def ours(trunk: Any, tables: Any, table: StepTable) -> Callable[[], Tensor]:
        return lambda: sample(trunk, tables, case.degraded, case.noise, table)

    trunk = case.trunk
    if case.backbone == "wan":
        yield Rung("ours: tables baked once", ours(trunk, case.every_row(tables), table), steps, True)
        yield Rung("+ equal text rows merged", ours(trunk, tables, table), steps, True)
    else:
        yield Rung("ours: tables baked once", ours(trunk, tables, table), steps, True)
    if cuda:
        yield Rung("+ fused kernels", ours(trunk, tables, table), steps)
    else:
        trunk = copy.deepcopy(case.trunk)
        if pack_trunk(trunk):
            yield Rung("+ packed products, GELU in them", ours(trunk, tables, table), steps)
    if compiled:
        trunk = compile_trunk(trunk)
        yield Rung("+ torch.compile", ours(trunk, tables, table), steps)
    if cuda and backend.has_fp8(case.degraded.device):
        narrow = copy.deepcopy(case.trunk)
        quantize_trunk(narrow)
        trunk = compile_trunk(narrow) if compiled else narrow
        yield Rung("+ fp8", ours(trunk, tables, table), steps)
    exact = make_table("exact", case.t0, steps - 1)
    exact_tables = case.bake(exact, released_timesteps(exact.times, case.backbone))
    yield Rung("+ without the needless last evaluation", ours(trunk, exact_tables, exact), len(exact))
    fast = make_table("fast", case.t0)
    fast_tables = case.bake(fast, torch.tensor(fast.times[:-1]) * 1000)
    yield Rung("+ second order (fast)", ours(trunk, fast_tables, fast), len(fast))


def climb(case: Case, steps: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Warm every rung up, compare its result with the first's, then time all rungs in interleaved rounds."""
    rungs, results, skipped = [], [], {}
    for rung in ladder(case, steps, compiled):
        try:
            result = rung.once()[0]
        except Exception as error:  # a compiler that is missing or fails raises almost anything
            if not rungs:
                raise
            skipped[rung.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        rungs.append(rung)
        results.append(result)
        print(f"{case.name}: {rung.name}", flush=True)
    seconds: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    for _ in range(rounds):
        for rung in rungs:
            seconds[rung.name].append(rung.once()[1])
    rows = []
    for rung, result in zip(rungs, results):
        difference, first = (result - results[0]).double(), results[0].double()
        time_taken = spread(seconds[rung.name])
        before = rows[-1]["seconds"]["median"] if rows else time_taken["median"]
        top = rows[0]["seconds"]["median"] if rows else time_taken["median"]
        rows.append(
            {
                "rung": rung.name,
                "evaluations": rung.evaluations,
                "seconds": time_taken,
                "gain": before / time_taken["median"],
                "total_gain": top / time_taken["median"],
                "rms_difference": (difference.norm() / first.norm()).item(),
                "largest_difference": difference.abs().max().item(),
            }
        )
    return {
        "case": case.name,
        "latent": list(case.degraded.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "t0": case.t0,
        "rungs": rows,
        "skipped": skipped,
        "bake_seconds": bake_seconds(case, rounds),
    }


def bake_seconds(case: Case, rounds: int) -> dict[str, Any]:
    """What baking the fast schedule's tables takes, once a prompt."""
    table = make_table("fast", case.t0)
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        case.bake(table, torch.tensor(table.times[:-1]) * 1000)
        taken.append(time.perf_counter() - started)
    return spread(taken)


def accuracy(case: Case, mini: Mini, size: int, steps: int, converged_steps: int) -> list[dict[str, Any]]:
    """For every task: PSNR, sharpness and distance to the converged solution, of the released run and of the fast one."""
    rows = []
    for name in TASKS:
        task = load_task(mini, name, [PHOTO], size)
        prompt = task.prompt.residual, task.prompt.alpha
        latents = task.degraded.to(case.degraded.device), task.noise.to(case.degraded.device)
        one = replace(case, prompt=prompt, degraded=latents[0], noise=latents[1], t0=task.prompt.t0)
        table, long = (make_table("fast", one.t0, count) for count in (None, converged_steps))
        fast, converged = (
            sample(one.trunk, one.bake(t, torch.tensor(t.times[:-1]) * 1000), one.degraded, one.noise, t) for t in (table, long)
        )
        results = {"released": one.released(one.transformer, steps), "fast": fast}
        rows.append({"task": name} | {key: scores(mini, task, latent.cpu(), converged.cpu()) for key, latent in results.items()})
        print(f"accuracy: {name}", flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, print a ladder each, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: mini wan-width; on a GPU wan-1.3b flux-dev")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--size", type=int, default=128, help="side of mini's photo in pixels")
    parser.add_argument("--steps", type=int, default=STEPS, help="evaluations of the released schedule")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rungs out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three steps, one round, not compiled: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.rounds < 1 or options.size < 16 or options.size % 8:
        parser.error("--steps must be at least 2, --rounds at least 1, --size a multiple of 8 from 16 on")
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"there is no device {options.device}: {torch.cuda.device_count()} CUDA device(s) found")
    names = options.case or (["mini", "wan-width"] if device.type == "cpu" else ["wan-1.3b", "flux-dev"])
    dtype = PRECISIONS[options.precision or ("fp32" if device.type == "cpu" else "bf16")]
    size, steps, rounds, converged = options.size, options.steps, options.rounds, CONVERGED
    if options.quick:
        size, steps, rounds, converged = 32, 3, 1, 12
    results = []
    for name in names:
        case, mini = mini_case(size, device, dtype) if name == "mini" else (random_case(name, device, dtype, options.quick), None)
        result = climb(case, steps, rounds, not (options.quick or options.no_compile))
        if mini is not None:
            result["accuracy"] = accuracy(case, mini, size, steps, converged)
        results.append(result)
        print(f"\n{table(result)}\n", flush=True)
        del case  # before the next one needs the memory
    about = {"device": str(device)} | provenance()
    print("\n".join(told(about)))
    if options.json:
        write_json(options.json, about | {"cases": results})


if __name__ == "__main__":
    main()
