"""Which encoder and pixel format a clip is written with where nobody says: those that keep most of the source."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.video.colour import Layout, layout_of
from ebr_engine.media.video.info import VideoInfo, pyav

CONTAINERS = {  # FFmpeg's muxers by suffix
    ".mp4": "mp4",
    ".mkv": "matroska",
    ".mov": "mov",
    ".webm": "webm",
    ".avi": "avi",
    ".m4v": "mp4",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
    ".ts": "mpegts",
    ".m2ts": "mpegts",
    ".mts": "mpegts",
}
CRF = {"libx264": 17, "libx264rgb": 17, "libx265": 18, "libvpx-vp9": 20, "libsvtav1": 20, "libaom-av1": 20}  # good quality
MATCH_SOURCE = (  # encoders for editors and archives, which are given what the source holds
    *("ffv1", "prores_ks", "prores", "prores_aw", "dnxhd", "qtrle"),
    *("huffyuv", "ffvhuff", "utvideo", "mjpeg", "rawvideo", "v210"),
)
_STAY = {  # codecs of editors and archives that stay what they are: FFmpeg's name → encoder, and the containers that hold it
    "prores": ("prores_ks", ("mov", "matroska")),
    "dnxhd": ("dnxhd", ("mov",)),
    "ffv1": ("ffv1", ("matroska", "avi")),
    "huffyuv": ("huffyuv", ("avi",)),
    "ffvhuff": ("ffvhuff", ("avi",)),
    "utvideo": ("utvideo", ("avi",)),
    "qtrle": ("qtrle", ("mov",)),
    "v210": ("v210", ("mov", "avi")),
}
_LOSSLESS = (  # other codecs that lose nothing, which are not written
    *(
        "rawvideo",
        "png",
        "dpx",
        "exr",
        "tiff",
        "r210",
        "r10k",
        "v308",
        "v408",
        "v410",
        "y41p",
        "zlib",
        "cllc",
        "fraps",
        "lagarith",
    ),
    *("magicyuv", "sheervideo", "flashsv", "zmbv", "tscc", "cscd", "msrle", "8bps"),
)
_PRORES = {  # FFmpeg's name of a profile: the encoder's
    **{"Proxy": "proxy", "LT": "lt", "Standard": "standard", "HQ": "hq", "4444": "4444", "XQ": "4444xq", "4444 XQ": "4444xq"},
}
_NAMES = {
    **{"prores": "ProRes", "dnxhd": "DNxHD", "ffv1": "FFV1", "qtrle": "QuickTime Animation", "v210": "uncompressed video"},
    **{"huffyuv": "HuffYUV", "ffvhuff": "HuffYUV", "utvideo": "Ut Video"},
}


@dataclass(frozen=True)
class Choice:
    """An encoder, options of its own, and what to tell of it."""

    encoder: str
    options: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def choose_encoder(container: str, info: VideoInfo, pix_fmt: str | None = None, crf: float | None = None) -> Choice:
    """The encoder for a source in a container (FFmpeg's name): the source's own codec where it is an editor's or archive's,
    one with alpha where the source has it, else H.264 for 8 bit and HEVC for more; in this order the first that takes what
    is asked for."""
    plain = _delivery(container, replace(info, pix_fmt="yuv420p" if info.bits == 8 else "yuv420p10le"))
    wanted = _delivery(container, info)
    choices = [wanted, plain]
    if info.codec in _STAY and container in _STAY[info.codec][1]:
        encoder = _STAY[info.codec][0]
        choices.insert(0, Choice(encoder, _profile(encoder, info)))
    if pix_fmt is not None or crf is not None:
        return next((each for each in choices if _fits(each.encoder, pix_fmt, crf)), plain)
    return replace(choices[0], note=_told(choices[0].encoder, container, info))


def _fits(encoder: str, pix_fmt: str | None, crf: float | None) -> bool:
    from av.codec import Codec

    offered = [each.name for each in Codec(encoder, "w").video_formats or []]
    return (pix_fmt is None or pix_fmt in offered) and (crf is None or encoder in CRF)


def _told(encoder: str, container: str, info: VideoInfo) -> str:
    """What a codec for editors or archives becomes where it does not stay what it is."""
    if info.pictures or encoder in MATCH_SOURCE:
        return ""
    if info.codec in _LOSSLESS:
        return f"its lossless video is written by {encoder}; --codec ffv1 in an .mkv keeps every value"
    if info.codec not in _STAY:
        return ""
    name, place = _NAMES.get(info.codec, info.codec), {"mpegts": "TS", "mpeg": "MPEG"}.get(container, container)
    holders = " or ".join({"matroska": ".mkv"}.get(each, f".{each}") for each in _STAY[info.codec][1])
    return f"{name} does not fit into {place}: written by {encoder}; {holders} keeps it"


def _delivery(container: str, info: VideoInfo) -> Choice:
    if info.alpha and container == "webm":
        return Choice("libvpx-vp9")
    if info.alpha and container == "matroska":
        return Choice("libvpx-vp9" if info.bits == 8 else "ffv1")
    if info.alpha and container == "mov":
        return Choice("prores_ks", {"profile": "4444"})
    if container == "webm":
        return Choice("libvpx-vp9" if info.bits == 8 else "libsvtav1")
    if container == "mpeg":
        return Choice("mpeg2video")
    if info.bits > 8:
        return Choice("libx264" if container == "avi" else "libx265")  # AVI does not hold HEVC
    rgb = layout_of(pyav().VideoFormat(info.pix_fmt)).rgb and not info.pictures
    return Choice("libx264rgb" if rgb else "libx264")


def _profile(encoder: str, info: VideoInfo) -> dict[str, str]:
    layout = layout_of(pyav().VideoFormat(info.pix_fmt))
    if encoder == "prores_ks":
        return {"profile": _PRORES.get(info.profile, "4444" if layout.shifts == (0, 0) else "hq")}
    if encoder == "dnxhd":
        return {"profile": "dnxhr_444" if layout.shifts == (0, 0) else "dnxhr_hqx" if layout.bits > 8 else "dnxhr_hq"}
    return {}


def choose_format(path, encoder, info: VideoInfo, size: tuple[int, int], wanted: str | None) -> tuple[str, list[str]]:
    """The pixel format that an av.Codec gets for pictures of (height, width), and what of the source it loses, to tell.

    That is `wanted` if given, else the encoder's nearest to the source; pictures become 4:2:0, which every player shows.
    MediaError for one that does not exist or fit.
    """
    av = pyav()
    offered = {f.name: f for f in encoder.video_formats or [] if f.components}  # else one on a graphics card
    odd = size[0] % 2 or size[1] % 2
    shown = f"{size[1]} x {size[0]} pixels"
    if wanted is not None:
        try:
            layout = layout_of(av.VideoFormat(wanted))
        except ValueError as error:
            raise MediaError(f"unknown pixel format {wanted!r}") from error
        if offered and wanted not in offered:
            raise MediaError(f"{encoder.name} does not take {wanted}; choose from {' '.join(sorted(offered))}")
        if odd and any(layout.shifts):
            raise MediaError(f"{path}: {wanted} needs even sides, and {shown} are not; use a 4:4:4 format")
        return wanted, []
    source = layout_of(av.VideoFormat(info.pix_fmt))
    notes, target = [], source
    if encoder.name not in MATCH_SOURCE and (info.pictures or source.grey):
        depth = 8 if info.bits == 8 else 10 if info.pictures or info.alpha else min(12, info.bits)
        target = layout_of(av.VideoFormat(f"yuv{'a' if info.alpha else ''}420p{'' if depth == 8 else f'{depth}le'}"))
    if odd and any(target.shifts):
        ending = "" if target.bits == 8 else f"{target.bits}le"
        target = layout_of(av.VideoFormat(f"yuv{'a' if target.alpha else ''}444p{ending}"))
        notes.append(f"{path}: {shown} are odd, so it is written as 4:4:4, which some players cannot show")
    if not offered:
        return target.name, notes
    layouts = {name: layout_of(f) for name, f in offered.items()}
    fitting = [name for name, layout in layouts.items() if not (odd and any(layout.shifts))]
    if not fitting:
        raise MediaError(f"{path}: {encoder.name} needs even sides, and {shown} are not")
    ordered = sorted(fitting, key=lambda name: _distance(layouts[name], target, name))
    chosen = next((name for name in ordered if not layouts[name].alpha or _takes(encoder, name, size)), ordered[0])
    if info.codec and (lost := _lost(source, layouts[chosen])):
        finer = min(fitting, key=lambda name: _distance(layouts[name], source, name))
        better = not layouts[finer].alpha and layouts[finer] != layouts[chosen] and not _lost(source, layouts[finer])
        way = f"--pix-fmt {finer}" if better else "--codec ffv1 in an .mkv"
        notes.append(f"{path}: {' and '.join(lost)}; {way} keeps {'it' if len(lost) == 1 else 'both'}")
    return chosen, notes


def _takes(encoder, name: str, size: tuple[int, int]) -> bool:
    """Whether an encoder takes a format that it offers; libvpx-vp9 and libx265 offer alpha that they then refuse."""
    av = pyav()
    context = av.CodecContext.create(encoder.name, "w")
    context.height, context.width = size
    context.pix_fmt, context.time_base, context.framerate = name, Fraction(1, 25), Fraction(25)
    if encoder.name == "libx265":
        context.options = {"x265-params": "log-level=none"}
    elif encoder.name == "libvpx":
        context.options = {"auto-alt-ref": "0"}
    try:
        context.open()
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def _lost(source: Layout, written: Layout) -> list[str]:
    """What of the source's numbers a layout cannot hold, in words."""
    lost = []
    if written.bits < source.bits:
        lost.append(f"its {source.bits} bit are written as {written.bits}")
    if not source.grey and any(a > b for a, b in zip(written.shifts, source.shifts)):
        lost.append(f"its colour is written at a lower resolution ({_subsampling(written)})")
    return lost


def _subsampling(layout: Layout) -> str:
    return next((f"4:{n[1]}:{n[2]}" for n in ("444", "422", "420", "440", "411", "410") if n in layout.name), "4:4:4")


def _distance(layout: Layout, target: Layout, name: str) -> tuple:
    """How much worse than a target a pixel format is: lost depth, colour model, alpha, lost chroma, then what is wasted."""
    coarser = sum(max(0, a - b) for a, b in zip(layout.shifts, target.shifts))
    finer = sum(max(0, b - a) for a, b in zip(layout.shifts, target.shifts))
    lost, spare = max(0, target.bits - layout.bits), max(0, layout.bits - target.bits)
    model = layout.grey and not target.grey, target.alpha and not layout.alpha
    full = "yuvj" in name  # FFmpeg's old way to say "full range", which is told apart from the format now
    return lost, *model, coarser, layout.rgb != target.rgb, spare, finer, layout.alpha, full, name != layout.name
