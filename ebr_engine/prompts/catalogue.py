"""What can be asked for by name: tasks, and the prompt files behind them; imports nothing heavy."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from ebr_engine.backbones.registry import spec
from ebr_engine.errors import PromptError
from ebr_engine.settings import prompt_dir

# In the order in which they come to a picture: the air, what falls through it, the lens, the exposure.
TASKS = ("haze", "rain", "snow", "blur", "lowlight")
AUTO = "auto"  # in a task's place: whatever the classifier sees
FINE = "fine"  # the folder of prompts that see a picture finer than its pixels, beside those of the same tasks that do not
FINEST = 4  # times that a prompt may see a picture finer than its pixels
ASSETS = Path(__file__).parents[1] / "assets"


def prompt_files(backbone: str) -> dict[str, Path]:
    """Task → prompt file of a backbone: the bundled ones, and in their place those that the user installed."""
    folders = (ASSETS / backbone / "prompts", prompt_dir() / backbone)
    return {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.safetensors"))}


def installed_file(backbone: str, task: str) -> Path:
    """Where a prompt of the user's has to lie, so that `find_prompt` finds it."""
    return prompt_dir() / backbone / f"{task}.safetensors"


def find_prompt(backbone: str, task: str) -> Path:
    """The prompt file of a task; `PromptError` names the tasks there are, or how to add the authors' published prompts."""
    files = prompt_files(backbone)
    if task not in files:
        near = get_close_matches(task.lower(), files, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        line = f"unknown task {task!r}: {backbone} has no prompt for it; {hint}there is: {', '.join(files) or 'none'}"
        if published := spec(backbone).published_prompts:
            line += f". The authors publish theirs ({published}); add one with: ebr-engine prompts add FILE.pt --task {task}"
        for other in spec(backbone).related:
            line += f". It takes prompts of {other} too: ebr-engine prompts add FILE --backbone {backbone} --task {task}"
        raise PromptError(line)
    return files[task]


def fine_file(file: Path) -> Path | None:
    """The prompt for the same task that sees pictures finer, beside the prompt `file`; None where there is none."""
    fine = file.parent / FINE / file.name
    return fine if fine.is_file() else None


def with_fine(prompts: Iterable[tuple[Path, float]]) -> list[tuple[Path, float]]:
    """The same prompt files and weights, each followed by its fine one, where there is one."""
    return [(one, weight) for file, weight in prompts for one in (file, fine_file(file)) if one]


def find_prompts(backbone: str, tasks: str) -> list[tuple[Path, float]]:
    """Prompt files and weights of one task or several, written `rain+haze` or `rain:0.7+haze:0.3`; without a number it is 1.

    Raises `PromptError` as `find_prompt` does, for a weight that is no finite number, and for a task that is named twice.
    """
    if tasks == AUTO:
        raise PromptError(f"task {AUTO} chooses for each file that is restored; name a task here")
    if tasks in prompt_files(backbone):  # whatever a user's file is called
        return [(find_prompt(backbone, tasks), 1.0)]
    found: dict[Path, float] = {}
    for part in tasks.split("+"):
        name, colon, number = part.strip().partition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise PromptError(f"{part.strip()}: a task's weight must be a finite number, as in rain:0.7+haze:0.3")
        file = find_prompt(backbone, name.strip())
        if file in found:
            raise PromptError(f"{tasks}: {name.strip()} is named twice")
        found[file] = weight
    return list(found.items())
