"""Which prompts and which precision a command asks for; refused before anything heavy is loaded."""

import math
from pathlib import Path

from ebr_engine.cli import options
from ebr_engine.errors import EbrError

PROMPT_SUFFIXES = (".safetensors", ".pt", ".pth")


def chosen_prompts(backbone: str, task: str | None, texts: list[str], auto: bool = False) -> list[tuple[Path, float]]:
    """Prompt files and their weights; `EbrError` unless there is a task or a prompt, and not both, and the files exist.

    `auto`: whether the task may be left to auto.
    Asked before any weights are: a prompt that is missing is told before a model is downloaded.
    """
    from ebr_engine.prompts.catalogue import AUTO, find_prompts

    prompts = [_prompt(text) for text in texts]
    if bool(task) == bool(prompts):
        wrong = "both --task and --prompt" if task else "neither --task nor --prompt"
        raise EbrError(f"{wrong} given; say what to repair by one of them, for example --task haze")
    if task == AUTO and not auto:
        find_prompts(backbone, AUTO)  # which says why not
    if task:
        prompts_of(backbone, task)
    return prompts


def prompts_of(backbone: str, task: str) -> list[tuple[Path, float]]:
    """The files of a task or of several, with weights; of auto, all that it may choose from. None for an unknown backbone.

    Raises `PromptError` for a task that has no prompt.
    """
    from ebr_engine.backbones.registry import BACKBONES
    from ebr_engine.prompts.catalogue import AUTO, TASKS, find_prompts, prompt_files

    if backbone not in BACKBONES:  # which loading it tells
        return []
    if task != AUTO:
        return find_prompts(backbone, task)
    found = [(file, 1.0) for name, file in prompt_files(backbone).items() if name in TASKS]
    return found or find_prompts(backbone, TASKS[0])  # which tells where to get some


def precision_of(precision: options.Precision, fp8: bool) -> str:
    """The precision that --precision and --fp8 ask for together; `EbrError` when they contradict each other."""
    if fp8 and precision.value not in ("auto", "fp8"):
        raise EbrError(f"--fp8 and --precision {precision.value} contradict each other")
    return "fp8" if fp8 else precision.value


def is_prompt(text: str) -> bool:
    """Whether a word of the command line names a prompt file."""
    return _prompt_parts(text)[0].lower().endswith(PROMPT_SUFFIXES)


def _prompt(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT; the file has to exist."""
    path, weight = _prompt_parts(text)
    if not Path(path).is_file():
        raise EbrError(f"{path}: no such prompt file")
    if not math.isfinite(weight):
        raise EbrError(f"{text}: the weight must be a finite number")
    return Path(path), weight


def _prompt_parts(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition(":")
    try:  # what follows the colon of C:\rain.safetensors is no number
        return (path, float(weight)) if path and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0
