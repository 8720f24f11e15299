"""Samples depend on the seed and their number alone, pairs stay aligned, and what is bad is named."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import TASKS, seeds
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.video import VideoInfo, write_video
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import BadDataError, PairSamples, SceneSamples, pair_samples, seeded

from .conftest import smooth

CONFIG = LearnConfig("fog", data="x", size=(32, 40), seed=5)


def samples(root, **settings):
    config = replace(CONFIG, **settings)
    return pair_samples(config, str(root))


def test_a_sample_is_a_function_of_seed_and_number(pairs):
    root = pairs()
    first, second, other = samples(root), samples(root), samples(root, seed=6)
    shuffled = [second.pixels(i) for i in (9, 2, 5)]
    for (degraded, clean), number in zip(shuffled, (9, 2, 5)):
        assert degraded.shape == clean.shape == (3, 1, 32, 40)
        assert torch.equal(first.pixels(number)[0], degraded)
        assert torch.equal(first.pixels(number)[1], clean)
    assert not all(torch.equal(first.pixels(i)[1], other.pixels(i)[1]) for i in range(3))


def test_an_epoch_meets_every_pair_once_in_an_order_of_its_own(pairs):
    data = samples(pairs(count=6))
    orders = [[data.choose(epoch * 6 + i)[0] for i in range(6)] for epoch in range(3)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_crops_of_a_pair_are_aligned_and_differ_from_epoch_to_epoch(pairs):
    data = samples(pairs(count=1))
    seen = []
    for number in range(8):
        degraded, clean = data.pixels(number)
        assert (degraded - clean * 0.4).abs().max() < 2 / 255  # 8-bit files
        seen.append(clean)
    assert len({crop.numpy().tobytes() for crop in seen}) == 8
    whole = torch.from_numpy(smooth(48, 56, 0)).permute(2, 0, 1)
    crop = seen[0][:, 0]
    found = any(
        torch.allclose(whole[:, y : y + 32, x : x + 40], side, atol=1 / 255)
        for y in range(17)
        for x in range(17)
        for side in (crop, crop.flip(-1))
    )
    assert found


def test_half_of_the_crops_are_mirrored_unless_told_otherwise(pairs):
    root = pairs(count=1, height=32, width=40)  # nothing to choose but the mirroring
    kinds = [{samples(root, flip=flip).pixels(i)[1].numpy().tobytes() for i in range(16)} for flip in (True, False)]
    assert [len(kind) for kind in kinds] == [2, 1]


def test_views_are_met_again(pairs):
    data = samples(pairs(count=2), views=2)
    first, second, third = ({data.choose(epoch * 2 + i) for i in range(2)} for epoch in range(3))
    assert first == third
    assert first != second


def test_validation_takes_the_middles_in_order(pairs):
    root = pairs(count=3)
    data = PairSamples(CONFIG, samples(root).pairs, whole=True)
    for i in range(3):
        middle = torch.from_numpy(smooth(48, 56, i)[8:40, 8:48]).permute(2, 0, 1)
        assert torch.allclose(data.pixels(i)[1][:, 0], middle, atol=1 / 255)


def clip(path, frames, shade=1.0, height=32, width=40):
    """A film whose frame i is of one grey that tells i."""
    with write_video(path, VideoInfo(width, height, Fraction(10), Fraction(1, 10)), crf=0) as video:
        for i in range(frames):
            video.write(np.full((height, width, 3), (i + 1) * 0.05 * shade, dtype=np.float32))
    return path


def test_frames_of_a_clip_follow_each_other_at_the_drawn_stride(tmp_path):
    for side, shade in (("input", 0.5), ("target", 1.0)):
        (tmp_path / side).mkdir()
        clip(tmp_path / side / "film.mp4", 12, shade)
        for i in range(12):
            (tmp_path / side / "street").mkdir(exist_ok=True)
            write_image(tmp_path / side / "street" / f"{i}.png", np.full((32, 40, 3), (i + 1) * 0.05 * shade, np.float32))
    data = samples(tmp_path, frames=5, backbone="wan", loss="velocity", stride=2)
    strides, starts = set(), set()
    for number in range(16):
        degraded, clean = data.pixels(number)
        assert clean.shape == (3, 5, 32, 40)
        levels = clean.mean(dim=(0, 2, 3)) / 0.05
        assert (degraded.mean(dim=(0, 2, 3)) - clean.mean(dim=(0, 2, 3)) / 2).abs().max() < 0.01
        steps = levels.diff().round()
        assert (levels.diff() - steps).abs().max() < 0.2
        assert len(set(steps.tolist())) == 1
        strides.add(int(steps[0]))
        starts.add(int(levels[0].round()))
    assert strides == {1, 2}
    assert len(starts) > 2
    frame = samples(tmp_path, frames=1).pixels(0)[1]  # single frames of the same clips
    assert frame.shape == (3, 1, 32, 40)


@pytest.mark.parametrize("task", TASKS)
def test_clean_media_are_degraded_on_the_fly(pairs, task):
    data = samples(pairs() / "target", task=task, synthetic=True)
    degraded, clean = data.pixels(3)
    assert degraded.shape == clean.shape
    assert (degraded - clean).abs().max() > 0.01
    assert torch.equal(data.pixels(3)[0], degraded)


def test_haze_lies_still_over_a_clip_and_rain_falls(tmp_path):
    (tmp_path / "street").mkdir()
    for i in range(3):
        write_image(tmp_path / "street" / f"{i}.png", smooth(32, 40, 1))
    for task, still in (("haze", True), ("rain", False)):
        data = samples(tmp_path, task=task, synthetic=True, frames=3, backbone="wan", loss="x0")
        degraded, _ = data.pixels(0)
        assert torch.equal(degraded[:, 0], degraded[:, 2]) == still


def break_it(root, how):
    target = root / "target" / "01.png"
    if how == "missing":
        target.unlink()
    elif how == "size":
        write_image(target, smooth(48, 64, 1))
    elif how == "damaged":
        target.write_bytes(target.read_bytes()[:200])
    elif how == "transparent":
        picture = read_image(target)
        alpha = np.ones(picture.pixels.shape[:2], np.float32)
        alpha[:4] = 0
        write_image(target, replace(picture, alpha=alpha))
    elif how == "small":
        for side in ("input", "target"):
            write_image(root / side / "01.png", smooth(24, 56, 1))
    return root


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "counterpart"),
        ("size", "48 x 64"),
        ("damaged", "damaged"),
        ("small", "24 x 56"),
        ("transparent", "transparent"),
    ],
)
def test_bad_pairs_are_refused_by_name_or_skipped(pairs, how, reason, caplog):
    root = break_it(pairs(), how)
    with pytest.raises(EbrError, match=r"01.*" + reason):
        [samples(root).pixels(i) for i in range(4)]
    data = samples(root, bad_data="skip")
    taken = [data.pixels(i) for i in range(12)]
    assert len(taken) == 12
    bad = smooth(48, 56, 1)
    for _, crop in taken:
        assert not any(
            np.allclose(bad[y : y + 32, x : x + 40], crop[:, 0].permute(1, 2, 0), atol=0.01) for y, x in [(0, 0), (8, 8)]
        )
    told = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(told) == 1  # once, not in every epoch
    assert "01" in told[0]
    again = samples(root, bad_data="skip")
    assert torch.equal(again.pixels(7)[1], taken[7][1])  # whatever has been found to be bad before


def test_values_that_are_not_finite_are_bad(pairs, monkeypatch):
    data = samples(pairs())
    monkeypatch.setattr(data, "_read", lambda source, view: np.full((1, 48, 56, 3), np.nan, np.float32))
    with pytest.raises(BadDataError, match="not finite"):
        data.pixels(0)


def test_nothing_but_bad_pairs_is_told(pairs):
    root = pairs(count=2, height=24)
    with pytest.raises(EbrError, match="none of the 2 pairs"):
        samples(root, bad_data="skip").pixels(0)


def test_scenes_are_degraded_by_the_task_and_seeds_are_those_of_training(pool):
    data = SceneSamples(LearnConfig("rain", size=(32, 64), seed=3), pool)
    degraded, clean = data.pixels(11)
    assert clean.shape == degraded.shape == (3, 1, 32, 64)
    assert (degraded - clean).abs().max() > 0.01
    assert torch.equal(data.pixels(11)[0], degraded)
    assert not torch.equal(data.pixels(12)[1], clean)
    assert all(seeded("x", i).initial_seed() in seeds("train") for i in range(50))
