"""What can be asked for by name: backbones, tasks, and the prompt files behind them; imports nothing heavy."""

from pathlib import Path

from ebr_engine.errors import PromptError
from ebr_engine.settings import prompt_dir

BACKBONES = ("mini",)
TASKS = ("haze", "rain", "snow", "blur", "lowlight")
ASSETS = Path(__file__).parent / "assets"


def prompt_files(backbone: str) -> dict[str, Path]:
    """Task → prompt file of a backbone: those the user installed, then the bundled ones."""
    folders = (ASSETS / backbone / "prompts", prompt_dir() / backbone)
    return {file.stem: file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.safetensors"))}


def find_prompt(backbone: str, task: str) -> Path:
    """The prompt file of a task; `PromptError` names the tasks there are."""
    files = prompt_files(backbone)
    if task not in files:
        raise PromptError(f"no prompt for task {task!r} on {backbone}; there is: {', '.join(files) or 'none'}")
    return files[task]
