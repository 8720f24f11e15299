"""The GPU check's sections on whole models with random weights: a step of the transformer, whole runs, a step of learning."""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import Run, captured, ceilings, milliseconds, relative_rms
from benchmarks.memory import learning_memory
from benchmarks.models import FLUX, T0, Model, random_model, work_of
from benchmarks.roofline import analyse
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.layers import quantize_trunk
from ebr_engine.bridge.sampler import make_table, sample
from ebr_engine.engine.execute import CudaRecorder, Graphs, Runner
from ebr_engine.kernels import backend
from ebr_engine.training.learner import checkpoint_blocks

BLOCKS = ("blocks", "double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks")  # ours, diffusers'
RECOMPILES = 64  # a block that is compiled anew for each of its fellows should be seen as slow, not fall back unseen
COMPILE_SECONDS = 90  # what torch.compile of a whole transformer may take: without so much left it is not begun
BLOCK_SECONDS = 20  # and of one block of every kind, if no section before has left it in the compiler's cache
ROUNDING = {"captured": 0.0}  # relative RMS from the plain run; a compiled one in bf16:
COMPILED_ROUNDING = 0.02


def compile_blocks(module: nn.Module, tiny: bool) -> None:
    """Compile the blocks in place, one graph for all of a kind: the whole in one graph takes minutes to compile."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    for name in BLOCKS:
        for block in getattr(module, name, ()):
            block.compile(fullgraph=True, dynamic=False, backend="eager" if tiny else "inductor")


class Steps:
    """Rows of one model's steps and restorations: times, shares of the floor, distances from the first form."""

    def __init__(self, run: Run, name: str):
        work = work_of(name, run.tiny)
        self.run, self.name, self.floors = run, name, analyse(work, ceilings(run.device))["totals"]
        self.model = random_model(work, run.device, torch.bfloat16)
        self.tables = self.model.bake(torch.tensor([400.0]))[0]
        self.first: Tensor | None = None
        self.times: list[float] = []

    def step(self, trunk: nn.Module) -> Tensor:
        """The velocity of a trunk."""
        return self.model.backbone(trunk).velocity(self.model.degraded, self.tables)

    def measure(self, form: str, precision: str, function: Callable[[], Tensor], evaluations: int = 0, needs: float = 4) -> None:
        """A row: a step (`evaluations` 0) or a restoration, if there are the seconds that it needs."""
        about = {"model": self.name, "form": form, "precision": precision}
        if not self.run.left(needs, **about):
            return
        with self.run.guarded(**about), torch.no_grad():
            result = function().float()
            if not evaluations and self.first is None:
                self.first = result.clone()  # a graph's result is rewritten
            found = milliseconds(function, self.run.device)
            row = {"ms": found["median"], "quartiles": found["quartiles"]}
            count, floors = max(evaluations, 1), self.floors["floor"]
            if precision in floors:
                flop, floor = self.floors["plain_flop" if precision == "plain" else "flop"], floors[precision] * 1e3
                row |= {"TFLOP/s": count * flop / found["median"] / 1e9, "floor ms": count * floor}
                row["share"] = count * floor / found["median"]
            if not evaluations:
                self.times.append(found["median"])
                row |= {"x first": self.times[0] / self.times[-1], "RMS from first": relative_rms(result, self.first)}
            self.run.add(**about, **row)


def steps(run: Run, name: str) -> None:
    """A step of the transformer and whole restorations in bf16 and fp8: as it is, as a graph, with compiled blocks."""
    one = Steps(run, name)
    model = one.model
    one.measure("step, eager", "bf16", lambda: one.step(model.trunk))
    one.measure("step, eager, CUDA graph", "bf16", captured_later(lambda: one.step(model.trunk), run))
    narrow = fp8_copy(run, model, name)
    if narrow is not None:
        one.measure("step, eager", "fp8", lambda: one.step(narrow))
        one.measure("step, eager, CUDA graph", "fp8", captured_later(lambda: one.step(narrow), run))
    both = [(trunk, precision) for trunk, precision in ((model.trunk, "bf16"), (narrow, "fp8")) if trunk is not None]
    for trunk, precision in both:
        table = make_table("fast", T0)
        whole = model.bake(model.timesteps(table))
        restored = partial(sample, model.backbone(trunk).velocity, whole, model.degraded, model.noise, table)
        one.measure(f"restoration, fast, {len(table)} evaluations", precision, restored, len(table), needs=6)
    for trunk, precision in both:
        compile_blocks(trunk, run.tiny)
        one.measure("step, compiled blocks", precision, lambda trunk=trunk: one.step(trunk), needs=BLOCK_SECONDS)
        graph = captured_later(lambda trunk=trunk: one.step(trunk), run)
        one.measure("step, compiled blocks, CUDA graph", precision, graph, needs=6)


