"""What a clip holds beside its frames and its sound."""

from pathlib import Path

from ebr_engine.media.holdings.types import Holding


def video_inventory(path: Path) -> list[Holding]:
    """The holdings of a clip's container, streams and first packets; nothing is decoded."""
    return []
