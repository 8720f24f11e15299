"""Frames that agree along the motion between them."""

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from ebr_engine.errors import EbrError  # noqa: E402
from ebr_engine.media import motion  # noqa: E402
from ebr_engine.media.motion import agreed, median  # noqa: E402


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture [H, W, 3] with edges enough to be followed."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // 6 + 2, width // 6 + 2, 3), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def panned(frames: int = 7, height: int = 72, width: int = 96, step: int = 2) -> np.ndarray:
    """A clip [F, H, W, 3] that moves to the left by `step` pixels a frame."""
    scene = texture(height, width + step * frames)
    return np.stack([scene[:, i * step : i * step + width] for i in range(frames)])


def spotted(clean: np.ndarray, seed: int = 1) -> np.ndarray:
    """The clip with bright spots that are elsewhere in every frame."""
    rng = np.random.default_rng(seed)
    frames = clean.copy()
    for frame in frames:
        for y, x in zip(rng.integers(2, frame.shape[0] - 2, 40), rng.integers(2, frame.shape[1] - 2, 40)):
            frame[y - 1 : y + 2, x - 1 : x + 2] = 1
    return frames


def error(frames: np.ndarray, clean: np.ndarray) -> float:
    return float(np.square(frames - clean).mean()) ** 0.5


@pytest.mark.parametrize("step", [0, 2])
def test_what_one_frame_alone_shows_goes(step):
    clean = panned(step=step)
    dirty = spotted(clean)
    assert error(agreed(dirty, 3), clean) < 0.4 * error(dirty, clean)


def test_a_wider_window_helps():
    clean = panned()
    dirty = spotted(clean)
    assert error(agreed(dirty, 3), clean) < error(agreed(dirty, 1), clean)


def test_a_clean_clip_is_hardly_changed():
    clean = panned()
    assert error(agreed(clean, 3), clean) < 0.004


def test_what_comes_into_sight_is_kept():
    clean = np.repeat(texture(72, 96)[None], 7, 0)
    clean[4:, 20:50, 30:70] = texture(30, 40, 5) * 0.5  # something that stays once it has come
    result = agreed(clean, 3)
    assert error(result[5:, 20:50, 30:70], clean[5:, 20:50, 30:70]) < 0.03


@pytest.mark.parametrize("shape", [(1, 40, 50, 3), (5, 23, 80, 3), (5, 80, 9, 3)])
def test_too_little_to_follow_stays_as_it_is(shape):
    frames = np.random.default_rng(0).random(shape, dtype=np.float32)
    assert np.array_equal(agreed(frames, 3), frames)


@pytest.mark.parametrize("shape", [(2, 24, 24, 3), (3, 37, 101, 3), (4, 65, 33, 3)])
def test_odd_sizes(shape):
    frames = np.random.default_rng(0).random(shape, dtype=np.float32)
    result = agreed(frames, 5)
    assert result.shape == frames.shape
    assert result.dtype == np.float32
    assert result.min() >= 0
    assert result.max() <= 1


def test_black_frames_stay_black():
    frames = np.zeros((4, 32, 48, 3), np.float32)
    assert np.array_equal(agreed(frames, 2), frames)


def test_the_median_leaves_out_what_is_missing():
    values = np.array([[1, 2, np.nan, 5], [4, np.nan, np.nan, 1], [3, 8, 7, 2]], np.float32)
    assert median(values).tolist() == [3, 5, 7, 2]
    assert np.array_equal(median(values), np.nanmedian(values, 0).astype(np.float32))


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(EbrError, match=r"ebr-engine\[clips\]"):
        motion.agreed(panned(), 2)
