"""Restore images and videos with frozen diffusion transformers, learned prompts and a diffusion bridge.

>>> from ebr_engine import Restorer
>>> Restorer("mini").restore(image, task="haze")
"""

from importlib import import_module
from typing import Any

from ebr_engine.version import __version__

_EXPORTS = {
    "Restorer": "engine.restorer",
    "Prompt": "prompts.prompt",
    "load_prompt": "prompts.prompt",
    "EbrError": "errors",
}
__all__ = ["EbrError", "Prompt", "Restorer", "__version__", "load_prompt"]


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that the command line starts without torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ebr_engine' has no attribute {name!r}")
    return getattr(import_module(f"ebr_engine.{_EXPORTS[name]}"), name)
