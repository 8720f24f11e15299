"""From what is asked for (a task or prompts, a schedule, a strength) to a plan: everything is checked, the tables are baked."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.loading import Backbone
from ebr_engine.bridge import StepTable, make_table, released_timesteps
from ebr_engine.catalogue import TASKS, find_prompts
from ebr_engine.classify import diagnose
from ebr_engine.errors import EngineError, check_choice
from ebr_engine.plan import Plan, chained
from ebr_engine.prompts import Prompt, load_prompt, mixed_weights
from ebr_engine.spinning import views

MIXES = ("auto", "residual", "velocity", "turn")
STRONGEST = 2.0  # times a prompt's learned strength
PromptLike = Prompt | Path | str


def make_plan(
    parts: Backbone,
    task: str | None = None,
    prompt: PromptLike | Sequence | None = None,
    *,
    steps: int | None = None,
    schedule: str = "fast",
    order: int | None = None,
    t0: float | None = None,
    mix: str = "auto",
    strength: float = 1.0,
) -> Plan:
    """The plan of a request; arguments and errors as those of `Restorer.restore`."""
    check_choice("mix", mix, MIXES)
    if not 0 <= strength <= STRONGEST:  # so that NaN fails too
        raise EngineError(f"the strength must be from 0 (the empty prompt) to {STRONGEST:g}, got {strength:g}")
    prompts = [(one, weight * strength) for one, weight in chosen_prompts(parts, task, prompt)]
    if not prompts and t0 is None:
        raise EngineError(f"say what to repair: a task ({', '.join(TASKS)}) or a prompt")
    looked_up = parts.name != "mini" and schedule in ("released", "exact")

    def run_of(prompts: list[tuple[Prompt, float]], mix: str) -> Plan:
        try:
            table = make_table(schedule, prompts[0][0].t0 if t0 is None else t0, steps, order)
        except ValueError as error:
            raise EngineError(str(error)) from error
        return bake(parts, prompts, table, mix, released_timesteps(table.times, parts.name) if looked_up else None)

    mix = mix_for(parts.name) if mix == "auto" else mix
    if mix != "turn":
        return run_of(prompts, mix)
    first, *others = [run_of([one], "residual") for one in prompts] or [run_of([], "residual")]
    return chained(first, others)


def mix_for(backbone: str) -> str:
    """How `auto` mixes several prompts of a backbone: one after the other where that has been measured to restore more."""
    return "turn" if backbone == "mini" else "residual"


def chosen_prompts(parts: Backbone, task: str | None, prompt: PromptLike | Sequence | None) -> list[tuple[Prompt, float]]:
    """The prompts of a request with their weights, loaded and checked against the backbone; [] is the empty prompt.

    Raises `EngineError` when the request names both a task and a prompt, `PromptError` for a prompt that does not fit.
    """
    if task is not None and prompt is not None:
        raise EngineError("give a task or a prompt, not both")
    if task is not None:
        prompt = find_prompts(parts.name, task)
    if prompt is None:
        return []
    items = prompt if isinstance(prompt, list) else [prompt]
    chosen = []
    for item in items:
        one, weight = item if isinstance(item, tuple) else (item, 1.0)
        one = one if isinstance(one, Prompt) else load_prompt(one)
        one.check(parts.name, parts.width, parts.blocks)
        if not math.isfinite(weight):
            raise EngineError(f"a prompt's weight must be a finite number, got {weight}")
        chosen.append((one, float(weight)))
    return chosen


@torch.no_grad()
def bake(
    parts: Backbone,
    prompts: list[tuple[Prompt, float]],
    table: StepTable,
    mix: str = "residual",
    timesteps: Tensor | None = None,
) -> Plan:
    """The plan of a run with these prompts along a step table.

    `timesteps` [N]: what the transformer is told at each step, 1000 times the table's times by default.
    """
    check_choice("mix", mix, ("residual", "velocity"))
    if timesteps is None:
        timesteps = torch.tensor(table.times[:-1]) * 1000
    groups = [[pair] for pair in prompts] if mix == "velocity" and len(prompts) > 1 else [prompts]

    def tables(parts: Backbone) -> list[Any]:
        return [parts.bake(timesteps, mixed_weights(group)) for group in groups]

    return Plan(table, tables(parts), tables, views(parts, table.times[:-1]))


def seen(pictures: Tensor) -> str:
    """The tasks that auto chooses for pictures [B, 3, H, W] in [0, 1], as `make_plan` takes them; `EngineError` for none."""
    diagnosis = diagnose(list(pictures))
    if not diagnosis.tasks:
        raise EngineError(f"auto sees {diagnosis}; name a task")
    return "+".join(diagnosis.tasks)
