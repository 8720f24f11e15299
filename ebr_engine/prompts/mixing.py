"""Several prompts in one request: which, with which weights, and how they are mixed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.prompts.catalogue import find_prompts, fine_file
from ebr_engine.prompts.prompt import Prompt, load_prompt


def mixed_weights(prompts: Sequence[tuple[Prompt, float]]) -> list[tuple[Tensor, Tensor]]:
    """(residual, weight·α) of each prompt, as the conditioners take them; weights are used as given."""
    return [(prompt.residual, prompt.alpha * weight) for prompt, weight in prompts]


def scaled(prompt: Prompt, strength: float) -> Prompt:
    """The same prompt with its α multiplied by `strength` (0 is the empty prompt)."""
    return replace(prompt, alpha=prompt.alpha * strength)


def evaluations(prompts: Iterable[Prompt], schedule: str) -> int:
    """Evaluations of a run where none are asked for: the schedule's own; by `fast` fewer if the prompts were learned so."""
    own = SCHEDULES[schedule].steps
    return min(own, max((prompt.steps for prompt in prompts), default=own)) if schedule == "fast" else own


def chosen_prompts(
    backbone: Backbone, task: str | None, prompts: Sequence[tuple[Any, float]], fine: bool = False
) -> list[tuple[Prompt, float]]:
    """The prompts of a task, or of `prompts` (a Prompt or a file each, with a weight), loaded and checked against the backbone.

    [] is the empty prompt. `fine`: of tasks those that see pictures finer than their pixels, where there are any. Raises
    `PromptError` for a prompt that does not fit.
    """
    if task is not None:
        found = find_prompts(backbone.name, task)
        prompts = [(fine_file(file) or file, weight) for file, weight in found] if fine else found
    chosen = []
    for item, weight in prompts:
        one = item if isinstance(item, Prompt) else load_prompt(item)
        one.check(backbone.name, backbone.width, backbone.blocks)
        chosen.append((one, weight))
    return chosen
