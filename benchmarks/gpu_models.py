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
ROUNDING = {"captured": 0.0, "compiled": 0.02, "compiled and captured": 0.02}  # relative RMS from the plain run; bf16 throughout


def compile_blocks(module: nn.Module, tiny: bool) -> None:
    """Compile the blocks in place, one graph for all of a kind: the whole in one graph takes minutes to compile."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    for name in BLOCKS:
        for block in getattr(module, name, ()):
            block.compile(fullgraph=True, dynamic=False, backend="eager" if tiny else "inductor")


def steps(run: Run, name: str) -> None:
    """A step of the transformer and whole restorations: ours in every form, and the released way over diffusers' modules."""
    work = work_of(name, run.tiny)
    floors = analyse(work, ceilings(run.device))["totals"]
    model = random_model(work, run.device, torch.bfloat16)
    state, tables = model.degraded, model.bake(torch.tensor([400.0]))[0]
    first: list[Tensor] = []
    times: list[float] = []

    def measure(form: str, precision: str, function: Callable[[], Tensor], evaluations: int = 0) -> None:
        """A row: a step (`evaluations` 0) or a restoration."""
        with run.guarded(model=name, form=form, precision=precision), torch.no_grad():
            result = function().float()
            if not evaluations:
                first.append(result.clone())  # a graph's result is rewritten
            found = milliseconds(function, run.device)
            row = {"ms": found["median"], "quartiles": found["quartiles"]}
            count = max(evaluations, 1)
            if precision in floors["floor"]:
                flop, floor = floors["plain_flop" if precision == "plain" else "flop"], floors["floor"][precision] * 1e3
                row |= {"TFLOP/s": count * flop / found["median"] / 1e9, "floor ms": count * floor}
                row["share"] = count * floor / found["median"]
            if not evaluations:
                times.append(found["median"])
                row |= {"x first": times[0] / times[-1], "RMS from first": relative_rms(result, first[0])}
            run.add(model=name, form=form, precision=precision, **row)

    released_forms(run, model, name, measure)
    model.transformer = None
    free(run)
    step = lambda trunk: model.backbone(trunk).velocity(state, tables)  # noqa: E731
    measure("step, eager", "bf16", lambda: step(model.trunk))
    measure("step, eager, CUDA graph", "bf16", captured_later(lambda: step(model.trunk), run))
    narrow = fp8_copy(run, model, name)
    for trunk, precision in ((model.trunk, "bf16"), (narrow, "fp8")):
        if trunk is None:
            continue
        if precision == "fp8":
            measure("step, eager", "fp8", lambda trunk=trunk: step(trunk))
        if run.left(25, model=name, form="compiled", precision=precision):
            compile_blocks(trunk, run.tiny)
            measure("step, compiled blocks", precision, lambda trunk=trunk: step(trunk))
            graph = captured_later(lambda trunk=trunk: step(trunk), run)
            measure("step, compiled blocks, CUDA graph", precision, graph)
    for schedule, trunk, precision in (("fast", model.trunk, "bf16"), ("fast", narrow, "fp8"), ("exact", model.trunk, "bf16")):
        if trunk is not None and run.left(10, model=name, form=f"restoration, {schedule}", precision=precision):
            table = make_table(schedule, T0)
            whole = model.bake(model.timesteps(table))
            form = f"restoration, {schedule}, {len(table)} evaluations"
            restored = partial(sample, model.backbone(trunk).velocity, whole, state, model.noise, table)
            measure(form, precision, restored, len(table))


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


def released_forms(run: Run, model: Model, name: str, measure: Callable[..., None]) -> None:
    """The released algorithm's step, over diffusers' modules; left out without them."""
    if find_spec("diffusers") is None:
        run.add(model=name, form="diffusers", error="left out: diffusers is not installed")
        return
    with run.guarded(model=name, form="diffusers"):
        model.add_transformer()
        velocity, timestep = model.released_velocity(model.prompt), torch.full((1,), 400.0, device=run.device)
        measure("diffusers, released, eager", "plain", lambda: velocity(model.degraded, timestep))
        if run.left(40, model=name, form="diffusers, released, compiled blocks"):
            compile_blocks(model.transformer, run.tiny)
            measure("diffusers, released, compiled blocks", "plain", lambda: velocity(model.degraded, timestep))


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
    for form, make in forms(run, backbone):
        if "compiled" in form and not run.left(COMPILE_SECONDS, model=name, form=form):
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
                row["ok"] = all(error is not None and error <= max(ROUNDING[form], 1e-5) for error in errors)
                row["ok"] &= still(one, form)
            found = milliseconds(lambda one=one: one.run(plans[0], model.degraded, model.noise), run.device)
            row |= {"ms": found["median"], "quartiles": found["quartiles"], "ms a step": found["median"] / len(plans[0].table)}
            if one.graphs is not None:
                row["graphs"] = len(one.graphs)  # one for both prompts
                row["ok"] &= len(one.graphs) == 1
            if run.device.type == "cuda":
                row["peak GB"] = torch.cuda.max_memory_allocated(run.device) / 1e9
            run.add(model=name, form=form, **row)
        del make
        free(run)


def still(one: Runner, form: str) -> bool:
    """Whether a runner is what its form says: one that could not be is plain by now, and said so in a warning."""
    return ("captured" in form) == (one.graphs is not None) and ("compiled" in form) == (one.compiled is not None)


def forms(run: Run, backbone: Backbone) -> Iterator[tuple[str, Callable[[], Runner]]]:
    """The forms of a run by name."""

    def runner(captured: bool, compiled: bool) -> Runner:
        kept = Graphs(called_again if run.tiny else CudaRecorder(run.device)) if captured else None
        one = Runner(backbone, "auto", graphs=kept) if captured else Runner(backbone, "off")
        if compiled:
            backend = "eager" if run.tiny else "inductor"
            one.compiled = replace(backbone, trunk=torch.compile(backbone.trunk, fullgraph=True, dynamic=False, backend=backend))
        return one

    yield "plain", lambda: runner(False, False)
    yield "captured", lambda: runner(True, False)
    yield "compiled", lambda: runner(False, True)
    yield "compiled and captured", lambda: runner(True, True)


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
