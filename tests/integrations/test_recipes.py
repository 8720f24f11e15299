"""The recipes of docs/integrations.md, run as they stand there."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs/integrations.md"


def recipe(name):
    return re.search(rf"<!-- recipe: {name} -->\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def opencv(monkeypatch):
    """OpenCV's reader and window, over two frames in memory: BGR, as OpenCV's are."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    left, shown = list(frames), []

    class VideoCapture:
        def __init__(self, path):
            pass

        def read(self):
            return (True, left.pop(0)) if left else (False, None)

    module = types.ModuleType("cv2")
    module.VideoCapture, module.waitKey = VideoCapture, lambda wait: -1
    module.imshow = lambda window, picture: shown.append(picture)
    monkeypatch.setitem(sys.modules, "cv2", module)
    return frames, shown


def test_the_opencv_loop_keeps_the_order_of_channels(opencv):
    from ebr_engine import Restorer

    frames, shown = opencv
    exec(recipe("opencv"), {})
    assert len(shown) == 2
    for frame, restored in zip(frames, shown):
        assert (restored.dtype, restored.shape) == (np.uint8, frame.shape)
        assert restored.flags.c_contiguous  # OpenCV takes no other
    rgb = Restorer("mini").restore(frames[0][..., ::-1].copy(), task="haze")
    np.testing.assert_array_equal(shown[0], rgb[..., ::-1])


def test_frames_in_order_are_restored_as_one_clip():
    from ebr_engine import Restorer

    pictures = np.random.default_rng(0).random((3, 16, 24, 3), dtype=np.float32)
    scope = {"pictures": pictures}
    exec(recipe("frames"), scope)
    assert len(scope["clean"]) == 3
    alone = Restorer("mini").restore(pictures[1], task="haze", steps=2, supersample=1)
    np.testing.assert_allclose(scope["clean"][1], alone, atol=2e-3)