def peers(run: Run, name: str) -> None:
    """A step of the released algorithm over diffusers' modules, eager and compiled, and ours beside it in the same process."""
    if find_spec("diffusers") is None:
        run.add(model=name, form="diffusers", error="left out: diffusers is not installed")
        return
    one = Steps(run, name)
    model = one.model
    with run.guarded(model=name, form="diffusers"):
        model.add_transformer()
        velocity, timestep = model.released_velocity(model.prompt), torch.full((1,), 400.0, device=run.device)
        released = lambda: velocity(model.degraded, timestep)  # noqa: E731
        one.measure("diffusers, released, eager", "plain", released)
        one.measure("step, eager", "bf16", lambda: one.step(model.trunk))
        compile_blocks(model.transformer, run.tiny)
        one.measure("diffusers, released, compiled blocks", "plain", released, needs=BLOCK_SECONDS)
        compile_blocks(model.trunk, run.tiny)
        graph = captured_later(lambda: one.step(model.trunk), run)
        one.measure("step, compiled blocks, CUDA graph", "bf16", graph, needs=BLOCK_SECONDS)


def captured_later(function: Callable[[], Tensor], run: Run) -> Callable[[], Tensor]:
    """`function`, captured when it is first called: what fails then fails in its own row."""
    kept: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not kept:
            kept.append(captured(function, run.device))
        return kept[0]()

    return call


def fp8_copy(run: Run, model: Model, name: str) -> nn.Module | None:
    """The trunk with its large linear layers in e4m3; None if the device has no such products."""
    if not (run.tiny or backend.has_fp8(run.device)):
        run.add(model=name, form="fp8", error="left out: this device does not multiply e4m3")
        return None
    with run.guarded(model=name, form="fp8"):
        narrow = copy.deepcopy(model.trunk)
        quantize_trunk(narrow)
        return narrow
    return None


def free(run: Run) -> None:
    """Give memory of what is gone back, compiled code's references too."""
    torch.compiler.reset()
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def graphs(run: Run, name: str) -> None:
    """One restoration by five evaluations in every form: time, distance from the plain form, and with another prompt's tables."""
    model = random_model(work_of(name, run.tiny), run.device, torch.bfloat16)
    if model.family is FLUX:  # whose conditioner is not needed beside its graphs; it bakes where it is
        model.conditioner.to("cpu")
    backbone, table = replace(model.backbone(), conditioner=None), make_table("fast", T0)
    plans = [model.plan(table, prompt) for prompt in (model.prompt, tuple(0.5 * part for part in model.prompt))]
    expected: list[Tensor] = []
    for form, seconds, make in forms(run, backbone):
        if seconds == COMPILE_SECONDS and not run.room(seconds + BLOCK_SECONDS):  # the next form matters more
            run.add(model=name, form=form, error=f"left out: it may take {seconds} s to compile; more --minutes have room for it")
            continue
        if not run.left(seconds, model=name, form=form):
            continue
        with run.guarded(model=name, form=form), torch.no_grad():
            one, started = make(), time.monotonic()
            results = [one.run(plan, model.degraded, model.noise) for plan in plans]
            run.synchronise()
            row = {"first seconds": time.monotonic() - started}
            if not expected:
                expected += results
            else:
                errors = [relative_rms(*pair) for pair in zip(results, expected)]
                row |= {"RMS from plain": errors[0], "RMS, other prompt": errors[1]}
                row["bits"] = all(torch.equal(*pair) for pair in zip(results, expected))
                most = max(ROUNDING.get(form, COMPILED_ROUNDING), 1e-5)
                row["ok"] = all(error is not None and error <= most for error in errors)
                row["ok"] &= still(one, form)
            found = milliseconds(lambda one=one: one.run(plans[0], model.degraded, model.noise), run.device)
            row |= {"ms": found["median"], "quartiles": found["quartiles"], "ms a step": found["median"] / len(plans[0].table)}
            if one.graphs is not None:
                row["graphs"] = len(one.graphs)  # one for both prompts
                row["ok"] &= len(one.graphs) == 1
            run.add(model=name, form=form, **row)
        del make
        free(run)


