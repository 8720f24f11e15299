"""`python -m benchmarks.training`: a step of prompt learning beside the trunk's forward pass and beside diffusers with autograd.

One process, one set of weights, one batch, one objective (velocity loss at EBR states); every form runs once a round, so that
whatever the machine does meanwhile meets all alike. The forward pass runs over baked tables without gradients. A step is the
live conditioner, the trunk, backward and Adam on the prompt and its α. The peer is the released dual attention over diffusers'
modules, with its weights frozen, and as they are loaded (every weight gets a gradient that nothing uses). Losses and gradients
of all forms are compared. `--memory` prints instead what learning Wan 1.3B and FLUX takes on paper, and measures nothing.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PRECISIONS, SEED, Case, mini_case, random_case
from benchmarks.released import set_wan_prompts, wan_velocity
from benchmarks.report import columns, provenance, spread, told, write_json
from benchmarks.training_memory import memory_table
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.mini.codec import PixelCodec
from ebr_engine.bridge.process import training_state
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.learner import Learner

CASES = {
    "mini": "mini, four crops of 128 x 128",
    "wan-width": "four blocks of Wan 1.3B's width, a clip of 5 latent frames of 16 x 16",
    "wan-crops": "the same blocks, eight crops of 128 x 128 pixels",
}
BATCH = {"mini": 4, "wan-width": 1, "wan-crops": 8}
AT_MOST, AT_LEAST = 2.5, 1.5  # of a forward pass; times as fast as diffusers


@dataclass
class Form:
    """A way to do it: `run()` gives the loss, and gradients of the prompt and α where it learns."""

    name: str
    run: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """A batch: states, their targets and times."""

    state: Tensor
    target: Tensor
    times: Tensor


def problem(case: Case, batch: int) -> Problem:
    """States between latents that differ a little, at times drawn over the whole bridge."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, *case.degraded.shape[1:])
    clean, change, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    times = (torch.rand(batch, generator=generator) * 0.9 + 0.05) * case.t0
    return Problem(*training_state(clean, clean + 0.1 * change, noise, times, case.t0), times)


def learner(case: Case, trunk: Any, **settings: Any) -> Learner:
    """A learner of a case's prompt over one of its trunks."""
    frames = SimpleNamespace(spatial=8, temporal=1, frames=lambda count: count)
    codec = PixelCodec() if case.name == "mini" else frames
    backbone = Backbone("wan", case.conditioner, trunk, codec, case.text, case.degraded.device, case.dtype)
    tokens = case.prompt[0].shape[-2]
    config = LearnConfig("bench", data="none", loss="velocity", tokens=tokens, t0=case.t0, learning_rate=1e-3, **settings)
    made = Learner.start(config, backbone)
    with torch.no_grad():
        for parameter, value in zip(made.parameters, case.prompt):
            parameter.copy_(value)
    return made


def stepped(made: Learner, given: Problem) -> tuple[Tensor, ...]:
    """A step of ours; the prompt is put back, so that every round does the same."""
    before = [parameter.detach().clone() for parameter in made.parameters]
    loss = made.loss(given.state, given.target, given.times)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in made.parameters]
    made.optimizer.step()
    made.optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(made.parameters, before):
            parameter.copy_(value)
    return loss.detach(), *gradients


def peer(case: Case, given: Problem, frozen: bool) -> Form:
    """The same step over diffusers' modules."""
    prompt = [part.clone().requires_grad_() for part in case.prompt]
    optimizer = torch.optim.Adam(prompt, lr=1e-3)

    def run() -> tuple[Tensor, ...]:
        case.transformer.requires_grad_(not frozen)
        set_wan_prompts(case.transformer, [prompt])
        velocity = wan_velocity(case.transformer, case.text["context"])(given.state, given.times * 1000)
        loss = (velocity - given.target).square().mean()
        loss.backward()
        gradients = [part.grad.clone() for part in prompt]
        optimizer.step()
        optimizer.zero_grad()
        case.transformer.zero_grad()
        with torch.no_grad():
            for part, value in zip(prompt, case.prompt):
                part.copy_(value)
        return loss.detach(), *gradients

    return Form("diffusers, weights frozen" if frozen else "diffusers, as loaded", run)


