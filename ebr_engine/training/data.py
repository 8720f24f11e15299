"""Samples to learn from: a pure function of (seed, number), so that the order of the data needs no state to be resumed.

Sample n is place n % N of epoch n // N; the epoch's order, the crop, the mirroring, the stride and a synthetic degradation
are drawn from generators seeded by what they are for. N processes that share the numbers see what one would.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import degrade, degrade_clip, seeds
from ebr_engine.media.images import check_opaque, opaque_pixels
from ebr_engine.media.kinds import is_clip
from ebr_engine.media.video import open_video
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.pairs import Pair, Problem, Source, find_pairs
from ebr_engine.training.scenes import ScenePool

log = logging.getLogger("ebr_engine")
SHOWN = 3  # problems told in one error


class BadDataError(EbrError):
    """A pair that must not be trained on."""


class Samples(Protocol):
    """What a learner learns from."""

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """Degraded and clean [3, F, H, W] float32 in [0, 1] of sample `number`."""


def seeded(*names: object) -> torch.Generator:
    """A CPU generator for what `names` say, such as (seed, "crop", 7); its seed is one of training."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % seeds("train").stop)


class SceneSamples:
    """Crops of procedural scenes, degraded by the task."""

    def __init__(self, config: LearnConfig, pool: ScenePool):
        self.config, self.pool = config, pool

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """See `Samples`."""
        generator = seeded(self.config.seed, "scene", number)
        clean, depth, _ = self.pool.crops(1, self.config.crop, generator)
        degraded = degrade(clean, self.config.task, generator, depth=depth)
        return degraded.movedim(0, 1), clean.movedim(0, 1)


@dataclass(frozen=True)
class View:
    """Which crop of a pair is taken, as numbers that need no look at the files: place is a random number modulo the choices."""

    moment: int
    top: int
    left: int
    stride: int
    mirrored: bool
    seed: tuple  # of a synthetic degradation


