"""Synthetic degradations: deterministic, in range, ordered by strength, and true to their physical models."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ebr_engine.media.degradations import (
    CAPTION_WORDS,
    TASKS,
    degrade,
    degrade_clip,
    depth_from_disparity,
    seeds,
    strength_word,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos():
    """[8, 3, 64, 64] with structure at every scale, as photographs have it."""
    generator = seeded(5)
    image = torch.zeros(8, 3, 64, 64)
    for size in (4, 8, 16, 32, 64):
        noise = torch.rand(8, 3, size, size, generator=generator)
        image += F.interpolate(noise, size=(64, 64), mode="bilinear") / 5
    return ((image - 0.5) * 1.6 + 0.45).clamp(0, 1)


def mean_psnr(a, b):
    return float((-10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)))).mean())


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_means_one_degradation(photos, task):
    first = degrade(photos, task, seeded(3))
    assert torch.equal(first, degrade(photos, task, seeded(3)))
    assert not torch.equal(first, degrade(photos, task, seeded(4)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 37, 51), (3, 3, 5, 8), (1, 3, 1, 1)])
def test_shape_dtype_and_range_hold_and_the_input_is_left_alone(task, shape):
    clean = torch.rand(shape, generator=seeded(1))
    before = clean.clone()
    degraded = degrade(clean, task, seeded(), strength=1.0)
    assert degraded.shape == shape
    assert degraded.dtype == torch.float32
    assert degraded.min() >= 0
    assert degraded.max() <= 1
    assert torch.equal(clean, before)


@pytest.mark.parametrize("task", TASKS)
def test_stronger_is_worse(photos, task):
    psnrs = [mean_psnr(degrade(photos, task, seeded(2), strength=s), photos) for s in (0.0, 0.33, 0.67, 1.0)]
    assert all(milder > stronger + 0.3 for milder, stronger in itertools.pairwise(psnrs)), psnrs


@pytest.mark.parametrize("task", TASKS)
def test_samples_of_a_batch_differ(photos, task):
    same = photos[:1].expand(4, -1, -1, -1)
    degraded = degrade(same, task, seeded(), strength=0.7)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(degraded, 2))


@pytest.mark.parametrize("task", TASKS)
def test_strength_may_be_given_for_each_sample(photos, task):
    mixed = degrade(photos[:2], task, seeded(), strength=torch.tensor([0.0, 1.0]))
    assert torch.allclose(mixed[0], degrade(photos[:2], task, seeded(), strength=0.0)[0], atol=1e-6)
    assert torch.allclose(mixed[1], degrade(photos[:2], task, seeded(), strength=1.0)[1], atol=1e-6)


def test_haze_follows_the_scattering_law():
    # Two scenes seen through the same air: their difference is the transmission, whatever the airlight.
    depth = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    scenes = [torch.full((1, 3, 32, 32), level) for level in (0.2, 0.6)]
    dark, bright = (degrade(scene, "haze", seeded(), depth=depth, strength=1.0) for scene in scenes)
    transmission = ((bright - dark) / 0.4)[0, :, 0]
    slope = transmission.log().diff(dim=-1)
    assert torch.allclose(slope, slope.mean().expand_as(slope), atol=1e-4)  # ln T = −β·d is a line in d
    airlight = (dark[0, :, 0] - 0.2 * transmission) / (1 - transmission)
    assert torch.allclose(airlight, airlight[:, :1].expand_as(airlight), atol=1e-4)
    assert airlight.min() >= 0.74
    assert airlight.max() <= 1.0
    # Far pixels tend to the airlight, near ones to the scene.
    distance = (dark[0, :, 0] - airlight).abs()
    assert (distance.diff(dim=-1) < 0).all()
    assert transmission[0, -1] < 0.15
    assert transmission[0, 0] > 0.5


def test_rain_and_snow_only_brighten_a_dark_scene():
    dark = torch.full((4, 3, 64, 64), 0.1)
    for task in ("rain", "snow"):
        degraded = degrade(dark, task, seeded(), strength=0.5)
        assert (degraded >= 0.1 - 1e-6).all()
        assert (degraded > 0.3).float().mean() > 0.02  # streaks and flakes are there
        assert (degraded < 0.3).float().mean() > 0.4  # and the scene between them


def test_rain_streaks_are_near_vertical():
    degraded = degrade(torch.full((8, 3, 128, 128), 0.2), "rain", seeded(), strength=1.0)
    assert degraded.diff(dim=3).abs().mean() > 2 * degraded.diff(dim=2).abs().mean()


def test_density_per_pixel_does_not_depend_on_the_image_size():
    for task in ("rain", "snow"):
        small = degrade(torch.full((32, 3, 64, 64), 0.1), task, seeded(), strength=0.5)
        large = degrade(torch.full((4, 3, 256, 256), 0.1), task, seeded(), strength=0.5)
        assert small.mean().item() == pytest.approx(large.mean().item(), rel=0.15)


def test_blur_keeps_the_mean_colour_and_removes_detail(photos):
    degraded = degrade(photos, "blur", seeded(), strength=1.0)
    assert torch.allclose(degraded.mean((2, 3)), photos.mean((2, 3)), atol=0.01)
    assert degraded.diff(dim=3).abs().mean() < 0.5 * photos.diff(dim=3).abs().mean()


def test_blur_leaves_a_flat_image_flat():
    flat = torch.full((3, 3, 40, 40), 0.5)
    assert (degrade(flat, "blur", seeded(), strength=1.0) - flat).abs().max() < 0.05  # its sensor noise alone


def test_lowlight_darkens_to_eight_bits(photos):
    degraded = degrade(photos, "lowlight", seeded(), strength=1.0)
    assert (degraded.mean((1, 2, 3)) < 0.4 * photos.mean((1, 2, 3))).all()
    assert torch.allclose(degraded * 255, (degraded * 255).round(), atol=1e-4)


def test_lowlight_noise_grows_with_the_signal():
    def spread(level):
        return degrade(torch.full((2, 3, 64, 64), level), "lowlight", seeded(), strength=0.0).std((2, 3)).mean()

    # In sRGB the curve compresses highlights, so only a shot term keeps the bright patch this noisy.
    assert spread(1.0) > 0.5 * spread(0.5)


def test_depth_from_disparity_is_far_where_disparity_is_small_and_fills_unknowns_with_background():
    disparity = torch.full((4, 9), 10.0)
    disparity[:, 6:] = 40.0
    disparity[:, 4:6] = math.inf
    disparity[0, 0] = math.nan
    depth = depth_from_disparity(disparity.numpy())
    assert depth.shape == (1, 1, 4, 9)
    assert (depth[..., :6] == 1).all()
    assert (depth[..., 6:] == 0).all()
    with pytest.raises(ValueError, match="no finite positive"):
        depth_from_disparity(torch.full((2, 2), math.inf))
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        depth_from_disparity(torch.ones(1, 2, 2))


def test_words():
    assert [strength_word(s) for s in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [
        *("light", "light", "moderate", "moderate", "heavy", "heavy")
    ]
    assert set(CAPTION_WORDS) == {*TASKS, "light", "moderate", "heavy"}
    with pytest.raises(ValueError, match=r"1\.5"):
        strength_word(1.5)


def test_seed_splits_are_disjoint():
    for a, b in itertools.combinations([seeds(split) for split in ("train", "validation", "test")], 2):
        assert a.stop <= b.start or b.stop <= a.start
    with pytest.raises(ValueError, match="train, validation, test"):
        seeds("dev")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "fog"}, "haze, rain, snow, blur, lowlight"),
        ({"clean": torch.zeros(3, 8, 8)}, r"\[B, 3, H, W\]"),
        ({"clean": torch.zeros(1, 4, 8, 8)}, r"\[B, 3, H, W\]"),
        ({"clean": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "float32"),
        ({"clean": torch.full((1, 3, 8, 8), 2.0)}, r"\[0, 1\]"),
        ({"clean": torch.full((1, 3, 8, 8), math.nan)}, r"\[0, 1\]"),
        ({"strength": 1.2}, "strength"),
        ({"strength": torch.zeros(3)}, "strength"),
        ({"depth": torch.zeros(1, 1, 4, 4)}, "depth"),
        ({"depth": torch.full((1, 1, 8, 8), -1.0)}, "depth"),
    ],
)
def test_bad_input_is_told_clearly(changes, message):
    arguments = {"clean": torch.zeros(1, 3, 8, 8), "task": "haze", "generator": seeded(), **changes}
    with pytest.raises(ValueError, match=message):
        degrade(**arguments)


@pytest.mark.parametrize("task", TASKS)
def test_a_clip_of_one_frame_is_a_picture(task):
    clean = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    drawn = [f(clean, task, torch.Generator().manual_seed(1), strength=0.5) for f in (degrade, degrade_clip)]
    assert torch.equal(*drawn)


def still(task: str, frames: int = 3) -> torch.Tensor:
    clean = torch.full((frames, 3, 64, 64), 0.3)
    return degrade_clip(clean, task, torch.Generator().manual_seed(1), strength=0.8)


def test_haze_and_darkness_stand_still_in_a_clip_and_noise_does_not():
    haze, dark = still("haze"), still("lowlight")
    assert torch.equal(haze[0], haze[2])
    assert not torch.equal(dark[0], dark[1])
    assert abs(dark[0].mean() - dark[1].mean()) < 0.005


def test_rain_is_elsewhere_in_every_frame_of_the_same_storm():
    rain = still("rain")
    excess = rain - rain.amin((-1, -2), keepdim=True)
    assert torch.corrcoef(excess.flatten(1))[0, 1] < 0.3
    assert torch.allclose(rain.amin((1, 2, 3)), rain.amin(), atol=0.02)  # one veil


def test_snow_drifts_downwards():
    snow = still("snow", 2)[:, 0]
    spectrum = torch.fft.rfft2(snow - snow.mean((1, 2), keepdim=True))
    correlation = torch.fft.irfft2(spectrum[1] * spectrum[0].conj(), s=snow.shape[1:])
    down = correlation.amax(1)
    assert 0 < int(down.argmax()) < 20
