"""The words of an inventory: what a file holds beside its pixels, and what becomes of it in an output."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Holding:
    """One thing that a file holds beside its pixels."""

    kind: str  # what it is, a key of the table of fates: "icc", "exif", "gain map", "captions" …
    where: str  # the chunk, marker, box, stream or tag that it was found in
    detail: str = ""  # a few words for a person
    size: int = 0  # bytes


class Fate(Enum):
    """What becomes of a holding."""

    KEPT = "kept"
    CONVERTED = "converted"  # the same meaning in another form
    NOT_KEPT = "not kept"


@dataclass(frozen=True)
class Outcome:
    """A holding and what becomes of it in one output."""

    holding: Holding
    fate: Fate
    how: str = ""  # where it goes, what it is converted to, or why it is not kept


FateTable = Mapping[str, Mapping[str, tuple[Fate, str]]]  # kind → output format → (fate, how)
