"""The restorer that a command's options ask for."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebr_engine.engine import Restorer

_PLACED = ("device", "offload", "compile", "max_memory", "low_memory")  # what an engine file leaves open


def load_restorer(backbone: str, *, engine: Path | None = None, vae: Path | None = None, **asked: Any) -> "Restorer":
    """Load a backbone, or an engine file in its place; `asked` are options under their names, as `Restorer` takes them."""
    from ebr_engine.engine import Restorer

    asked = {name: plain(value) for name, value in asked.items()}
    if engine:
        return Restorer.from_engine(engine, vae=vae, **{name: asked[name] for name in _PLACED if name in asked})
    return Restorer(backbone, vae=vae, **asked)


def plain(option: Any) -> Any:
    """What an option says: a choice's value."""
    return option.value if isinstance(option, Enum) else option
