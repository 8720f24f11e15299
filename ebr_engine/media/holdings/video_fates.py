"""What becomes of a clip's holdings, by output format: containers, and the formats that frames are written in.

What lies in the coded pictures also depends on the encoder: `clip_outcomes` knows which.
"""

from collections.abc import Iterable

from ebr_engine.media.holdings.image_fates import IMAGE_FATES
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


def _containers(default: tuple[Fate, str], **by_format: tuple[Fate, str]) -> dict[str, tuple[Fate, str]]:
    """Fates by container; for pictures their own table says it."""
    return {name: by_format.get(name, default) for name in CONTAINERS}


def _only(formats: Iterable[str], fate: tuple[Fate, str], else_: str) -> dict[str, tuple[Fate, str]]:
    return _row((Fate.NOT_KEPT, else_), **dict.fromkeys(formats, fate))


_NO_PLACE = "the container has no place for it"

_CLIPS: FateTable = {
    "sound": _row((Fate.KEPT, "copied; told where its codec does not fit")),
    "subtitles": _row((Fate.KEPT, "copied; told where they do not fit")),
    "chapters": _only(("mp4", "mov", "mkv", "webm"), (Fate.KEPT, "copied"), _NO_PLACE),
    "attachment": _only(("mkv",), _BESIDE, _NO_PLACE),
    "cover picture": _only(("mp4", "mkv"), (Fate.KEPT, "as it was"), _NO_PLACE),
    "second video": _only((), _BESIDE, "only the first video is restored"),
    "data track": _only((), _BESIDE, "its maker's own form"),
    "GPMF track": _only(_QUICKTIME, _BESIDE, _NO_PLACE),
    "KLV track": _only(("ts",), _BESIDE, _NO_PLACE),
    "vendor data": _only((), _BESIDE, "its maker's own form"),
    "tags": _only((*_QUICKTIME, *_MATROSKA, "avi"), _BESIDE, _NO_PLACE),
    "own tags": _only((*_QUICKTIME, *_MATROSKA), _BESIDE, _NO_PLACE),
    "stream tags": _only(_MATROSKA, _BESIDE, _NO_PLACE),
    "xmp": _containers((Fate.NOT_KEPT, _NO_PLACE), **dict.fromkeys(_QUICKTIME, (Fate.KEPT, "a box"))),
    "icc": _containers((Fate.NOT_KEPT, "the colour tags say what its stream's are")),
    "phone tags": _only((*_QUICKTIME, *_MATROSKA), _BESIDE, _NO_PLACE),
    "creation time": _only((*_QUICKTIME, *_MATROSKA), _BESIDE, _NO_PLACE),
    "timecode": _row(
        (Fate.NOT_KEPT, _NO_PLACE),
        **dict.fromkeys(_QUICKTIME, (Fate.KEPT, "a timecode track")),
        **dict.fromkeys(_MATROSKA, (Fate.CONVERTED, "a tag")),
        mpg=(Fate.CONVERTED, "in its groups of pictures"),
    ),
    "timecode message": _row(
        (Fate.NOT_KEPT, _NO_PLACE),
        **dict.fromkeys(_QUICKTIME, (Fate.CONVERTED, "a timecode track")),
        **dict.fromkeys(_MATROSKA, (Fate.CONVERTED, "a tag")),
        mpg=(Fate.CONVERTED, "in its groups of pictures"),
    ),
    "captions": _row(_IN_STREAM, webm=(Fate.NOT_KEPT, "VP9 has no place for it")),
    "active format": _row(_IN_STREAM, webm=(Fate.NOT_KEPT, "VP9 has no place for it")),
    "user data": _row(
        _IN_STREAM, webm=(Fate.NOT_KEPT, "VP9 has no place for it"), mpg=(Fate.NOT_KEPT, "MPEG-2 has no place for it")
    ),
    "mastering display": _containers(_IN_STREAM, mpg=(Fate.NOT_KEPT, "MPEG-2 has no place for it")),
    "light level": _containers(_IN_STREAM, mpg=(Fate.NOT_KEPT, "MPEG-2 has no place for it")),
    "ambient light": _only((), _BESIDE, "no encoder here writes it"),
    "registered message": _only((), _BESIDE, "of an unknown kind"),
    "HDR10+": _row(_OLD, frames=_OLD),
    "HDR Vivid": _row(_OLD, frames=_OLD),
    "Dolby Vision": _row((Fate.NOT_KEPT, "its base layer is"), frames=(Fate.NOT_KEPT, "its base layer is")),
    "enhancement layer": _row(_OLD, frames=_OLD),
    "second layer": _only((), _BESIDE, "only the first view is restored"),
    "spherical": _row(
        (Fate.NOT_KEPT, _NO_PLACE),
        **dict.fromkeys(_QUICKTIME, (Fate.KEPT, "the same boxes")),
        **dict.fromkeys(_MATROSKA, (Fate.KEPT, "Projection")),
    ),
    "stereo view": _row(
        (Fate.NOT_KEPT, _NO_PLACE),
        **dict.fromkeys(_QUICKTIME, (Fate.KEPT, "a box")),
        **dict.fromkeys(_MATROSKA, (Fate.KEPT, "StereoMode")),
    ),
    "cropping": _row((Fate.NOT_KEPT, "the whole picture is restored"), frames=(Fate.NOT_KEPT, "the whole picture is restored")),
    "pixel aspect": _containers((Fate.KEPT, "the same")),
    "colour tags": _containers((Fate.KEPT, "the same")),
    "frame times": _row(
        (Fate.KEPT, "the same"),
        avi=(Fate.NOT_KEPT, "its rate is constant"),
        mpg=(Fate.NOT_KEPT, "its rate is constant"),
        frames=(Fate.CONVERTED, "a timestamps file beside the frames"),
    ),
    "edit list": _row(
        (Fate.CONVERTED, "only what it shows is restored"), frames=(Fate.CONVERTED, "only what it shows is restored")
    ),
    "alpha": _containers(
        (Fate.NOT_KEPT, "H.264 has none; write .webm or .mov"),
        mov=(Fate.KEPT, "ProRes 4444"),
        mkv=(Fate.KEPT, "VP9 or FFV1"),
        webm=(Fate.KEPT, "VP9"),
    )
    | dict.fromkeys(("png", "tiff", "webp", "avif"), (Fate.KEPT, ""))
    | {"jpeg": (Fate.NOT_KEPT, "refused where a pixel is not opaque")},
}

