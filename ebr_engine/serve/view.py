"""Pictures and clips for a browser to show; what is downloaded is never made from these."""

from pathlib import Path

from fastapi.responses import FileResponse, Response

from ebr_engine.media.decoding import MediaError, vips
from ebr_engine.media.kinds import is_clip

SIDE = 2048  # of a picture that is shown
_AS_IT_IS = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}


def view_of(path: Path) -> Response:
    """A clip or animation as it is, with ranges; any other picture as WebP in sRGB, upright, not larger than it needs to be.

    Raises `MediaError` for a picture that cannot be shown.
    """
    if is_clip(path) or path.suffix == ".gif":
        return FileResponse(path, media_type=_AS_IT_IS.get(path.suffix, "application/octet-stream"))
    library = vips()
    try:
        small = library.Image.thumbnail(str(path), SIDE, height=SIDE, size="down", output_profile="srgb")
        return Response(small.write_to_buffer(".webp", Q=92), media_type="image/webp")
    except library.Error as error:
        raise MediaError("this picture cannot be shown; its restored file can be downloaded") from error