def still(one: Runner, form: str) -> bool:
    """Whether a runner is what its form says: one that could not be is plain by now, and said so in a warning."""
    return ("captured" in form) == (one.graphs is not None) and (form.startswith("compiled,") == (one.compiled is not None))


def forms(run: Run, backbone: Backbone) -> Iterator[tuple[str, float, Callable[[], Runner]]]:
    """The forms of a run by name, and the seconds that one may take; the last one's blocks are compiled for good."""

    def runner(captured: bool, compiled: bool = False, blocks: bool = False) -> Runner:
        kept = Graphs(called_again if run.tiny else CudaRecorder(run.device)) if captured else None
        if blocks:
            compile_blocks(backbone.trunk, run.tiny)
        one = Runner(backbone, "auto", graphs=kept) if captured else Runner(backbone, "off")
        if compiled:
            backend = "eager" if run.tiny else "inductor"
            one.compiled = replace(backbone, trunk=torch.compile(backbone.trunk, fullgraph=True, dynamic=False, backend=backend))
        return one

    yield "plain", 4, lambda: runner(False)
    yield "captured", 6, lambda: runner(True)
    yield "compiled, captured", COMPILE_SECONDS, lambda: runner(True, compiled=True)
    yield "blocks compiled, captured", BLOCK_SECONDS, lambda: runner(True, blocks=True)


def called_again(function: Callable[[], Tensor], warm: Callable[[], object]) -> tuple[Callable[[], None], Tensor]:
    """What a CPU has in place of a graph: the function, called again."""
    warm()
    result = function()
    return lambda: result.copy_(function()), result


def train(run: Run, name: str) -> None:
    """A step of prompt learning: time, times a forward pass, peak memory beside that on paper; blocks checkpointed if need be."""
    work = work_of(name, run.tiny)
    model, paper = random_model(work, run.device, torch.bfloat16), learning_memory(work)
    for form in ("all activations kept", "checkpointed blocks"):
        if form == "checkpointed blocks":
            checkpoint_blocks(model.trunk)
        free(run)
        try:
            for row in learned(run, model):
                bytes_on_paper = paper.kept if form == "all activations kept" else paper.checkpointed
                run.add(model=name, form=form, **row, **{"paper GB": bytes_on_paper / 1e9})
            return
        except torch.OutOfMemoryError:
            run.add(model=name, form=form, error="does not fit into the device's memory")


def learned(run: Run, model: Model) -> Iterator[dict[str, Any]]:
    """The row of a step: live conditioner, trunk, velocity loss, backward, Adam on the prompt and its α."""
    live, velocity = model.backbone().live(len(model.prompt[0])), model.backbone().velocity
    residual, alpha = (part.clone().requires_grad_() for part in model.prompt)
    optimizer = torch.optim.Adam([residual, alpha], lr=1e-3)
    target, timestep = torch.randn_like(model.degraded), torch.tensor([300.0], device=run.device)

    def step() -> Tensor:
        loss = (velocity(model.degraded, live(timestep, residual, alpha)) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    weights = residual.detach().clone()
    loss = step().item()
    if not torch.isfinite(torch.tensor(loss)) or torch.equal(weights, residual):
        raise AssertionError(f"the prompt did not move (loss {loss})")
    found, tables = milliseconds(step, run.device), model.bake(timestep)[0]
    with torch.no_grad():
        forward = milliseconds(lambda: velocity(model.degraded, tables), run.device)["median"]
    row = {"ms": found["median"], "quartiles": found["quartiles"], "x forward": found["median"] / forward, "loss": loss}
    if run.device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated(run.device) / 1e9
    yield row
