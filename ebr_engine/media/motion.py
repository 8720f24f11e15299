"""Frames that agree: each is made of what its neighbours show at the same place of the scene, along the motion between them.

A model that restores frame by frame guesses anew in every frame, and leaves other rests of rain or snow in each. What belongs
to the scene is in most frames, what does not is in few: the median along the motion keeps the first and drops the second. The
motion is dense optical flow (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016, by OpenCV). Where it
does not come back to where it began, as where something comes into sight, a neighbour has no say.
"""

from importlib.util import find_spec
from typing import Any

import numpy as np

from ebr_engine.errors import EbrError

ROUNDS = 2  # the second finds the motion in what the first has made
LEAST = 24  # pixels a side: in smaller frames no motion is looked for
PATCH, STRIDE = 12, 6  # pixels that are looked for together, and between them; OpenCV's own 8 and 3 take drops for the scene
STRAY = 2.0  # pixels by which motion forth and back may differ
TAILS = (0.5, 99.5)  # percentiles of brightness that motion is looked for between
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # Rec. 709


def agreed(frames: np.ndarray, reach: int, rounds: int = ROUNDS) -> np.ndarray:
    """Successive frames [F, H, W, 3] of one scene, float32 in [0, 1], each as it and `reach` frames on either side have it.

    Frames at the ends have fewer neighbours; a single frame, and frames of less than 24 pixels a side, stay as they are.
    Raises `EbrError` where OpenCV is missing.
    """
    if len(frames) < 2 or reach < 1 or min(frames.shape[1:3]) < LEAST:
        return frames
    result = frames
    for _ in range(rounds):
        motion = Motion(result)
        result = np.stack([merged(motion, frames, i, reach) for i in range(len(frames))])
    return result


def available() -> bool:
    """Whether OpenCV is installed."""
    return find_spec("cv2") is not None


def opencv() -> Any:
    """OpenCV; `EbrError` where it is missing."""
    try:
        import cv2
    except ImportError as error:
        raise EbrError(
            "frames agree by OpenCV's optical flow: pip install 'ebr-engine[clips]', or restore them one by one with "
            "--temporal-window 0"
        ) from error
    return cv2


class Motion:
    """The motion between the frames [F, H, W, 3] of a clip, found when it is asked for and kept until `forget`."""

    def __init__(self, frames: np.ndarray):
        self.cv2 = opencv()
        luma = frames @ LUMA
        low, high = np.percentile(luma[:, ::4, ::4], TAILS)
        self.grey = np.clip((luma - low) * (255 / max(high - low, 1e-3)), 0, 255).astype(np.uint8)
        y, x = np.mgrid[: luma.shape[1], : luma.shape[2]].astype(np.float32)
        self.grid = np.stack((x, y), -1)
        self.search = self.cv2.DISOpticalFlow_create(self.cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.search.setPatchSize(PATCH)
        self.search.setPatchStride(STRIDE)
        self.found: dict[tuple[int, int], np.ndarray] = {}

    def places(self, one: int, other: int) -> np.ndarray:
        """Where each pixel of a frame lies in another one, [H, W, 2] x and y."""
        if (one, other) not in self.found:
            self.found[one, other] = self.grid + self.search.calc(self.grey[one], self.grey[other], None)
        return self.found[one, other]

    def sure(self, one: int, other: int) -> np.ndarray:
        """Where that is inside the picture, and the way back leads to where it began, [H, W] bool."""
        there, back = self.places(one, other), self.places(other, one)
        height, width = self.grid.shape[:2]
        inside = ((there >= 0) & (there <= (width - 1, height - 1))).all(-1)
        return inside & (np.square(self.taken(back, there) - self.grid).sum(-1) <= STRAY**2)

    def taken(self, picture: np.ndarray, places: np.ndarray, cubic: bool = False) -> np.ndarray:
        """What a picture [H, W, C] float32 shows at places [H, W, 2]."""
        how = self.cv2.INTER_CUBIC if cubic else self.cv2.INTER_LINEAR
        return self.cv2.remap(picture, places, None, how, borderMode=self.cv2.BORDER_REPLICATE)

    def forget(self, last: int) -> None:
        """Leave out what is between frames up to the last one."""
        self.found = {pair: places for pair, places in self.found.items() if max(pair) > last}


def merged(motion: Motion, frames: np.ndarray, index: int, reach: int) -> np.ndarray:
    """A frame [H, W, 3] as the median of what it and its neighbours show, where they are sure. Indices have to rise."""
    shown = [frames[index]]
    for other in range(max(0, index - reach), min(len(frames), index + reach + 1)):
        if other != index:
            neighbour = motion.taken(frames[other], motion.places(index, other), cubic=True)
            neighbour[~motion.sure(index, other)] = np.nan
            shown.append(neighbour)
    motion.forget(index)
    return np.clip(median(np.stack(shown)), 0, 1)


def median(pictures: np.ndarray) -> np.ndarray:
    """The median of pictures [N, ...] without what is NaN; of an even number, the mean of the middle two."""
    count = pictures.shape[0] - np.isnan(pictures).sum(0)
    ordered = np.sort(pictures, axis=0)  # NaN comes last
    low, high = (np.take_along_axis(ordered, index[None], 0)[0] for index in ((count - 1) // 2, count // 2))
    return (low + high) / 2
