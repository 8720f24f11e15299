"""From an upload to a file of a job: what it is, its content says; its name is for people only and never becomes a path."""

import shutil
from pathlib import Path
from typing import IO, Any

from ebr_engine.errors import EbrError
from ebr_engine.jobs.sheet import FIELDS as SHEET
from ebr_engine.media.decoding import MediaError, check_size, missing, reader_of, vips
from ebr_engine.media.encoding import SUFFIXES
from ebr_engine.media.holdings.images import parts_of
from ebr_engine.media.holdings.parts import Window
from ebr_engine.media.images import is_animation, size_of_image
from ebr_engine.media.kinds import is_clip, picture_kind, video_kind, written_name
from ebr_engine.media.video import video_suffixes
from ebr_engine.request import CLIP, FIELDS, FILE, PLAN, RUN, RestoreRequest, names_of
from ebr_engine.serve.settings import Settings

# Fields that name files of the server, reach into FFmpeg, or ask for a second output.
CLOSED = ("prompt", "encoder", "as_clip", "compare")
ASKABLE = tuple(name for name in names_of(PLAN, RUN, CLIP, FILE) if name not in CLOSED)
MOST_STEPS = 200
MOST_PAGES = 200
_SUFFIX = {"jpeg": ".jpg", "tiff": ".tif"}  # of a kind whose name is not its suffix


def request_of(values: Any, task_needed: bool = True) -> dict[str, Any]:
    """A client's JSON as the values of a `RestoreRequest`, checked; `EbrError` for what it may not ask for, or not have."""
    if not isinstance(values, dict):
        raise EbrError("the request has to be a JSON object of names and values")
    for name in values:
        if name in FIELDS and name not in ASKABLE:
            why = "is the server's own to set" if name not in CLOSED else "cannot be asked for over the network"
            raise EbrError(f"{name} {why}; what can be: {', '.join(ASKABLE)}")
    request = RestoreRequest.from_json(values)
    if (request.steps or 0) > MOST_STEPS:
        raise EbrError(f"steps can be at most {MOST_STEPS} here, got {request.steps}")
    if task_needed and request.task is None:
        raise EbrError("say what to repair by a task, or auto")
    return request.to_json()


def sheet_request_of(values: Any) -> dict[str, Any]:
    """A client's JSON for a sheet, checked: of a request only what a sheet goes by."""
    if isinstance(values, dict) and (other := [name for name in values if name not in SHEET]):
        raise EbrError(f"{other[0]} has no meaning for a sheet; what can be asked for: {', '.join(SHEET)}")
    return request_of(values, task_needed=False)


def take(content: IO[bytes], name: str, folder: Path, number: int, settings: Settings) -> Path:
    """Write an upload into a folder under a name of ours, and look at it: `EbrError` for what cannot be restored here.

    Sizes come from headers; nothing is decoded. Errors speak of `name`.
    """
    raw = folder / f"{number}"
    with raw.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
    own = folder / f"{number:04}" / f"source{_suffix_of(raw, name)}"
    own.parent.mkdir(mode=0o700)
    raw.replace(own)
    try:
        _check_clip(own, settings) if is_clip(own) else _check_picture(own, settings)
    except EbrError as error:
        raise EbrError(str(error).replace(str(own), name)) from None
    return own


def target_suffix(source: Path, wanted: str | None) -> str:
    """The suffix of the restored form: the `wanted` format's, or the source's own where that can be written."""
    if not wanted:
        return written_name(source, Path(source.name)).suffix
    suffix = f".{wanted.lower().lstrip('.')}"
    known = video_suffixes(writable=True) if is_clip(source) else SUFFIXES
    if is_animation(source):
        known = (*known, *video_suffixes(writable=True))
    if suffix not in known:
        raise EbrError(f"the format {wanted[:20]!r} is not written for this kind of file; choose from {' '.join(known)}")
    return suffix


def shown_name(name: str | None, number: int) -> str:
    """A client's name of a file, for people: no folders, nothing that a terminal would obey."""
    plain = "".join(letter for letter in (name or "").replace("\\", "/").rpartition("/")[2] if letter.isprintable())
    return plain[:200] or f"file {number + 1}"


def _suffix_of(path: Path, name: str) -> str:
    if not path.stat().st_size:
        raise EbrError(f"{name}: the file is empty")
    if kind := picture_kind(path):
        if not reader_of(kind):
            raise EbrError(f"{name}: {missing(kind)}")
        return _SUFFIX.get(kind, f".{kind}")
    if suffix := video_kind(path):
        return suffix
    raise EbrError(f"{name}: is no picture or clip of a kind that is taken here")


def _check_picture(path: Path, settings: Settings) -> None:
    kind = picture_kind(path)
    if reader_of(kind) != "libvips":  # its own reader looks at the size before it decodes
        return
    height, width = size_of_image(path)
    check_size(path, width, height, settings.megapixels)
    if kind == "tiff":
        check_size(path, _pixels_of_pages(path), 1, settings.megapixels)
        return
    with Window(path) as window:
        frames = next((part.value for part in parts_of(window, kind, light=True) if part.kind == "animation"), 1)
    _check_frames(path, frames, settings)


def _pixels_of_pages(path: Path) -> int:
    """Of all pages together, from their headers."""
    library = vips()
    try:
        first = library.Image.new_from_file(str(path))
        count = first.get("n-pages") if first.get_typeof("n-pages") else 1
        if count > MOST_PAGES:
            raise MediaError(f"{path}: has {count} pages, more than the limit of {MOST_PAGES}")
        pages = [library.Image.new_from_file(str(path), page=page) for page in range(count)]
    except library.Error as error:
        raise MediaError(f"{path}: its pages cannot be read") from error
    return sum(page.width * page.height for page in pages)


def _check_clip(path: Path, settings: Settings) -> None:
    from ebr_engine.media.video.container import first_video, open_container

    container = open_container(path)
    try:
        stream = first_video(path, container)
        check_size(path, stream.codec_context.width, stream.codec_context.height, settings.megapixels)
        frames = stream.frames
        if not frames and container.duration and stream.average_rate:
            frames = round(container.duration / 1e6 * stream.average_rate)
        _check_frames(path, frames or 0, settings)
    finally:
        container.close()


def _check_frames(path: Path, frames: Any, settings: Settings) -> None:
    if isinstance(frames, int) and frames > settings.frames:
        raise MediaError(f"{path}: has {frames} frames, more than the limit of {settings.frames}")
