"""What becomes of a picture's holdings, by output format: the table that the writers keep to."""

from collections.abc import Sequence

from ebr_engine.media.holdings.types import Fate, FateTable

IMAGE_FORMATS = ("png", "jpeg", "webp", "tiff", "avif", "gif")

_Fates = dict[str, tuple[Fate, str]]


def _kept(formats: Sequence[str] = IMAGE_FORMATS, how: str = "") -> _Fates:
    return dict.fromkeys(formats, (Fate.KEPT, how))


def _converted(how: str, formats: Sequence[str] = IMAGE_FORMATS) -> _Fates:
    return dict.fromkeys(formats, (Fate.CONVERTED, how))


def _lost(why: str, formats: Sequence[str] = IMAGE_FORMATS) -> _Fates:
    return dict.fromkeys(formats, (Fate.NOT_KEPT, why))


_EQUAL = "to an equal colour profile"
_ONLY_JPEG = _lost("only JPEG holds it") | _kept(["jpeg"])
_DEEP = "8 bit a channel; .png, .tif and .avif keep more"

IMAGE_FATES: FateTable = {
    # Colour.
    "icc": _kept(),
    "CMYK or Lab profile": _converted("the picture is converted to sRGB"),
    "colour tags": _converted(_EQUAL) | _kept(["png", "avif"]),
    "coded colour tags": _converted("the colour profile says it"),
    "gamma": _converted(_EQUAL) | _kept(["png"]),
    "sRGB": _converted("sRGB is what is meant without") | _kept(["png", "avif"]),
    "second colour description": _converted("the first one counts") | _kept(["png"]),
    "light level": _lost("only PNG and AVIF hold it") | _kept(["png", "avif"]),
    "mastering display": _lost("only PNG and AVIF hold it") | _kept(["png", "avif"]),
    "viewing hints": _lost("cannot be written"),
    "16 bit": _kept() | _converted("to 12 bit", ["avif"]) | _lost(_DEEP, ["jpeg", "webp", "gif"]),
    "10 or 12 bit": _kept() | _converted("to 16 bit", ["png", "tiff"]) | _lost(_DEEP, ["jpeg", "webp", "gif"]),
    "partial transparency": _kept() | _lost("refused", ["jpeg"]) | _lost("a pixel of GIF is transparent or not", ["gif"]),
    "lossless coding": _kept() | _lost("the format is lossy", ["jpeg", "gif"]),
    # Descriptions.
    "exif": _kept() | _converted("to the page's tags", ["tiff"]) | _lost("GIF cannot hold it", ["gif"]),
    "xmp": _kept(),
    "iptc": _kept() | _converted("to XMP", ["webp", "avif", "gif"]),
    "photoshop resources": _kept() | _lost("only JPEG, TIFF and PNG hold them", ["webp", "avif", "gif"]),
    "comment": _converted("to EXIF's user comment") | _kept(["jpeg", "gif"]) | _converted("to a text named Comment", ["png"]),
    "caption text": _converted("to XMP") | _kept(["png"]),
    "text": _lost("only PNG has texts of any name") | _kept(["png"]),
    "plain text": _lost("GIF's drawn texts are not shown by programs"),
    "time of change": _converted("to EXIF's date and time") | _kept(["png"]) | _lost("GIF cannot hold it", ["gif"]),
    "density": _kept() | _converted("to EXIF's resolution", ["webp", "avif"]) | _lost("GIF cannot hold it", ["gif"]),
    "pixel aspect": _kept(["png", "jpeg", "tiff", "avif"]) | _lost("only PNG, JPEG, TIFF and AVIF hold it", ["webp", "gif"]),
    "background": _lost("only PNG holds it") | _kept(["png"]),
    "significant bits": _converted("all bits are significant after restoring"),
    "palette hints": _lost("the palette that they are of is not written"),
    "stereo": _lost("only PNG holds it") | _kept(["png"]),
    "provenance": _lost("its signature does not hold for another picture"),
    "private tags": _lost("only TIFF holds them") | _kept(["tiff"]),
    "application data": _ONLY_JPEG,
    "application extension": _lost("only GIF holds it") | _kept(["gif"]),
    "unknown chunk": _lost("only PNG holds it") | _kept(["png"]),
    "unsafe chunk": _lost("not known, and said to hold for this very picture only"),
    "unknown WebP chunk": _lost("only WebP holds it") | _kept(["webp"]),
    "unknown item": _lost("not known what it is"),
    # More pictures.
    "thumbnail": _converted("made anew", ["png", "jpeg", "webp", "avif"]) | _lost("it shows the picture before", ["tiff", "gif"]),
    "preview": _lost("it shows the picture before"),
    "gain map": _ONLY_JPEG,
    "HEIF gain map": _lost("cannot be read"),
    "motion clip": _lost("only JPEG holds it") | _kept(["jpeg"], "as it was, not restored"),
    "second picture": _lost("only JPEG holds it") | _kept(["jpeg"], "as it was, not restored"),
    "inner picture": _lost("cannot be written"),
    "pages": _lost("only the first one is written; .tif holds all") | _kept(["tiff"]),
    "animation": _lost("refused; .gif, .png, .webp and videos hold it") | _kept(["png", "webp", "gif"]),
    "data behind the picture": _lost("cannot stand there") | _kept(["png", "jpeg", "webp", "gif"], "as it was"),
    "damaged part": _lost("cannot be read"),
}
