"""What has been made of a clip so far, kept beside its output until that is whole, so that a killed run goes on there.

A part holds frames as the encoder got them, bit for bit: encoding them again, from the first, gives the file that a run
without a break gives, byte for byte. The latest tail, restored frames that the next chunk has yet to fade out, lies beside
them in float32. A part is written when its work took ten seconds, so a short clip has none. On the disk they take what
the clip takes unpacked (at 4:2:0 in 8 bit 1.5 bytes a pixel), in memory not more than `MOST_BYTES`.
"""

import base64
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ebr_engine.media.video.info import Frame, pyav

PARTS = ".parts"  # the end of their folder's name
SECONDS = 10.0  # of work in a part
MOST_BYTES = 256_000_000  # in memory before a part is written
_LEAST_FREE = 2  # times what all parts will take


class Parts:
    """The parts of one output. `chunks` of them, and their frames, are there from an earlier run with the same `key`.

    `expected` frames, where the number is known, tell beforehand whether the disk has room for all. Where it has not, or
    turns out to be full, no parts are kept, and `warnings` says so.
    """

    def __init__(self, target: Path, key: str, expected: int | None = None) -> None:
        self.folder = _folder_of(target)
        self.warnings: list[str] = []
        self.chunks = self.frames = 0
        self._target, self._key, self._expected = target, key, expected
        self._kept = True
        self._files: list[Path] = []
        self._tail: Path | None = None
        self._find()
        self._forget()

    def stored(self, width: int, height: int, pixel_format: str, time_base: Fraction) -> Iterator[tuple[Any, Frame]]:
        """The frames of the earlier run, for the encoder, in order, with their times and without their pixels."""
        for file in self._files:
            head, body = self._load(file) or ({"frames": []}, b"")
            at = 0
            for pts, duration, *messages in head["frames"]:
                picture = pyav().VideoFrame(width, height, pixel_format)
                for plane, (rows, stride) in zip(picture.planes, head["planes"]):
                    stored = np.frombuffer(body, np.uint8, rows * stride, at).reshape(rows, stride)
                    own = np.frombuffer(plane, np.uint8).reshape(rows, -1)
                    both = min(stride, own.shape[1])  # what a row holds beyond the picture may differ
                    own[:, :both] = stored[:, :both]
                    at += rows * stride
                yield picture, Frame(_NO_PIXELS, pts, time_base, duration, messages=_decoded(*messages))

    def tail(self, time_base: Fraction) -> list[Frame]:
        """Restored frames of the earlier run that its last chunk held back."""
        if self._tail is None:
            return []
        head, body = self._load(self._tail)
        channels = np.frombuffer(body, np.float32).reshape(head["shape"])
        frames = []
        for picture, (pts, duration, *messages) in zip(channels, head["frames"]):
            alpha = picture[..., 3] if picture.shape[-1] == 4 else None
            frames.append(Frame(picture[..., :3], pts, time_base, duration, alpha=alpha, messages=_decoded(*messages)))
        return frames

    def add(self, picture: Any, frame: Frame) -> None:
        """A frame that the encoder has got."""
        if not self._kept:
            return
        if not self._planes:
            self._planes = [[plane.height, plane.line_size] for plane in picture.planes]
            size = sum(rows * stride for rows, stride in self._planes) * ((self._expected or 0) - self.frames)
            if size * _LEAST_FREE > (free := shutil.disk_usage(self._target.parent).free):
                self._give_up(f"they would take {size / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free")
                return
        self._bodies += [bytes(plane)[: rows * stride] for plane, (rows, stride) in zip(picture.planes, self._planes)]
        self._times.append(_times(frame))

    def settle(self, chunks: int, tail: Sequence[Frame]) -> None:
        """All frames of so many chunks have been added, but for `tail`; writes a part if there is enough for one."""
        waiting = sum(map(len, self._bodies))
        if not self._times or (time.monotonic() - self._since < SECONDS and waiting < MOST_BYTES):
            return
        number = len(self._files)
        try:
            self.folder.mkdir(exist_ok=True)
            file, behind = (self.folder / f"{kind}-{number:06}" for kind in ("part", "tail"))
            if tail:
                pixels = [_channels(frame) for frame in tail]
                head = {"frames": [_times(frame) for frame in tail], "shape": [len(tail), *pixels[0].shape]}
                self._save(behind, head, pixels)
            head = {"chunks": chunks, "frames": self._times, "planes": self._planes, "tail": len(tail)}
            self._save(file, head, self._bodies)
            if self._tail is not None:
                self._tail.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return
        self._files.append(file)
        self._tail = behind if tail else None
        self._forget()

    def remove(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _forget(self) -> None:
        self._bodies: list[bytes] = []
        self._times: list[list] = []
        self._planes: list[list[int]] = []
        self._since = time.monotonic()

    def _give_up(self, reason: str) -> None:
        self.remove()
        self._forget()
        self._kept = False
        self.warnings.append(f"{self._target}: its parts are not kept, so that a run that is killed starts over: {reason}")

    def _find(self) -> None:
        """Whole parts without a gap, up to the last one whose tail is there; anything else is deleted."""
        counts = []
        while (found := self._load(self.folder / f"part-{len(counts):06}")) is not None:
            counts.append((found[0]["chunks"], len(found[0]["frames"]), found[0]["tail"]))
        while counts:
            number = len(counts) - 1
            behind = self.folder / f"tail-{number:06}"
            if not counts[-1][2] or self._load(behind) is not None:
                self._files = [self.folder / f"part-{i:06}" for i in range(len(counts))]
                self._tail = behind if counts[-1][2] else None
                break
            counts.pop()
        self.chunks = counts[-1][0] if counts else 0
        self.frames = sum(frames for _, frames, _ in counts)
        if not counts:
            self.remove()
            return
        for path in self.folder.iterdir():
            if path not in (*self._files, self._tail):
                path.unlink(missing_ok=True)

    def _save(self, path: Path, head: dict, bodies: Iterable[Any]) -> None:
        first = json.dumps(head | {"key": self._key}).encode()
        check = hashlib.blake2b(first)
        for body in bodies:
            check.update(body)
        unfinished = path.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            file.writelines([first, b"\n", check.hexdigest().encode(), b"\n", *bodies])
        os.replace(unfinished, path)

    def _load(self, path: Path) -> tuple[dict, bytes] | None:
        """Head and body of a file that is whole and of this key."""
        try:
            first, stated, body = path.read_bytes().split(b"\n", 2)
            check = hashlib.blake2b(first)
            check.update(body)
            head = json.loads(first)
            return (head, body) if check.hexdigest().encode() == stated and head["key"] == self._key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def forget_finished(target: Path) -> None:
    """Delete the parts of an output that is whole: of a run that was killed after it had given the output its name."""
    folder = _folder_of(target)
    try:
        finished = target.stat().st_mtime_ns
        if target.is_file() and all(path.stat().st_mtime_ns <= finished for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # no output, or no parts
        return


def _folder_of(target: Path) -> Path:
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]  # a long name leaves no room for an addition
    return target.with_name(f".ebr-{name}{PARTS}")


def _times(frame: Frame) -> list:
    """When a frame is shown, and the messages that came with it."""
    messages = {kind: base64.b64encode(data).decode() for kind, data in frame.messages.items()}
    return [frame.pts, frame.duration, *([messages] if messages else [])]


def _decoded(messages: Mapping[str, str] = MappingProxyType({})) -> dict[str, bytes]:
    return {kind: base64.b64decode(data) for kind, data in messages.items()}


def _channels(frame: Frame) -> np.ndarray:
    """[H, W, 3 or 4]: a frame's pixels and, where it has one, its alpha."""
    channels = [frame.pixels] if frame.alpha is None else [frame.pixels, frame.alpha[..., None]]
    return np.ascontiguousarray(np.concatenate(channels, axis=2, dtype=np.float32))  # a tensor's frames are views of its planes


_NO_PIXELS = np.empty((0, 0, 3), np.float32)
