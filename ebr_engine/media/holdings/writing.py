"""A picture's holdings put into an encoded file, as the table of fates says; and what became of each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ebr_engine.media.holdings import exif as exif_
from ebr_engine.media.holdings import icc, iptc, xmp
from ebr_engine.media.holdings.ifd import Entry, text_entry
from ebr_engine.media.holdings.image_fates import IMAGE_FATES
from ebr_engine.media.holdings.parts import Part
from ebr_engine.media.holdings.types import Fate, Outcome

_UNKNOWN = (Fate.NOT_KEPT, "not known how to keep it")
_SINGLE = ("icc", "exif", "xmp")  # of which a file has one
_MARKER = 65533  # bytes that one JPEG marker holds
_CAPTIONS = {
    "Title": (xmp.DC, "title", "alt"),
    "Author": (xmp.DC, "creator", "seq"),
    "Description": (xmp.DC, "description", "alt"),
    "Copyright": (xmp.DC, "rights", "alt"),
    "Software": (xmp.XMP, "CreatorTool", ""),
}


@dataclass
class Prepared:
    """The holdings of a picture in the form that one format takes them in."""

    parts: list[Part]  # those that are kept or converted
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iim: bytes = b""
    resources: bytes = b""

    def first(self, *kinds: str) -> Part | None:
        """The first part of these kinds."""
        return next((part for part in self.parts if part.kind in kinds), None)

    def all(self, kind: str) -> list[Part]:
        """All parts of a kind."""
        return [part for part in self.parts if part.kind == kind]


class Preparation:
    """Looks up and prepares a picture's parts for a format; `outcomes` tells of each."""

    def __init__(self, parts: Sequence[Part], format: str, width: int, height: int, grey: bool, thumbnail: bytes | None = None):
        self.format, self.size, self.grey = format, (width, height), grey
        self._fates = {id(part): IMAGE_FATES.get(part.kind, {}).get(format, _UNKNOWN) for part in parts}
        self._all = list(parts)
        seen: set[str] = set()
        for part in parts:
            self._refuse(part)
            if part.kind in _SINGLE and part.kind in seen:
                self._fates[id(part)] = (Fate.NOT_KEPT, "a second one; the first counts")
            seen.add(part.kind)
        kept = [part for part in parts if self._fates[id(part)][0] is not Fate.NOT_KEPT]
        self.result = Prepared(kept)
        self._describe(parts)
        self._colour()
        self._convert(thumbnail)

    @property
    def outcomes(self) -> list[Outcome]:
        """What becomes of each part."""
        return [Outcome(part.holding, *self._fates[id(part)]) for part in self._all]

    def _lose(self, part: Part, why: str) -> None:
        self._fates[id(part)] = (Fate.NOT_KEPT, why)
        if hasattr(self, "result") and part in self.result.parts:
            self.result.parts.remove(part)

    def _refuse(self, part: Part) -> None:
        """What the table would keep, but for its size or its content."""
        behind = part.kind in ("gain map", "motion clip", "second picture", "data behind the picture")
        if behind and part.where != "APP2" and len(part.data) < (part.size or 0) and self._fates[id(part)][0] is Fate.KEPT:
            self._fates[id(part)] = (Fate.NOT_KEPT, "too large")
        if part.kind == "comment" and self.format == "jpeg" and len(part.data) > _MARKER:
            self._fates[id(part)] = (Fate.NOT_KEPT, "larger than a JPEG marker")
        if (
            part.kind == "gain map"
            and part.where == "APP2"
            and not any(p.kind == "gain map" and p.data for p in self._all if p is not part)
        ):
            self._fates[id(part)] = (Fate.NOT_KEPT, "the gain map that it is of is missing")

    def _describe(self, parts: Sequence[Part]) -> None:
        """EXIF and XMP for the picture as it stands now, and IPTC."""
        result = self.result
        if (part := result.first("exif")) is not None:
            result.exif = exif_.upright(part.data, *self.size)
        if (part := result.first("xmp")) is not None:
            packet = xmp.upright(part.data, *self.size)
            motion = self.format != "jpeg" or result.first("motion clip") is None
            item = next((part for part in result.all("gain map") if part.where != "APP2"), None)
            result.xmp = xmp.without(packet, motion, item is None) if motion or item is None else packet
            if item is not None:
                result.xmp = xmp.with_item_length(result.xmp, "GainMap", len(item.data))
        result.iim = b"".join(part.data for part in result.all("iptc"))
        result.resources = b"".join(part.data for part in result.all("photoshop resources"))
        if self.format == "jpeg":
            self._fit_jpeg()

    def _fit_jpeg(self) -> None:
        result = self.result
        if result.exif and len(result.exif) + 6 > _MARKER:
            self._lose(result.first("exif"), "larger than a JPEG marker")
            result.exif = None
        if len(iptc.put_together(result.iim, result.resources)) + len(iptc.PHOTOSHOP) > _MARKER:
            for part in result.all("photoshop resources"):
                self._lose(part, "larger than a JPEG marker")
            result.resources = b""

    def _colour(self) -> None:
        """The colour profile: the picture's own, or one that means the same as its tags, where the format takes none."""
        result = self.result
        part = result.first("icc", "CMYK or Lab profile", "colour tags", "gamma")
        if part is None:
            return
        if part.kind == "icc":
            result.icc = part.data
        elif part.kind == "CMYK or Lab profile":
            result.icc = part.value
        elif self._fates[id(part)][0] is Fate.CONVERTED:
            result.icc = (
                icc.from_tags(*part.value[:2], self.grey)
                if part.kind == "colour tags"
                else icc.from_gamma(*part.value, self.grey)
            )
            if result.icc is None:
                self._lose(part, "no colour profile is known for it")
        # A profile beside tags that come first: PNG keeps both, elsewhere the tags decide.
        beside = result.first("icc")
        if part.kind == "colour tags" and beside is not None and self.format == "png":
            result.icc = beside.data

    def _convert(self, thumbnail: bytes | None) -> None:
        """What goes into EXIF and XMP from other kinds of tags."""
        if self.format not in ("png", "gif"):
            self._into_exif()
        if self.format not in ("jpeg", "tiff", "png") and self.result.iim:
            self._into_xmp(xmp.from_iim(iptc.texts(self.result.iim)), self.result.all("iptc"))
        if self.format != "png":
            captions = [part for part in self.result.all("caption text") if part.value.name in _CAPTIONS]
            self._into_xmp([(*_CAPTIONS[part.value.name], [part.value.text]) for part in captions], captions)
        if self.format == "gif":
            named = [part for part in self.result.all("caption text") if part.value.name in ("Comment", "parameters")]
            self._into_xmp([(xmp.EXIF, "UserComment", "alt", ["\n".join(p.value.text for p in named)])] if named else [], named)
        old = self.result.first("thumbnail")
        if old is not None:
            made = exif_.with_thumbnail(self.result.exif or exif_.amended(None, {}, {}), thumbnail) if thumbnail else None
            if made and (self.format != "jpeg" or len(made) + 6 <= _MARKER):
                self.result.exif = made
            else:
                for part in self.result.all("thumbnail"):
                    self._lose(part, "it shows the picture before")

    def _into_exif(self) -> None:
        result, first, details = self.result, {}, {}
        if (part := result.first("time of change")) is not None and len(part.data) == 7:
            year, rest = int.from_bytes(part.data[:2], "big"), part.data[2:]
            first[0x0132] = text_entry("{:04}:{:02}:{:02} {:02}:{:02}:{:02}".format(year, *rest))
        if self.format in ("webp", "avif") and (part := result.first("density")) is not None:
            for tag, value in ((0x011A, part.value.x), (0x011B, part.value.y)):
                first[tag] = Entry(5, 1, _rational(value * 0.0254))
            first[0x0128] = Entry(3, 1, b"\2\0")
        named = [p for p in result.all("caption text") if p.value.name in ("Comment", "parameters")]
        comments = named + (result.all("comment") if self.format != "jpeg" else [])
        if comments:
            text = "\n".join(part.data.decode("utf-8", "replace") for part in comments)
            details[exif_.USER_COMMENT] = _user_comment(text, (result.exif or b"II")[:2])
            if result.exif and exif_.has_user_comment(result.exif):
                del details[exif_.USER_COMMENT]
                self._into_xmp([(xmp.EXIF, "UserComment", "alt", [text])], comments)
        if not (first or details):
            return
        made = exif_.amended(result.exif, first, details)
        if self.format == "jpeg" and len(made) + 6 > _MARKER:
            for part in (*comments, *filter(None, [result.first("time of change")])):
                self._lose(part, "larger than a JPEG marker")
        else:
            result.exif = made

    def _into_xmp(self, properties: Sequence[xmp.Property], parts: Iterable[Part]) -> None:
        if not properties:
            return
        made = xmp.added(self.result.xmp, properties)
        if made is None:
            for part in list(parts):
                self._lose(part, "the XMP that is there is no XML")
        else:
            self.result.xmp = made


def _rational(value: float) -> bytes:
    whole = abs(value - round(value)) < 1e-3
    number, scale = (round(value), 1) if whole else (round(value * 1000), 1000)
    return number.to_bytes(4, "little") + scale.to_bytes(4, "little")


def _user_comment(text: str, order: bytes) -> Entry:
    if text.isascii():
        data = b"ASCII\0\0\0" + text.encode()
    else:
        data = b"UNICODE\0" + text.encode("utf-16-be" if order == b"MM" else "utf-16-le", "replace")
    return Entry(7, len(data), data)


def turned(part: Part, data: bytes) -> Part:
    """The part with other data of its own kind."""
    return replace(part, data=data, size=None)
