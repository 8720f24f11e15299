"""The GPU check's section on whole runs: plain, captured as one CUDA graph, compiled, and both, as the engine does it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu_clock import Run, milliseconds, relative_rms
from benchmarks.gpu_models import T0, Model, free, random_model
from ebr_engine.backbones.base import Backbone
from ebr_engine.bridge.sampler import draw_noise, make_table
from ebr_engine.engine.execute import CudaRecorder, Graphs, Runner
from ebr_engine.engine.plan import Plan

COMPILE_SECONDS = 90  # what torch.compile of a whole transformer may take: without so much left it is not begun
ROUNDING = {"captured": 0.0, "compiled": 0.02, "compiled and captured": 0.02}  # relative RMS from the plain run; bf16 throughout


def graphs(run: Run, name: str) -> None:
    """One restoration by five evaluations in every form: time, distance from the plain form, and with another prompt's tables."""
    model = random_model(run, name)
    model.conditioner.to("cpu" if model.flux else run.device)  # FLUX's is not needed beside its graphs; it bakes where it is
    backbone = Backbone("flux" if model.flux else "wan", None, model.trunk, None, {}, run.device, torch.bfloat16)
    state = model.degraded.unsqueeze(2) if model.flux else model.degraded
    noise = draw_noise(state.shape, 42, run.device)
    plans = [planned(model, prompt) for prompt in (model.prompt, tuple(0.5 * part for part in model.prompt))]
    expected: list[Tensor] = []
    for form, make in forms(run, backbone):
        if "compiled" in form and not run.left(COMPILE_SECONDS, model=name, form=form):
            continue
        with run.guarded(model=name, form=form), torch.no_grad():
            one, started = make(), time.monotonic()
            results = [one.run(plan, state, noise) for plan in plans]
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
            found = milliseconds(lambda one=one: one.run(plans[0], state, noise), run.device)
            row |= {"ms": found["median"], "quartiles": found["quartiles"], "ms a step": found["median"] / len(plans[0].table)}
            if one.graphs is not None:
                row["graphs"] = len(one.graphs)  # one for both prompts
                row["ok"] &= len(one.graphs) == 1
            if run.device.type == "cuda":
                row["peak GB"] = torch.cuda.max_memory_allocated(run.device) / 1e9
            run.add(model=name, form=form, **row)
        del make
        free(run)


def planned(model: Model, prompt: tuple[Tensor, Tensor]) -> Plan:
    """The plan of the fast schedule with a prompt."""
    table = make_table("fast", T0)
    bakes_at = next(model.conditioner.parameters()).device
    text = {name: value.to(bakes_at) for name, value in model.text.items()}
    timesteps = torch.tensor(table.times[:-1], device=bakes_at) * 1000
    prompt = tuple(part.to(bakes_at) for part in prompt)
    with torch.no_grad():
        if model.flux:
            base = model.conditioner(timesteps, text["context"], text["pooled"]).to(model.degraded.device, torch.bfloat16)
            return Plan(table, [base.with_prompts(model.trunk, [tuple(part.to(model.degraded.device) for part in prompt)])])
        return Plan(table, [model.conditioner(timesteps, text["context"], [prompt]).to(model.degraded.device, torch.bfloat16)])


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