class PairSamples:
    """Crops of pairs; bad ones are refused or skipped by `config.bad_data`, always by name.

    `whole`: the middle crop of each pair, in order, for validation.
    """

    def __init__(self, config: LearnConfig, pairs: Sequence[Pair], whole: bool = False):
        self.config, self.pairs, self.whole = config, pairs, whole
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def order(self, epoch: int) -> list[int]:
        """The places of an epoch."""
        if self.whole:
            return list(range(len(self)))
        return torch.randperm(len(self), generator=seeded(self.config.seed, "order", epoch)).tolist()

    def choose(self, number: int) -> tuple[int, View]:
        """The pair and the view of sample `number`."""
        epoch, place = divmod(number, len(self))
        index = self.order(epoch)[place]
        return index, self.view(index, epoch % self.config.views if self.config.views else epoch)

    def view(self, index: int, number: int) -> View:
        """View `number` of pair `index`."""
        config = self.config
        generator = seeded(config.seed, "view", index, number)
        moment, top, left, stride, mirrored = torch.randint(0, 2**31, (5,), generator=generator).tolist()
        mirrored = config.flip and mirrored % 2 == 1 and not self.whole
        stride = 1 if self.whole else 1 + stride % config.stride
        return View(moment, top, left, stride, mirrored, (config.seed, "degradation", index, number))

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """See `Samples`; `EbrError` for a bad pair, or if all are bad where they are skipped."""
        index, view = self.choose(number)
        return self.first_good(index, lambda i: self.crops(self.pairs[i], view))

    def first_good(self, index: int, function):
        """`function(index)`, or of the pairs that follow while one is bad and bad ones are skipped."""
        for step in range(len(self)):
            i = (index + step) % len(self)
            if i in self.bad:
                continue
            try:
                return function(i)
            except BadDataError as error:
                if self.config.bad_data == "refuse":
                    raise
                self.bad[i] = str(error)
                log.warning("skipped: %s", error)
        raise EbrError(f"none of the {len(self)} pairs can be used; the first: {next(iter(self.bad.values()))}")

    def crops(self, pair: Pair, view: View) -> tuple[Tensor, Tensor]:
        """Degraded and clean crops of a pair; `BadDataError` that names the file for what cannot be used."""
        try:
            clean = self._read(pair.clean, view)
            degraded = None if pair.degraded is None else self._read(pair.degraded, view)
        except BadDataError:
            raise
        except (EbrError, OSError) as error:
            raise BadDataError(str(error)) from error
        if degraded is not None and degraded.shape != clean.shape:
            sizes = [f"{x.shape[0]} frame(s) of {x.shape[1]} x {x.shape[2]} pixels" for x in (degraded, clean)]
            raise BadDataError(f"{pair.degraded[0]} has {sizes[0]}, {pair.clean[0]} has {sizes[1]}")
        clean = self._cropped(pair, clean, view)
        if degraded is None:
            return self._degraded(clean, view), clean
        return self._cropped(pair, degraded, view), clean

    def _read(self, source: Source, view: View) -> np.ndarray:
        """The frames of a view, whole: [F, H, W, 3]."""
        count = self.config.frames
        if len(source) == 1 and not is_clip(source[0]):
            if count > 1:
                raise BadDataError(f"{source[0]} is a picture, where clips of {count} frames are learned from")
            return opaque_pixels(source[0])[None]
        span = (count - 1) * view.stride + 1
        if len(source) > 1:
            first = self._first(source, len(source), span, view)
            frames = [opaque_pixels(path) for path in source[first : first + span : view.stride]]
        else:
            with open_video(source[0]) as video:
                total, rate = video.info.expected_frames, video.info.fps
            first = self._first(source, total or span, span, view)
            with open_video(source[0], start=float(first / rate), frames=span) as video:
                read = list(video)[:: view.stride]
            for frame in read:
                check_opaque(source[0], frame.alpha)
            frames = [frame.pixels for frame in read]
        if len(frames) < count:
            raise BadDataError(f"{source[0]} ends {count - len(frames)} frame(s) too early")
        if len({frame.shape for frame in frames}) > 1:
            raise BadDataError(f"the frames from {source[0]} on are not of one size")
        return np.stack(frames)

    def _first(self, source: Source, total: int, span: int, view: View) -> int:
        if total < span:
            raise BadDataError(f"{source[0]} has {total} frames, fewer than the {span} to learn from")
        return (total - span) // 2 if self.whole else view.moment % (total - span + 1)

    def _cropped(self, pair: Pair, frames: np.ndarray, view: View) -> Tensor:
        """[F, H, W, 3] → the crop [3, F, h, w], mirrored or not."""
        (height, width), (h, w) = frames.shape[1:3], self.config.crop
        if height < h or width < w:
            raise BadDataError(f"{pair.clean[0]} has {height} x {width} pixels, less than a crop of {h} x {w}")
        if self.whole:
            top, left = (height - h) // 2, (width - w) // 2
        else:
            top, left = view.top % (height - h + 1), view.left % (width - w + 1)
        crop = frames[:, top : top + h, left : left + w]
        crop = torch.from_numpy((crop[:, :, ::-1] if view.mirrored else crop).copy()).permute(3, 0, 1, 2)
        if not crop.isfinite().all():
            raise BadDataError(f"{pair.clean[0]} or its degraded form holds values that are not finite")
        return crop.contiguous()

    def _degraded(self, clean: Tensor, view: View) -> Tensor:
        task, generator = self.config.task, seeded(*view.seed)
        strength = torch.rand((), generator=generator).item()
        frames = clean.transpose(0, 1).clamp(0, 1)
        return degrade_clip(frames, task, seeded(*view.seed, 0), strength=strength).transpose(0, 1)


def pair_samples(config: LearnConfig, data: str, whole: bool = False) -> PairSamples:
    """Samples of a folder or list; problems that show in the names are refused or told and skipped by `config.bad_data`."""
    pairs, problems = find_pairs(Path(data), config.frames, config.synthetic)
    if problems and config.bad_data == "refuse":
        raise EbrError(f"{_first_of(problems)}; mend it, or leave such out with --bad-data skip")
    for problem in problems:
        log.warning("skipped: %s", problem)
    return PairSamples(config, pairs, whole)


def _first_of(problems: Sequence[Problem]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(map(str, problems[:SHOWN])) + more
