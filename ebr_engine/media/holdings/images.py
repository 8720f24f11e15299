"""What a picture holds beside its pixels."""

from pathlib import Path

from ebr_engine.media.holdings.types import Holding


def image_inventory(path: Path) -> list[Holding] | None:
    """The holdings of a picture, read from its container; None for what is no picture by its content."""
    return None
