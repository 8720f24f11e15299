"""What can be asked for by name: backbones, tasks, and the prompt files behind them; imports nothing heavy."""

from pathlib import Path

from ebr_engine.errors import PromptError
from ebr_engine.settings import prompt_dir

BACKBONES = ("mini", "wan", "flux")
TASKS = ("haze", "rain", "snow", "blur", "lowlight")
ASSETS = Path(__file__).parent / "assets"
PUBLISHED = "github.com/sudraj2002/YPT, folder ckpts"  # for wan and flux; without a licence, so never bundled


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
        line = f"unknown task {task!r}: {backbone} has no prompt for it; there is: {', '.join(files) or 'none'}"
        if backbone in ("wan", "flux"):
            line += f". The authors publish theirs ({PUBLISHED}); add one with: ebr-engine prompts add FILE.pt --task {task}"
        raise PromptError(line)
    return files[task]
