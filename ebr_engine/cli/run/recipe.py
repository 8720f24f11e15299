"""How the files of one task are restored and written: what the command line asks for, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ebr_engine.errors import EbrError

if TYPE_CHECKING:
    from ebr_engine.cli.run.auto import AutoTask


@dataclass(frozen=True)
class ClipOptions:
    """How clips are read, cut into chunks and written; None leaves a choice to the backbone or the encoder."""

    start: float | None = None  # seconds
    frames: int | None = None
    chunk_frames: int | None = None
    chunk_overlap: int | None = None
    deinterlace: bool = False
    codec: str | None = None
    pix_fmt: str | None = None
    crf: float | None = None
    encoder: tuple[str, ...] = ()  # KEY=VALUE each
    copy_audio: bool = True
    copy_subtitles: bool = True
    fps: float = 24  # of a folder of frames

    @property
    def encoder_options(self) -> dict[str, str]:
        """The encoder's options as a dict; `EbrError` for one that is not KEY=VALUE."""
        pairs = [text.partition("=") for text in self.encoder]
        if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
            raise EbrError(f"-e {wrong[0]}: an encoder option is written KEY=VALUE")
        return {key: value for key, _, value in pairs}


@dataclass(frozen=True)
class Recipe:
    """How the files of one task are restored and written."""

    run: Mapping[str, Any]  # what `Restorer.restore` and `run` take beside pixels: plan, seed, tile, tile_overlap
    quality: int | None = None  # None: a JPEG's own, and lossless where the source is
    strict: bool = False  # what an output does not keep of its input fails it
    size: tuple[int, int] | None = None  # height and width to restore at; None is each picture's own
    clips: ClipOptions = field(default_factory=ClipOptions)
    settings: str = ""  # a digest of all that decides what the outputs look like: by it a later run knows its own work
    keep_parts: bool = False  # of clips, so that a later run goes on in the middle
    colour_fix: str | None = None  # of `media.colour_fix`; None is the one for what auto chooses, or none
    compare: str = "side"  # of `media.compare`: how input and output are put together
    auto: "AutoTask | None" = None  # chooses the plan for each file, which `run` then lacks
    note: str = ""  # told of every file
