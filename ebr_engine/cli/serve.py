"""`ebr-engine serve`: restore files over the network, from a page and from programs."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli.options import named, takes
from ebr_engine.errors import EbrError
from ebr_engine.request import LOAD, RestoreRequest, names_of

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@takes(*names_of(LOAD))
def serve(
    *,
    host: Annotated[
        str, named("Server", "--host NAME", "Where to listen; beyond this machine --token-file is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, named("Server", "--port N", "The port.", min=1, max=65535)] = 7860,
    token_file: Annotated[Path | None, named("Server", "--token-file FILE", "Holds the word that clients have to show.")] = None,
    store: Annotated[
        Path | None, named("Server", "--store FOLDER", "Jobs and their files.", show_default="in the user's cache folder")
    ] = None,
    store_size: Annotated[str, named("Server", "--store-size SIZE", "Of all files; the oldest finished ones go first.")] = "20G",
    keep: Annotated[float, named("Server", "--keep HOURS", "After which a finished job's files go.", min=0)] = 24,
    max_upload: Annotated[str, named("Server", "--max-upload SIZE", "Of one request.")] = "2G",
    max_megapixels: Annotated[float, named("Server", "--max-megapixels X", "Of a picture or a frame.", min=0.01)] = 100,
    max_frames: Annotated[int, named("Server", "--max-frames N", "Of a clip.", min=1)] = 20_000,
    queue: Annotated[int, named("Server", "--queue N", "Jobs that may wait; more are told to come again.", min=1)] = 64,
    request: RestoreRequest,
) -> None:
    """Restore files from a page in the browser, by OpenAI's image and video endpoints, and by our own; see docs/serve.md.

    What has been accepted survives a restart. Ctrl-C and SIGTERM finish the current step and keep the queue.

    [bold]ebr-engine serve[/]

    [bold]ebr-engine serve --host 0.0.0.0 --token-file token.txt --backbone wan --fp8[/]
    """
    from ebr_engine import settings as environment
    from ebr_engine.serve.settings import Settings, read_token

    settings = Settings(
        store=(store or environment.cache_dir() / "serve").expanduser(),
        host=host,
        port=port,
        token=read_token(token_file.expanduser()) if token_file else None,
        queue=queue,
        upload_bytes=_bytes("--max-upload", max_upload),
        megapixels=max_megapixels,
        frames=max_frames,
        store_bytes=_bytes("--store-size", store_size),
        keep_seconds=keep * 3600,
    )
    from ebr_engine.serve import app  # before the model is loaded: a missing extra is told at once

    from ebr_engine.engine.restorer import Restorer  # isort: skip

    restorer = Restorer.from_request(request)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"{request.backbone} is loaded; listening on http://{shown}:{port}, files in {settings.store}", err=True)
    app.serve(settings, restorer)


def _bytes(option: str, text: str) -> int:
    """The bytes of a size such as 20G; `EbrError` for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise EbrError(f"{option} {text}: a size is written like 500M or 20G")
    return int(float(match[1]) * UNITS[match[2].upper()])
