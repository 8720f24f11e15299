"""What a file holds beside its pixels, and what becomes of it: kept, converted, or not kept and told.

`inventory` reads the container itself, without decoding; `outcomes` looks every holding up in the table of fates for an
output format, and `not_kept_line` makes the one warning a file. The writers keep to the table.
Formats are named by `format_of`: "png", "jpeg", "webp", "tiff", "avif", "gif", "mp4", "mov", "mkv", "webm", "frames" …
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ebr_engine.media.holdings.image_fates import IMAGE_FATES, IMAGE_FORMATS
from ebr_engine.media.holdings.images import image_inventory
from ebr_engine.media.holdings.sound import SOUND_FATES, SOUND_FORMATS, sound_inventory
from ebr_engine.media.holdings.types import Fate, FateTable, Holding, Outcome
from ebr_engine.media.holdings.video import video_inventory
from ebr_engine.media.holdings.video_fates import AS_CLIP, CONTAINERS, FRAMES, VIDEO_FATES

__all__ = ["FATES", "Fate", "Holding", "Outcome", "fates_table", "format_of", "inventory", "not_kept_line", "outcomes"]

_NAMES = {"jpg": "jpeg", "tif": "tiff", "jfif": "jpeg", "jpe": "jpeg", "m4v": "mp4", "apng": "png"}
_NAMES |= {"m2ts": "ts", "mts": "ts", "mpeg": "mpg"}

# A kind may be in both tables: a clip's frames as pictures hold less than pictures do.
FATES: FateTable = {
    kind: {**SOUND_FATES.get(kind, {}), **VIDEO_FATES.get(kind, {}), **IMAGE_FATES.get(kind, {})}
    for kind in sorted({*IMAGE_FATES, *VIDEO_FATES, *SOUND_FATES})
}


def inventory(path: str | os.PathLike) -> list[Holding]:
    """Everything that a picture, clip or sound holds beside its pixels or samples, from its container alone.

    No pixel is decoded and no declared length is trusted; a damaged part is a holding that says so. OSError where the file
    cannot be read.
    """
    found = image_inventory(Path(path))
    found = sound_inventory(Path(path)) if found is None else found
    return video_inventory(Path(path)) if found is None else found


def outcomes(holdings: Sequence[Holding], format: str, clip: bool = False) -> list[Outcome]:
    """What becomes of each holding in a file of `format` ("png", "mp4", …). What the table does not know is not kept.

    `clip`: they are a clip's, which as pictures are its frames.
    """
    unknown = (Fate.NOT_KEPT, "not known how to keep it")
    tables = (VIDEO_FATES, FATES) if clip else (FATES,)
    found = [{name: fate for table in reversed(tables) for name, fate in table.get(each.kind, {}).items()} for each in holdings]
    return [Outcome(each, *fates.get(format, unknown)) for each, fates in zip(holdings, found)]


def not_kept_line(results: Iterable[Outcome]) -> str | None:
    """The one warning of a file: all that is not kept, each once, by the reason; None where everything is kept or converted."""
    lost: dict[str, dict[str, list[str]]] = {}
    for outcome in results:
        if outcome.fate is Fate.NOT_KEPT:
            details = lost.setdefault(outcome.how, {}).setdefault(outcome.holding.kind, [])
            if outcome.holding.detail and outcome.holding.detail not in details:
                details.append(outcome.holding.detail)
    reasons = []
    for why, kinds in lost.items():
        named = [kind + (f" ({'; '.join(details)})" if details else "") for kind, details in kinds.items()]
        reasons.append(", ".join(named) + (f": {why}" if why else ""))
    return "not kept: " + "; ".join(reasons) if reasons else None


def format_of(path: str | os.PathLike) -> str:
    """The output format that a path names, as in the table of fates."""
    suffix = Path(path).suffix.lower()[1:]
    return _NAMES.get(suffix, suffix)


def fates_table(formats: Sequence[str] | None = None) -> str:
    """The table as Markdown, a row a kind, a column an output format; all of it without `formats`, in five parts."""
    if formats is not None:
        return _markdown(FATES, formats)
    whole = {
        "Of pictures": _markdown(IMAGE_FATES, IMAGE_FORMATS),
        "Of clips": _markdown(VIDEO_FATES, CONTAINERS),
        "Of clips that become frames": _markdown(VIDEO_FATES, FRAMES),
        "Of frames and animations that become a clip": _markdown(VIDEO_FATES, (AS_CLIP,)),
        "Of sound": _markdown(SOUND_FATES, SOUND_FORMATS),
    }
    return "\n".join(f"{title}:\n\n{table}" for title, table in whole.items())


def _markdown(table: FateTable, formats: Sequence[str]) -> str:
    lines = ["| holding | " + " | ".join(formats) + " |", "|---" * (len(formats) + 1) + "|"]
    for kind, fates in table.items():
        if any(name in fates for name in formats):
            cells = [_cell(*fates[name]) if name in fates else "–" for name in formats]
            lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _cell(fate: Fate, how: str) -> str:
    return fate.value + (f": {how}" if how else "")
