"""Several prompts in one request: which, with which weights, and how they are mixed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.errors import EngineError
from ebr_engine.prompts.catalogue import find_prompts
from ebr_engine.prompts.prompt import Prompt, load_prompt


def mixed_weights(prompts: Sequence[tuple[Prompt, float]]) -> list[tuple[Tensor, Tensor]]:
    """(residual, weight·α) of each prompt, as the conditioners take them; weights are used as given."""
    return [(prompt.residual, prompt.alpha * weight) for prompt, weight in prompts]


def scaled(prompt: Prompt, strength: float) -> Prompt:
    """The same prompt with its α multiplied by `strength` (0 is the empty prompt)."""
    return replace(prompt, alpha=prompt.alpha * strength)


MIXES = ("auto", "residual", "velocity", "turn")
PromptLike = Prompt | Path | str


def chosen_prompts(backbone: Backbone, task: str | None, prompt: PromptLike | Sequence | None) -> list[tuple[Prompt, float]]:
    """The prompts of a request with their weights, loaded and checked against the backbone; [] is the empty prompt.

    Raises `EngineError` when the request names both a task and a prompt, `PromptError` for a prompt that does not fit.
    """
    if task is not None and prompt is not None:
        raise EngineError("give a task or a prompt, not both")
    if task is not None:
        prompt = find_prompts(backbone.name, task)
    if prompt is None:
        return []
    items = prompt if isinstance(prompt, list) else [prompt]
    chosen = []
    for item in items:
        one, weight = item if isinstance(item, tuple) else (item, 1.0)
        one = one if isinstance(one, Prompt) else load_prompt(one)
        one.check(backbone.name, backbone.width, backbone.blocks)
        if not math.isfinite(weight):
            raise EngineError(f"a prompt's weight must be a finite number, got {weight}")
        chosen.append((one, float(weight)))
    return chosen
