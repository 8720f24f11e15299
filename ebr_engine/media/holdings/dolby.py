"""Dolby Vision's record of a stream: whether its base layer is a picture of its own, and of which kind."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ebr_engine.media.holdings.boxes import read_header, tracks
from ebr_engine.media.holdings.matroska import read_tracks

_RECORDS = (b"dvcC", b"dvvC", b"dvwC")
_BASE = {1: "HDR10", 2: "SDR", 4: "HLG", 6: "HDR10 of a disc"}  # by compatibility
_COLOURS = {1: (9, 16), 2: (1, 1), 4: (9, 18), 6: (9, 16)}  # primaries and transfer of the base layer, of H.273


@dataclass(frozen=True)
class DolbyVision:
    """What the record says."""

    profile: int
    level: int
    compatibility: int

    @property
    def plain(self) -> bool:
        """Whether the base layer can be shown as it is. Profiles 5 and 10.0 hold IPT colours, which look green and purple."""
        return self.compatibility in _BASE

    @property
    def base(self) -> str:
        return _BASE.get(self.compatibility, "none")

    @property
    def colours(self) -> tuple[int, int] | None:
        """Primaries and transfer (of H.273) of the base layer."""
        return _COLOURS.get(self.compatibility)

    def __str__(self) -> str:
        return f"profile {self.profile}" + (f".{self.compatibility}" if self.profile >= 8 else "")


def parse_record(data: bytes) -> DolbyVision | None:
    """The record in the content of a `dvcC` or `dvvC` box; None where it is cut short."""
    if len(data) < 5:
        return None
    bits = int.from_bytes(data[2:4], "big")
    profile, compatibility = bits >> 9, data[4] >> 4
    if profile == 7 and compatibility == 0:  # older files of discs leave it out
        compatibility = 6
    return DolbyVision(profile, bits >> 3 & 63, compatibility)


def dolby_vision(path: Path) -> DolbyVision | None:
    """The record of a file's first video, where an MP4, QuickTime or Matroska file has one."""
    with open(path, "rb") as file:
        matroska = file.read(4) == b"\x1a\x45\xdf\xa3"
    return next(iter(_in_matroska(path) if matroska else _in_movie(path)), None)


def _in_movie(path: Path) -> Iterable[DolbyVision]:
    header = read_header(path)
    for kind, paths in tracks(header) if header else ():
        if kind == b"vide":
            found = (parse_record(header[p[-1].body : p[-1].end]) for p in paths if p[-1].kind in _RECORDS)
            return [record for record in found if record]
    return []


def _in_matroska(path: Path) -> Iterable[DolbyVision]:
    kind = 0
    for element in read_tracks(path):
        if element.name == "mapping":
            kind = 0
        elif element.name == "mapping type":
            kind = element.number
        elif element.name == "mapping data" and kind.to_bytes(8, "big")[4:] in _RECORDS and (found := parse_record(element.data)):
            yield found
