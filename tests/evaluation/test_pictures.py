"""Pictures of the worst files are readable, made once, and of those files."""

import numpy as np
import pytest
import torch

from ebr_engine.evaluation.paired import pair_folders
from ebr_engine.evaluation.pictures import readable, sheet, write_sheets
from ebr_engine.evaluation.run import Measurer, Restoring, Settings
from ebr_engine.media.images import read_image, write_image
from ebr_engine.request import RestoreRequest


@pytest.mark.parametrize(("size", "expected"), [((10, 16), (160, 256)), ((300, 400), (300, 400)), ((1280, 640), (640, 320))])
def test_a_picture_is_shown_at_a_size_that_can_be_looked_at(size, expected):
    assert readable(torch.rand(3, *size)).shape == (*expected, 3)


def test_small_pictures_keep_their_pixels():
    picture = torch.rand(3, 32, 64)
    assert torch.equal(torch.from_numpy(readable(picture))[::4, ::4].permute(2, 0, 1), picture)


def test_a_sheet_is_one_row():
    one = sheet({"input": torch.rand(3, 256, 256)})
    assert sheet(dict.fromkeys(("input", "restored", "target"), torch.rand(3, 256, 256))).shape[1] == 3 * one.shape[1]


@pytest.fixture
def items(tmp_path):
    for i, role in enumerate(("in", "gt")):
        (tmp_path / role).mkdir()
        for name in "abc":
            write_image(tmp_path / role / f"{name}.png", np.full((16, 24, 3), 0.3 + i / 3, np.float32))
    return pair_folders(tmp_path / "in", tmp_path / "gt", None)


def test_sheets_are_made_once_and_the_old_ones_go(items, tmp_path):
    settings = Settings("native", ("psnr",), Restoring(RestoreRequest(task="haze", steps=1, precision="fp32")))
    made = []

    def measurer():
        made.append(1)
        return Measurer(settings, "cpu")

    files = write_sheets(tmp_path / "worst", items, ["a", "b"], "settings", measurer)
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == sorted(files.values())
    frames = Measurer(settings, "cpu").first_frames(items[0])
    assert list(frames) == ["input", "empty prompt", "restored", "target"]
    shown = read_image(tmp_path / "worst" / files["a"]).pixels
    np.testing.assert_allclose(shown, sheet(frames), atol=1 / 255)
    assert write_sheets(tmp_path / "worst", items, ["b", "a"], "settings", measurer) == {"b": files["b"], "a": files["a"]}
    assert len(made) == 2
    assert list(write_sheets(tmp_path / "worst", items, ["b"], "settings", measurer)) == ["b"]
    assert [path.name for path in (tmp_path / "worst").iterdir()] == [files["b"]]
    assert write_sheets(tmp_path / "worst", items, ["b"], "others", measurer) != {"b": files["b"]}
