"""What becomes of a clip's holdings, by output format: containers, and the formats that frames are written in.

What lies in the coded pictures also depends on the encoder: `clip_outcomes` knows which.
"""

from collections.abc import Iterable

from ebr_engine.media.holdings.types import Fate, FateTable, Holding, Outcome

CONTAINERS = ("mp4", "mov", "mkv", "webm", "avi", "mpg", "ts")
FRAMES = ("png", "tiff", "jpeg", "webp", "avif")
_QUICKTIME, _MATROSKA = ("mp4", "mov"), ("mkv", "webm")
_DEFAULT_CODECS = {"webm": "vp9", "mpg": "mpeg2video"}  # else H.264 or HEVC, which are alike here

MESSAGES = {  # in the coded pictures: codecs (by FFmpeg's names) that carry them
    "captions": ("h264", "hevc", "mpeg2video", "av1"),
    "active format": ("h264", "hevc", "mpeg2video"),
    "user data": ("h264", "hevc"),
}
LIGHT = ("mastering display", "light level")
LIGHT_CODECS = ("h264", "hevc", "av1")  # whose encoders write them; elsewhere a box of MP4 or MOV does
ALPHA_CODECS = ("vp8", "vp9", "prores", "ffv1", "qtrle", "utvideo", "png")
_IN_STREAM = (Fate.KEPT, "in the coded pictures")
_BESIDE = (Fate.KEPT, "copied")
_NO_FRAMES = (Fate.NOT_KEPT, "pictures have no place for it")
_OLD = (Fate.NOT_KEPT, "it was made for the old pictures")


def _row(default: tuple[Fate, str], **by_format: tuple[Fate, str]) -> dict[str, tuple[Fate, str]]:
    """Fates by format: `default` for all containers, pictures have no place, but for what is named."""
    return {name: by_format.get(name, default) for name in CONTAINERS} | {
        name: by_format.get(name, by_format.get("frames", _NO_FRAMES)) for name in FRAMES
    }


def _only(formats: Iterable[str], fate: tuple[Fate, str], else_: str) -> dict[str, tuple[Fate, str]]:
    return _row((Fate.NOT_KEPT, else_), **dict.fromkeys(formats, fate))


_NO_PLACE = "the container has no place for it"

