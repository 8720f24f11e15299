"""What a file is by its content, and under which name its restored form is written."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ebr_engine.media import PICTURES, SOUND
from ebr_engine.media.decoding import missing, reader_of
from ebr_engine.media.encoding import SUFFIXES
from ebr_engine.media.holdings.images import kind_of
from ebr_engine.media.holdings.parts import Window
from ebr_engine.media.holdings.sound import sound_kind
from ebr_engine.media.sound import SUFFIXES as SOUND_SUFFIXES
from ebr_engine.media.video import video_suffixes

ANIMATED = (".gif", ".png", ".webp")  # the formats of pictures that hold animations too
_WRITTEN_AS = {"jpeg": ".jpg", "tiff": ".tif", "bmp": ".png", "heic": ".png", "jxl": ".png"}  # other kinds go by their name
_SOUND = (".m4a", ".m4b", ".m4r", ".mka", ".wma", ".aac", ".oga", ".f4a")  # containers of videos that hold none
_RAW = (".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw", ".x3f")
_CODED = (".aac", ".aif", ".aiff", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wma")
_SHOWN = 8  # kinds of files that a line names


def picture_kind(path: Path) -> str | None:
    """The kind of a picture by content: "png", "jpeg" …; None for what is none, or cannot be read."""
    return kind_of(_head(path))


def video_kind(path: Path) -> str | None:
    """The container of a video by content, as the suffix that it is written under; None for what is none."""
    head = _head(path)
    if kind_of(head) or path.suffix.lower() in _SOUND:
        return None
    if head[4:8] == b"ftyp":
        return ".mov" if head[8:12] == b"qt  " else None if head[8:11] in (b"M4A", b"M4B") else ".mp4"
    if head[4:8] in (b"moov", b"mdat", b"wide") and head[:3] != b"GIF":
        return ".mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return ".webm" if b"webm" in head else ".mkv"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return ".avi"
    if head.startswith((b"0&\xb2u\x8ef\xcf\x11", b"FLV\x01")):
        return ".mkv"
    return ".mpg" if head.startswith(b"\0\0\1\xba") else None


def is_sound(path: Path) -> bool:
    """Whether a file is sound in a format that is restored: by its content, or by its name where that is nothing else."""
    head = _head(path)
    if path.suffix.lower() in SOUND_SUFFIXES:
        return kind_of(head) is None and video_kind(path) is None
    return sound_kind(head) is not None


def _head(path: Path) -> bytes:
    if not path.is_file():  # opening a FIFO would wait for ever
        return b""
    try:
        with Window(path) as window:
            return window.at(0, 48)
    except OSError:
        return b""


def is_clip(path: Path) -> bool:
    """Whether a file is a video: by its content where that tells, else by its name."""
    if path.suffix.lower() in video_suffixes():
        return picture_kind(path) is None
    return path.suffix.lower() not in SUFFIXES and video_kind(path) is not None


def reason_to_leave(path: Path, medium: str = PICTURES) -> str | None:
    """Why a file of a folder is no input: "" for another kind, or what is missing to read it; None where it is one.

    `medium`: what inputs are, pictures and clips or sound. A file whose name says that it is an input is one; if it is none, its
    own error says so.
    """
    if medium == SOUND:
        if path.suffix.lower() in _CODED:
            return "of sound, WAV and FLAC are restored"
        return None if is_sound(path) else ""
    if path.suffix.lower() in (*SUFFIXES, *video_suffixes()):
        return None
    if path.suffix.lower() in _RAW:  # TIFF by their first bytes, but with a small picture in front of the sensor's values
        return "cameras' raw pictures are not developed here"
    if kind := picture_kind(path):
        return None if reader_of(kind) else missing(kind)
    return None if video_kind(path) else ""


def written_name(source: Path, name: Path) -> Path:
    """The name of a source's restored form: `name`, with the suffix of what is written where it has another one."""
    suffix = name.suffix.lower()
    if is_sound(source):
        with source.open("rb") as file:
            kind = sound_kind(file.read(12))
        return name if suffix in SOUND_SUFFIXES or kind is None else name.with_name(f"{name.name}.{kind}")
    if is_clip(source):
        ours = suffix in video_suffixes()  # one that cannot be written is refused by its name
        return name if ours else name.with_name(name.name + (video_kind(source) or ".mkv"))
    if suffix in SUFFIXES or source.is_dir():
        return name
    kind = picture_kind(source)
    return name.with_name(name.name + _WRITTEN_AS.get(kind, f".{kind}")) if kind else name


def left_out_line(left_out: Sequence[tuple[Path, str]]) -> str | None:
    """What a folder's run tells of the files that are no inputs: how many of which suffix, and what would read them."""
    if not left_out:
        return None
    counts = Counter(path.suffix.lower()[1:] or "no suffix" for path, _ in left_out)
    named = ", ".join(f"{suffix} {count}" for suffix, count in counts.most_common(_SHOWN))
    more = ", …" if len(counts) > _SHOWN else ""
    why = "".join(f"; {reason}" for reason in sorted({reason for _, reason in left_out if reason}))
    files = "1 file of another kind" if len(left_out) == 1 else f"{len(left_out)} files of other kinds"
    return f"{files} left out ({named}{more}){why}"
