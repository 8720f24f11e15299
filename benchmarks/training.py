"""`python -m benchmarks.training`: a step of prompt learning beside the trunk's forward pass and beside diffusers with autograd.

One process, one set of weights, one batch, one objective (velocity loss at EBR states); every form runs once a round, so that
whatever the machine does meanwhile meets all alike. The forward pass runs over baked tables without gradients. A step is the
live conditioner, the trunk, backward and Adam on the prompt and its α. The peer is the released dual attention over diffusers'
modules, with its weights frozen, and as they are loaded (every weight gets a gradient that nothing uses). Losses and gradients
of all forms are compared. `--beside` names another commit's folder, whose steps on `mini` take turns with ours.
"""

import copy
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import clock, report, training_beside
from benchmarks.models import PRECISIONS, SEED, Model, random_model, work_of
from benchmarks.peers import mini_model
from benchmarks.report import Benchmark, columns
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

Form = Callable[[], tuple[Tensor, ...]]  # a way to do it: the loss, and gradients of the prompt and α where it learns


@dataclass(frozen=True)
class Problem:
    """A batch: states, their targets and times."""

    state: Tensor
    target: Tensor
    times: Tensor


def problem(case: Model, batch: int) -> Problem:
    """States between latents that differ a little, at times drawn over the whole bridge."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, *case.degraded.shape[1:])
    clean, change, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    times = (torch.rand(batch, generator=generator) * 0.9 + 0.05) * case.t0
    return Problem(*training_state(clean, clean + 0.1 * change, noise, times, case.t0), times)


def learner(case: Model, trunk: Any, **settings: Any) -> Learner:
    """A learner of a case's prompt over one of its trunks."""
    tokens = case.prompt[0].shape[-2]
    fixed = {"per_block": case.prompt[0].dim() == 3, "loss": "velocity", "learning_rate": 1e-3}
    config = LearnConfig("bench", data="none", tokens=tokens, t0=case.t0, **fixed, **settings)
    made = Learner.start(config, case.backbone(trunk))
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


def peer(case: Model, given: Problem, frozen: bool) -> Form:
    """The same step over diffusers' modules."""
    prompt = [part.clone().requires_grad_() for part in case.prompt]
    optimizer = torch.optim.Adam(prompt, lr=1e-3)

    def run() -> tuple[Tensor, ...]:
        case.transformer.requires_grad_(not frozen)
        velocity = case.released_velocity(prompt)(given.state, given.times * 1000)
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

    return run


def forms(case: Model, given: Problem, compiled: bool) -> dict[str, Form]:
    """All forms of a case by name, the forward pass first."""
    tables = case.bake(given.times * 1000)

    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return ((case.trunk(given.state, tables.batch()) - given.target).square().mean(),)

    ours = {"step": (case.trunk, {}), "step, checkpointed blocks": (copy.deepcopy(case.trunk), {"checkpointing": True})}
    if compiled:
        ours["step, compiled blocks"] = copy.deepcopy(case.trunk), {"compile": True}
    made = {name: learner(case, trunk, **settings) for name, (trunk, settings) in ours.items()}
    steps = {name: lambda one=one: stepped(one, given) for name, one in made.items()}
    peers = {"diffusers, weights frozen": peer(case, given, True), "diffusers, as loaded": peer(case, given, False)}
    return {"forward": forward, **steps, **peers}


def compare(case: Model, name: str, batch: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Warm every form up, compare losses and gradients with diffusers', then time all forms in interleaved rounds."""
    given, results = problem(case, batch), {}
    every = forms(case, given, compiled)
    for form, run in every.items():
        results[form] = run()
        print(f"{name}: {form}", flush=True)
    seconds = clock.in_turns(every, rounds, case.device)
    reference, peer_median = results["diffusers, weights frozen"], seconds["diffusers, weights frozen"]["median"]
    rows = []
    for form, (loss, *gradients) in results.items():
        errors = [clock.relative_rms(mine, other) for mine, other in zip(gradients, reference[1:])]
        rows.append(
            {
                "form": form,
                "seconds": seconds[form],
                "x forward": seconds[form]["median"] / seconds["forward"]["median"],
                "x faster": peer_median / seconds[form]["median"],
                "loss": loss.item(),
                "gradient_difference": max(errors, default=None),
            }
        )
    shape = [batch, *case.degraded.shape[1:]]
    return {"case": name, "latent": shape, "dtype": str(case.dtype).removeprefix("torch."), "forms": rows}


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    if "beside" in result:
        return training_beside.table(result)
    return "\n\n".join(map(case_table, result["cases"]))


def case_table(result: dict[str, Any]) -> str:
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
    goals = f"goals: a step at most {AT_MOST} forward passes ({verdict(step['x forward'] <= AT_MOST)})"
    goals += f", at least {AT_LEAST} times as fast as diffusers ({verdict(fastest >= AT_LEAST)}: {fastest:.2f})"
    shape = " x ".join(map(str, result["latent"]))
    return f"{result['case']}: {CASES[result['case']]}; latent {shape}, {result['dtype']}\n\n{columns(header, rows)}\n{goals}"


def verdict(met: bool) -> str:
    """For a table."""
    return "met" if met else "missed"


def make_case(name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> Model:
    """The weights and the latent of a case."""
    if name == "mini":
        return mini_model(32 if quick else 128, device, dtype)[0]
    case = random_model(work_of("wan-width", quick), device, dtype).add_transformer()
    case.codec = SimpleNamespace(spatial=8, temporal=1, frames=lambda count: count)
    return replace(case, degraded=case.degraded[:, :, :1]) if name == "wan-crops" else case


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another commit's folder: only mini, beside its steps")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, not compiled: does it run?")


def measure(options: Namespace) -> dict[str, Any]:
    """A step of prompt learning beside the trunk's forward pass and beside diffusers with autograd."""
    if options.rounds < 1:
        options.error("--rounds must be at least 1")
    if options.beside:
        return training_beside.measure(options)
    device, results = torch.device(options.device), []
    rounds, compiled = (1, False) if options.quick else (options.rounds, not options.no_compile)
    for name in options.case:
        case = make_case(name, device, PRECISIONS[options.precision], options.quick)
        batch = math.ceil(BATCH[name] / 2) if options.quick else BATCH[name]
        results.append(compare(case, name, batch, rounds, compiled))
        del case  # before the next one needs the memory
    return {"device": str(device), "threads": torch.get_num_threads(), "cases": results}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, and print a table each."""
    report.main("training", __doc__, Benchmark(options, measure, table), arguments)


if __name__ == "__main__":
    main()
