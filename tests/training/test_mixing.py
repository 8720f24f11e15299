"""Photos, intact pictures and stored ones beside procedural scenes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ebr_engine.errors import EbrError
from ebr_engine.media import heavy
from ebr_engine.media.images import write_image
from ebr_engine.training.config import HEAVY, LearnConfig
from ebr_engine.training.data import SceneSamples
from ebr_engine.training.mixing import MixedSamples, photo_crop, read_photos

CONFIG = LearnConfig("rain", size=(32, 40), scenes=4)


@pytest.fixture
def photos(tmp_path):
    """Two photos whose every pixel tells which one it is of and where it lies."""
    for name, red in (("a.png", 0.2), ("b.jpg", 0.8)):
        picture = np.zeros((80, 120, 3), np.float32)
        picture[..., 0], picture[..., 1] = red, np.linspace(0, 1, 120)
        write_image(tmp_path / name, picture)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def samples(pool, **settings):
    return MixedSamples(replace(CONFIG, **settings), pool)


def test_a_sample_is_a_function_of_its_number(pool, photos):
    found = [samples(pool, photos=str(photos), intact=0.3, stored=0.5).pixels(number) for number in (3, 4, 3)]
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][1], found[2][1])
    assert not torch.equal(found[0][1], found[1][1])
    for degraded, clean in found:
        assert degraded.shape == clean.shape == (3, 1, 32, 40)
        assert 0 <= degraded.min() <= degraded.max() <= 1


def test_shares_are_those_of_the_settings(pool, photos):
    mixed = samples(pool, photos=str(photos), photo_share=0.25, intact=0.4)
    found = [mixed.pixels(number) for number in range(200)]
    of_photos = sum(float(clean[0].std()) < 0.02 for _, clean in found)  # a photo's red is one value
    intact = sum(torch.equal(degraded, clean) for degraded, clean in found)
    assert 30 < of_photos < 72
    assert 60 < intact < 100
    assert not any(torch.equal(*samples(pool).pixels(number)) for number in range(20))


def test_a_stored_picture_is_another_one_of_8_bit(pool):
    plain, stored = (samples(pool, stored=share, intact=1.0) for share in (0.0, 1.0))
    for number in range(4):
        degraded, clean = stored.pixels(number)
        assert torch.equal(clean, plain.pixels(number)[1])
        assert torch.equal((degraded * 255).round() / 255, degraded)
        assert 1e-4 < float((degraded - clean).square().mean().sqrt()) < 0.1


def test_a_share_of_the_rain_pours_down(pool):
    all_of_it, none = (samples(pool, heavy=share, intact=0.25) for share in (1.0, 0.0))
    heavier = intact = 0
    for number in range(24):
        (wet, clean), (rain, same) = all_of_it.pixels(number), none.pixels(number)
        assert torch.equal(clean, same)
        intact += torch.equal(wet, clean)
        heavier += (wet - clean).square().mean() > (rain - clean).square().mean()
        assert (wet >= clean - 1e-6).all()
    assert 1 <= intact <= 12
    assert heavier >= 10
    assert tuple(heavy.HEAVY) == HEAVY
    with pytest.raises(EbrError, match="heavy damage is of scenes and photos"):
        replace(CONFIG, task="snow", heavy=0.1)


def test_scenes_are_those_of_a_plain_run_in_kind(pool):
    degraded, clean = SceneSamples(CONFIG, pool).pixels(0)
    other_degraded, other_clean = samples(pool).pixels(0)
    assert degraded.shape == other_degraded.shape
    assert clean.dtype == other_clean.dtype == torch.float32


def test_a_photo_s_crop_has_its_proportions_at_every_scale(photos):
    read = read_photos(photos, 32)
    assert [photo.shape for photo in read] == [(3, 80, 120)] * 2
    slopes = []
    for seed in range(40):
        crop = photo_crop(read, (32, 40), True, torch.Generator().manual_seed(seed))
        assert crop.shape == (1, 3, 32, 40)
        slopes.append(float(crop[0, 1, 16].diff().mean()) * 119)  # 1: the photo's own pixels
    assert 0.95 < min(map(abs, slopes)) < 1.2
    assert 2 < max(map(abs, slopes)) < 2.6  # 80 rows in 32
    assert min(slopes) < 0 < max(slopes)  # mirrored or not


def test_what_cannot_be_used_is_told(tmp_path, photos, pool):
    with pytest.raises(EbrError, match="there is no picture in"):
        read_photos(tmp_path / "nowhere", 32)
    with pytest.raises(EbrError, match=r"a\.png: is smaller than the crops of 96 pixels"):
        samples(pool, photos=str(photos), size=96)
    for name in ("photo_share", "intact", "stored"):
        with pytest.raises(EbrError, match=f"{name} must be a share from 0 to 1"):
            replace(CONFIG, **{name: 1.5})