_NOT_OF_FRAMES = (Fate.NOT_KEPT, "a clip has no place for what each frame holds")
_SRGB = (Fate.CONVERTED, "to sRGB")
AS_CLIP = "clip"  # the column of pictures, or an animation, that become a clip: of their own holdings

_PICTURES_AS_CLIP = {
    **dict.fromkeys(IMAGE_FATES, _NOT_OF_FRAMES),
    **dict.fromkeys(("icc", "gamma", "sRGB", "CMYK or Lab profile", "second colour description"), _SRGB),
    **dict.fromkeys(("colour tags", "coded colour tags", "light level", "mastering display"), (Fate.KEPT, "the stream's")),
    "pixel aspect": (Fate.KEPT, "the stream's"),
    "animation": (Fate.KEPT, "the clip's frames and times"),
    "significant bits": (Fate.CONVERTED, "all bits are significant after restoring"),
    "palette hints": (Fate.CONVERTED, "there is no palette"),
    **dict.fromkeys(("16 bit", "10 or 12 bit"), (Fate.CONVERTED, "to the encoder's depth, told where that is less")),
    "lossless coding": (Fate.CONVERTED, "to a video codec, --crf 0 or --codec ffv1 for a lossless one"),
}

VIDEO_FATES: FateTable = {
    kind: {**_CLIPS.get(kind, {}), **({AS_CLIP: _PICTURES_AS_CLIP[kind]} if kind in _PICTURES_AS_CLIP else {})}
    for kind in {**_CLIPS, **_PICTURES_AS_CLIP}
}


def clip_outcomes(holdings: Iterable[Holding], format: str, codec: str | None = None) -> list[Outcome]:
    """What becomes of each holding of a clip in an output of `format`, coded by `codec` (FFmpeg's name) where it is known."""
    return [Outcome(each, *_fate(each.kind, format, codec or _DEFAULT_CODECS.get(format, "h264"))) for each in holdings]


def _fate(kind: str, format: str, codec: str) -> tuple[Fate, str]:
    fates = {**IMAGE_FATES.get(kind, {}), **VIDEO_FATES.get(kind, {})}
    fate = fates.get(format, (Fate.NOT_KEPT, "not known how to keep it"))
    if format not in CONTAINERS:
        return fate
    if kind in MESSAGES:
        return _IN_STREAM if codec in MESSAGES[kind] else (Fate.NOT_KEPT, f"{codec} has no place for it")
    if kind in LIGHT and codec not in LIGHT_CODECS:
        return (Fate.KEPT, "a box") if format in _QUICKTIME else (Fate.NOT_KEPT, f"{codec} has no place for it")
    if kind == "alpha" and codec not in ALPHA_CODECS:
        return Fate.NOT_KEPT, f"{codec} has none; write .webm or .mov"
    return fate
