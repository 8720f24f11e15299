"""Several prompts in one request: which, with which weights, and how they are mixed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.errors import PromptError
from ebr_engine.prompts.catalogue import find_prompts, fine_file
from ebr_engine.prompts.prompt import Prompt, load_prompt


def mixed_weights(prompts: Sequence[tuple[Prompt, float]]) -> list[tuple[Tensor, Tensor]]:
    """(residual, weight·α) of each prompt, as the conditioners take them; weights are used as given."""
    return [(prompt.residual, prompt.alpha * weight) for prompt, weight in prompts]


def scaled(prompt: Prompt, strength: float) -> Prompt:
    """The same prompt with its α multiplied by `strength` (0 is the empty prompt)."""
    return replace(prompt, alpha=prompt.alpha * strength)


def averaged(first: Prompt, second: Prompt, share: float = 0.5) -> Prompt:
    """The prompt between two, `share` of the second: rows [L, D] or [blocks, L, D] and strengths [blocks] are averaged, float32,
    and all else is the second's.

    Of use where the second went on from the first on other damage: what lies between them often serves both (Wortsman et al.,
    "Model soups", arXiv 2203.05482). `PromptError` for two that are not alike in what a run has to know.
    """
    if not 0 <= share <= 1:
        raise PromptError(f"the share of the second prompt must lie between 0 and 1, got {share:g}")
    for name in ("backbone", "base_model", "injection", "task", "t_min", "t0", "steps", "detail", "supersample", "deconvolve"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise PromptError(
                f"only prompts that are run alike can be averaged: {name} is {one} in the first, {other} in the second"
            )
    if first.residual.shape != second.residual.shape or first.alpha.shape != second.alpha.shape:
        raise PromptError(f"the prompts have other sizes: {tuple(first.residual.shape)} and {tuple(second.residual.shape)}")
    residual, alpha = (
        getattr(first, name).float() * (1 - share) + getattr(second, name).float() * share for name in ("residual", "alpha")
    )
    return replace(second, residual=residual, alpha=alpha, training=second.training | {"averaged": share})


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