def forms(case: Case, given: Problem, compiled: bool) -> list[Form]:
    """All forms of a case, the forward pass first."""
    tables = case.conditioner(given.times * 1000, case.text["context"], [case.prompt]).to(case.degraded.device, case.dtype)

    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return ((case.trunk(given.state, tables.batch()) - given.target).square().mean(),)

    ours = [("step", case.trunk, {}), ("step, checkpointed blocks", copy.deepcopy(case.trunk), {"checkpointing": True})]
    if compiled:
        ours.append(("step, compiled blocks", copy.deepcopy(case.trunk), {"compile": True}))
    made = [(name, learner(case, trunk, **settings)) for name, trunk, settings in ours]
    steps = [Form(name, lambda made=made: stepped(made, given)) for name, made in made]
    return [Form("forward", forward), *steps, peer(case, given, True), peer(case, given, False)]


def measure(case: Case, name: str, batch: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Warm every form up, compare losses and gradients with diffusers', then time all forms in interleaved rounds."""
    given = problem(case, batch)
    every = forms(case, given, compiled)
    results = {}
    for form in every:
        results[form.name] = form.run()
        print(f"{name}: {form.name}", flush=True)
    seconds: dict[str, list[float]] = {form.name: [] for form in every}
    for _ in range(rounds):
        for form in every:
            started = time.perf_counter()
            form.run()
            if case.degraded.is_cuda:
                torch.cuda.synchronize()
            seconds[form.name].append(time.perf_counter() - started)
    reference = results["diffusers, weights frozen"]
    medians = {form: spread(taken)["median"] for form, taken in seconds.items()}
    rows = []
    for form in every:
        gradients = [relative(mine, other) for mine, other in zip(results[form.name][1:], reference[1:])]
        rows.append(
            {
                "form": form.name,
                "seconds": spread(seconds[form.name]),
                "x forward": medians[form.name] / medians["forward"],
                "x faster": medians["diffusers, weights frozen"] / medians[form.name],
                "loss": results[form.name][0].item(),
                "gradient_difference": max(gradients, default=None),
            }
        )
    shape = [batch, *case.degraded.shape[1:]]
    return {"case": name, "latent": shape, "dtype": str(case.dtype).removeprefix("torch."), "forms": rows}


def relative(value: Tensor, reference: Tensor) -> float:
    """RMS of the difference, relative to the reference's."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def table(result: dict[str, Any]) -> str:
    """What a person reads of one case."""
    header = ["form", "median ms", "quartiles", "x forward", "x faster than diffusers", "loss", "gradients differ"]
    rows = []
    for form in result["forms"]:
        low, high = (f"{quartile * 1e3:.0f}" for quartile in form["seconds"]["quartiles"])
        differ = form["gradient_difference"]
        rows.append(
            [
                form["form"],
                f"{form['seconds']['median'] * 1e3:.0f}",
                f"{low} to {high}",
                f"{form['x forward']:.2f}",
                f"{form['x faster']:.2f}",
                f"{form['loss']:.5f}",
                "" if differ is None else f"{differ:.1e}",
            ]
        )
    by_name = {form["form"]: form for form in result["forms"]}
    step = by_name["step"]
    fastest = max(form["x faster"] for name, form in by_name.items() if name.startswith("step"))
    told_goals = f"goals: a step at most {AT_MOST} forward passes ({verdict(step['x forward'] <= AT_MOST)})"
    told_goals += f", at least {AT_LEAST} times as fast as diffusers ({verdict(fastest >= AT_LEAST)}: {fastest:.2f})"
    shape = " x ".join(map(str, result["latent"]))
    return (
        f"{result['case']}: {CASES[result['case']]}; latent {shape}, {result['dtype']}\n\n{columns(header, rows)}\n{told_goals}"
    )


def verdict(met: bool) -> str:
    """For a table."""
    return "met" if met else "missed"


def make_case(name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> Case:
    """The weights and the latent of a case."""
    if name == "mini":
        return mini_case(32 if quick else 128, device, dtype)[0]
    case = random_case("wan-width", device, dtype, quick)
    return replace(case, degraded=case.degraded[:, :, :1]) if name == "wan-crops" else case


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, print a table each, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, not compiled: does it run?")
    parser.add_argument("--memory", action="store_true", help="memory of learning the real models, on paper")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.memory:
        print(memory_table())
        return
    device, results = torch.device(options.device), []
    for name in options.case:
        case = make_case(name, device, PRECISIONS[options.precision], options.quick)
        rounds, compiled = (1, False) if options.quick else (options.rounds, not options.no_compile)
        batch = math.ceil(BATCH[name] / 2) if options.quick else BATCH[name]
        results.append(measure(case, name, batch, rounds, compiled))
        print(f"\n{table(results[-1])}\n", flush=True)
        del case  # before the next one needs the memory
    about = {"device": str(device), "threads": torch.get_num_threads()} | provenance()
    print("\n".join(told(about)))
    if options.json:
        write_json(options.json, about | {"cases": results})


if __name__ == "__main__":
    main()