VIDEO_FATES: FateTable = {
    "sound": _row((Fate.KEPT, "copied; told where its codec does not fit")),
    "subtitles": _row((Fate.KEPT, "copied; told where they do not fit")),
    "chapters": _only(("mp4", "mov", "mkv", "webm"), (Fate.KEPT, "copied"), _NO_PLACE),
    "attachment": _only(("mkv",), _BESIDE, _NO_PLACE),
    "cover picture": _only((), _BESIDE, "only the first video is restored"),
    "second video": _only((), _BESIDE, "only the first video is restored"),
    "data track": _only((), _BESIDE, "its maker's own form"),
    "vendor data": _only((), _BESIDE, "its maker's own form"),
    "tags": _only((*_QUICKTIME, *_MATROSKA), _BESIDE, "not all have a place"),
    "phone tags": _only((*_QUICKTIME, *_MATROSKA), _BESIDE, _NO_PLACE),
    "creation time": _only((*_QUICKTIME, *_MATROSKA), _BESIDE, _NO_PLACE),
    "timecode": _row(
        (Fate.NOT_KEPT, _NO_PLACE),
        **dict.fromkeys(_QUICKTIME, (Fate.KEPT, "a timecode track")),
        **dict.fromkeys(_MATROSKA, (Fate.CONVERTED, "a tag")),
    ),
    "timecode message": _row(
        (Fate.NOT_KEPT, _NO_PLACE),
        **dict.fromkeys(_QUICKTIME, (Fate.CONVERTED, "a timecode track")),
        **dict.fromkeys(_MATROSKA, (Fate.CONVERTED, "a tag")),
    ),
    "captions": _row(_IN_STREAM, webm=(Fate.NOT_KEPT, "VP9 has no place for it")),
    "active format": _row(_IN_STREAM, webm=(Fate.NOT_KEPT, "VP9 has no place for it")),
    "user data": _row(
        _IN_STREAM, webm=(Fate.NOT_KEPT, "VP9 has no place for it"), mpg=(Fate.NOT_KEPT, "MPEG-2 has no place for it")
    ),
    "mastering display": _row(_IN_STREAM, png=(Fate.KEPT, "mDCV"), mpg=(Fate.NOT_KEPT, "MPEG-2 has no place for it")),
    "light level": _row(_IN_STREAM, png=(Fate.KEPT, "cLLI"), mpg=(Fate.NOT_KEPT, "MPEG-2 has no place for it")),
    "ambient light": _only((), _BESIDE, "no encoder here writes it"),
    "registered message": _only((), _BESIDE, "of an unknown kind"),
    "HDR10+": _row(_OLD, frames=_OLD),
    "HDR Vivid": _row(_OLD, frames=_OLD),
    "Dolby Vision": _row((Fate.NOT_KEPT, "its base layer is"), frames=(Fate.NOT_KEPT, "its base layer is")),
    "enhancement layer": _row(_OLD, frames=_OLD),
    "second layer": _only((), _BESIDE, "only the first view is restored"),
    "spherical": _only(_QUICKTIME, (Fate.KEPT, "the same boxes"), _NO_PLACE),
    "stereo": _row(
        (Fate.NOT_KEPT, _NO_PLACE),
        **dict.fromkeys(_QUICKTIME, (Fate.KEPT, "a box")),
        **dict.fromkeys(_MATROSKA, (Fate.KEPT, "StereoMode")),
    ),
    "cropping": _row((Fate.NOT_KEPT, "the whole picture is restored"), frames=(Fate.NOT_KEPT, "the whole picture is restored")),
    "pixel aspect": _row(
        (Fate.KEPT, "the same"),
        png=(Fate.KEPT, "pHYs"),
        frames=(Fate.NOT_KEPT, "only PNG says it; the pixels are as they were"),
    ),
    "colour tags": _row(
        (Fate.KEPT, "the same"), png=(Fate.KEPT, "cICP"), frames=(Fate.NOT_KEPT, "only PNG says it; the values are as they were")
    ),
    "frame times": _row(
        (Fate.KEPT, "the same"),
        avi=(Fate.NOT_KEPT, "its rate is constant"),
        mpg=(Fate.NOT_KEPT, "its rate is constant"),
        frames=(Fate.CONVERTED, "a timestamps file beside the frames"),
    ),
    "edit list": _row(
        (Fate.CONVERTED, "only what it shows is restored"), frames=(Fate.CONVERTED, "only what it shows is restored")
    ),
    "alpha": {
        **_only(("mov", "mkv", "webm"), (Fate.KEPT, "ProRes 4444, FFV1 or VP9"), "H.264 has none; write .webm or .mov"),
        "png": (Fate.KEPT, ""),
    },
}


def clip_outcomes(holdings: Iterable[Holding], format: str, codec: str | None = None) -> list[Outcome]:
    """What becomes of each holding of a clip in an output of `format`, coded by `codec` (FFmpeg's name) where it is known."""
    return [Outcome(each, *_fate(each.kind, format, codec or _DEFAULT_CODECS.get(format, "h264"))) for each in holdings]


def _fate(kind: str, format: str, codec: str) -> tuple[Fate, str]:
    fate = VIDEO_FATES.get(kind, {}).get(format, (Fate.NOT_KEPT, "not known how to keep it"))
    if format not in CONTAINERS:
        return fate
    if kind in MESSAGES:
        return _IN_STREAM if codec in MESSAGES[kind] else (Fate.NOT_KEPT, f"{codec} has no place for it")
    if kind in LIGHT and codec not in LIGHT_CODECS:
        return (Fate.KEPT, "a box") if format in _QUICKTIME else (Fate.NOT_KEPT, f"{codec} has no place for it")
    if kind == "alpha" and codec not in ALPHA_CODECS:
        return Fate.NOT_KEPT, f"{codec} has none; write .webm or .mov"
    return fate
