"""What a writer does with all that its source holds beside the pixels; what it cannot keep is told in one line."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import not_kept_line
from ebr_engine.media.holdings.types import Fate, Holding, Outcome
from ebr_engine.media.holdings.video_fates import AS_CLIP, CONTAINERS, MESSAGES, clip_outcomes
from ebr_engine.media.video.messages import TIMECODE, carries

_ALPHA = "alpha"
_SEEN = (_ALPHA,)  # not believed of the container: many formats have transparency that no frame uses


class Fates:
    """The fates of a source's holdings in one output.

    `format` is a name in the table of fates; `source` has `holdings`, or is a bare VideoInfo; `codec` is that of the output,
    None for pictures; `left_out` are kinds that nobody wants. With `strict`, whatever is not kept is a MediaError, before
    the work where that is known.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        source,
        codec: str | None,
        alpha: bool,
        strict: bool = False,
        left_out: Collection[str] = (),
    ) -> None:
        self._path, self._codec, self._strict = path, codec, strict
        self._keeps_alpha = alpha
        (self._timecode,) = clip_outcomes([Holding("timecode message", "its frames")], format, codec)
        held = getattr(source, "holdings", [])
        pictures = source.info.pictures if hasattr(source, "info") else False
        found = [each for each in held if each.kind not in (*_SEEN, *left_out)]
        self.outcomes = clip_outcomes(found, AS_CLIP if pictures and format in CONTAINERS else format, codec)
        if not pictures and hasattr(source, "info") and not source.info.alpha:
            lost = [each for each in held if each.kind == _ALPHA]
            self.outcomes += [Outcome(each, Fate.NOT_KEPT, "there is no decoder for it here") for each in lost]
        self._check()

    def alpha(self, alpha: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
        """The alpha that is to be written, at (height, width); None where there is none or it cannot be kept."""
        if alpha is None or not self._keeps_alpha:
            if alpha is not None and alpha.min() < 1:
                self._lose(_ALPHA, "its frames", "written without it; .webm, .mov and .mkv keep it")
            return None
        if alpha.shape == size:
            return alpha
        from ebr_engine.media.images import resize_picture
        from ebr_engine.media.picture import Picture

        return resize_picture(Picture(np.repeat(alpha[..., None], 3, axis=2)), *size).pixels[..., 0]

    def messages(self, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        """Those of a frame's messages that the coded stream takes."""
        for kind in messages:
            if kind == TIMECODE and self._timecode.fate is Fate.NOT_KEPT:
                self._lose(self._timecode.holding.kind, "its frames", self._timecode.how)
            elif kind in MESSAGES and not (self._codec and carries(self._codec, kind)):
                self._lose(kind, "its frames", f"{self._codec or 'pictures'} has no place for it")
        return {kind: data for kind, data in messages.items() if self._codec and carries(self._codec, kind)}

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """What became of a frame's own holdings; each kind is told once."""
        known = {each.holding.kind for each in self.outcomes}
        new = {each.holding.kind: each for each in outcomes if each.holding.kind not in known}
        if new:
            self.outcomes += new.values()
            self._check()

    def lose_stream(self, index: int, why: str) -> None:
        """A stream of the source that the container does not take."""
        for at, each in enumerate(self.outcomes):
            if each.holding.where == f"stream {index}" and each.fate is not Fate.NOT_KEPT:
                self.outcomes[at] = Outcome(each.holding, Fate.NOT_KEPT, why)
        self._check()

    def lose_kinds(self, kinds: Collection[str], why: str) -> None:
        """What could not be put into the output after all."""
        for at, each in enumerate(self.outcomes):
            if each.holding.kind in kinds and each.fate is not Fate.NOT_KEPT:
                self.outcomes[at] = Outcome(each.holding, Fate.NOT_KEPT, why)
        self._check()

    def warnings(self) -> list[str]:
        """The one line that names everything that is not kept; nothing where all is."""
        line = not_kept_line(self.outcomes)
        return [f"{self._path}: {line}"] if line else []

    def _lose(self, kind: str, where: str, why: str) -> None:
        if not any(each.holding.kind == kind and each.fate is Fate.NOT_KEPT for each in self.outcomes):
            self.outcomes.append(Outcome(Holding(kind, where), Fate.NOT_KEPT, why))
            self._check()

    def _check(self) -> None:
        if self._strict and (line := not_kept_line(self.outcomes)):
            raise MediaError(f"{self._path}: not written: {line}")
