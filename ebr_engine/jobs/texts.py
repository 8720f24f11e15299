"""Prompts as people write them: FILE or FILE:WEIGHT."""

import math
from collections.abc import Iterable
from pathlib import Path

from ebr_engine.errors import EbrError

PROMPT_SUFFIXES = (".safetensors", ".pt", ".pth")


def is_prompt(text: str) -> bool:
    """Whether a word names a prompt file."""
    return _split(text)[0].lower().endswith(PROMPT_SUFFIXES)


def prompts_of_texts(texts: Iterable[str]) -> tuple[tuple[Path, float], ...]:
    """Prompt files and weights; `EbrError` for a file that is not there, and for a weight that is no finite number.

    Asked before any weights are loaded: a prompt that is missing is told before a model is downloaded.
    """
    return tuple(map(_prompt, texts))


def _prompt(text: str) -> tuple[Path, float]:
    name, weight = _split(text)
    path = Path(name).expanduser()
    if not path.is_file():
        raise EbrError(f"{path}: no such prompt file")
    if not math.isfinite(weight):
        raise EbrError(f"{text}: the weight must be a finite number")
    return path, weight


def _split(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition(":")
    try:  # what follows the colon of C:\rain.safetensors is no number
        return (path, float(weight)) if path and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def is_address(text: str) -> bool:
    """Whether a text names a place that is not a path of this machine, such as `s3://bucket/photos`."""
    return "://" in text
