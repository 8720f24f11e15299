"""Blur that is found in a picture and taken out of it."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ebr_engine.evaluation.metrics import psnr
from ebr_engine.evaluation.photos import load_photo
from ebr_engine.media import deconvolution
from ebr_engine.media.deconvolution import Blur, blur_of, deconvolved, luma_of
from ebr_engine.media.deconvolution.inverse import extended, periodic, wiener
from ebr_engine.media.deconvolution.optics import Optics
from ebr_engine.media.deconvolution.paths import kernel_of, pruned, transfer_of
from ebr_engine.media.deconvolution.spectrum import Fit, Noise, Spectrum
from ebr_engine.media.deconvolution.trusting import trust

SAMPLES = Path(__file__).parents[3] / "shared" / "samples"


def photo(name, size=256):
    return load_photo(name, size)[0]


def eight_bit(picture):
    return (picture.clamp(0, 1) * 255).round() / 255


def blurred(clean, optics, noise=0.003, seed=0):
    """A picture [1, 3, H, W] as that lens sees it, with noise, in 8 bit."""
    padded = F.pad(clean, (24,) * 4, mode="reflect")
    spectrum = torch.fft.rfft2(padded) * optics.transfer(*padded.shape[-2:])
    seen = torch.fft.irfft2(spectrum, s=padded.shape[-2:])[..., 24:-24, 24:-24]
    return eight_bit(seen + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)))


def jpeg(picture, quality=85):
    """The same after JPEG, with half of the colours' resolution."""
    file = io.BytesIO()
    Image.fromarray((picture[0].movedim(0, -1) * 255).round().byte().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0)[None].float() / 255


def along(kernel, clean, noise=0.003):
    """The same under a kernel of any form."""
    reach = len(kernel) // 2
    padded = F.pad(clean, (reach,) * 4, mode="reflect")
    seen = F.conv2d(padded.transpose(0, 1), kernel.flip(0, 1)[None, None]).transpose(0, 1)
    return eight_bit(seen + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)))


def hook(side=19):
    """A path with a corner, its centre of mass in the middle."""
    kernel = torch.zeros(side, side)
    kernel[4:13, 7] = 1
    kernel[12, 7:14] = 1
    places = torch.arange(side) - side // 2
    down, aside = (round(float(kernel.sum(dim) @ places.float() / kernel.sum())) for dim in (1, 0))
    return (kernel / kernel.sum()).roll((-down, -aside), (0, 1))


LENSES = [
    ("astronaut", Optics(sigma=2.6)),
    ("coins", Optics(sigma=1.5)),
    ("chelsea", Optics(0.45, radius=5.0)),
    ("motorcycle", Optics(0.45, length=12.0, angle=0.3)),
]


@pytest.mark.parametrize(("name", "optics"), LENSES)
def test_a_lens_or_a_straight_path_is_found_and_taken_out(name, optics):
    clean = photo(name)
    seen = blurred(clean, optics)
    found = blur_of(seen)
    assert found.optics.sigma == pytest.approx(optics.sigma, abs=0.35)
    assert found.optics.radius == pytest.approx(optics.radius, rel=0.1, abs=0.01)
    assert found.optics.length == pytest.approx(optics.length, rel=0.1, abs=0.01)
    if optics.length:
        assert math.cos(2 * (found.optics.angle - optics.angle)) > 0.98
    sharp = deconvolved(seen)
    assert sharp.shape == seen.shape
    assert 0 <= sharp.min() <= sharp.max() <= 1
    assert psnr(sharp, clean) > psnr(seen, clean) + 2.5


@pytest.mark.parametrize("name", ["astronaut", "coffee", "camera", "brick"])
def test_a_sharp_picture_stays_as_it_is(name):
    picture = eight_bit(photo(name))
    assert deconvolved(picture) is picture


def test_one_that_is_sharp_in_parts_stays_too():
    clean = photo("chelsea")
    seen = blurred(clean, Optics(0.45, radius=5.0))
    seen[..., :128] = clean[..., :128]
    assert blur_of(seen) is None


@pytest.mark.parametrize(("name", "optics"), LENSES[1:])
def test_a_blurred_picture_that_was_stored_as_jpeg_gets_sharper(name, optics):
    clean = photo(name)
    stored = jpeg(blurred(clean, optics))
    assert psnr(deconvolved(stored), clean) > psnr(stored, clean) + 1
    plain = jpeg(clean)
    assert deconvolved(plain) is plain


def test_what_is_flat_and_what_is_sharp_already_is_not_believed():
    clean, optics = photo("coffee"), Optics(0.45, radius=4.0)
    clean[..., :100, :100] = 0.5
    seen = blurred(clean, optics)
    mixed = seen.clone()
    mixed[..., 160:, 140:] = photo("chelsea")[..., 160:, 140:]  # sharp fur
    blur = blur_of(seen)
    shares = trust(luma_of(mixed)[0], blur.transfer(extended(256), extended(256)), blur.fit)
    assert shares.min() >= 0
    assert shares.max() <= 1
    flat, fur, rest = shares[20:80, 20:80], shares[190:240, 170:230], shares[130:220, 20:110]
    assert flat.mean() < 0.4
    assert fur.mean() < 0.4
    assert rest.mean() > 0.6


def calmest_third_grows(seen, result):
    """By how much the standard deviations in 7×7 pixels grow, in the median of the calmest third."""
    before, after = (deviations(x) for x in (seen, result))
    calmest = before <= before.quantile(1 / 3)
    return float(after[calmest].median() / before[calmest].median())


def deviations(picture):
    windows = luma_of(picture)[0].unfold(0, 7, 1).unfold(1, 7, 1)
    return windows.flatten(2).std(-1)


@pytest.mark.parametrize("name", ["coffee", "chelsea", "motorcycle"])
def test_noise_of_calm_places_hardly_grows(name, monkeypatch):
    clean = photo(name)
    clean[..., :120, :] = 0.6
    seen = blurred(clean, Optics(0.45, length=9.0, angle=1.4))
    kept = deconvolved(seen)
    monkeypatch.setattr(deconvolution, "kept_calm", lambda before, after: after)
    free = deconvolved(seen)
    assert calmest_third_grows(seen, kept) < 1.12
    assert calmest_third_grows(seen, kept) < calmest_third_grows(seen, free)
    assert psnr(kept, clean) > psnr(free, clean) - 0.3


@pytest.mark.skipif(not SAMPLES.exists(), reason="no samples here")
@pytest.mark.parametrize("name", ["4krd_in.png", "toled_in.png"])
def test_noise_of_real_blurred_pictures_hardly_grows(name):
    seen = torch.from_numpy(np.array(Image.open(SAMPLES / name).convert("RGB"))).movedim(-1, 0)[None] / 255
    assert blur_of(seen) is not None
    assert calmest_third_grows(seen, deconvolved(seen)) < 1.1


def test_a_path_must_be_the_same_in_both_halves():
    clean = photo("astronaut")
    shaken = luma_of(along(hook(), clean))[0]
    assert deconvolution._halves_agree(shaken, 15)
    across, down = (luma_of(blurred(clean, Optics(0.45, length=13.0, angle=angle)))[0] for angle in (math.pi / 2, 0.0))
    assert not deconvolution._halves_agree(torch.cat((across[:128], down[128:])), 15)


def test_a_path_of_a_small_version_is_not_believed_beside_fine_detail(monkeypatch):
    monkeypatch.setattr(deconvolution, "LARGEST", 200)
    path = F.interpolate(hook()[None, None], (37, 37), mode="bilinear")[0, 0]
    seen = along(path / path.sum(), photo("astronaut", 400))
    found = blur_of(seen)
    assert found.optics is None
    assert found.scale == 2
    assert Spectrum.of(luma_of(seen)).kept(found.fit) < deconvolution.KEPT
    assert Spectrum.of(luma_of(photo("astronaut", 400))).kept(found.fit) > deconvolution.KEPT
    monkeypatch.setattr(Spectrum, "kept", lambda spectrum, fit: 0.1)
    again = blur_of(seen)
    assert again is None or again.scale == 1


def test_a_path_of_any_form_is_found():
    clean, kernel = photo("astronaut"), hook()
    seen = along(kernel, clean)
    found = blur_of(seen)
    assert found.optics is None
    assert found.kernel.sum() == pytest.approx(1, abs=1e-5)
    middle = slice(len(found.kernel) // 2 - 7, len(found.kernel) // 2 + 8)
    one, other = found.kernel[middle, middle].flatten(), kernel[2:17, 2:17].flatten()
    assert float(one @ other / (one.norm() * other.norm())) > 0.6
    assert psnr(found.removed(seen), clean) > psnr(seen, clean) + 1


def test_the_frames_of_a_scene_share_one_lens():
    clean = torch.cat([photo("coffee")[..., left : left + 160] for left in (0, 16, 32)])
    optics = Optics(0.45, radius=4.0)
    seen = torch.cat([blurred(frame[None], optics, seed=i) for i, frame in enumerate(clean)])
    assert blur_of(seen).optics.radius == pytest.approx(4.0, rel=0.1)
    assert psnr(deconvolved(seen), clean) > psnr(seen, clean) + 2
    of_a_clip = seen.transpose(0, 1).contiguous().transpose(0, 1)  # frames as a clip [3, F, H, W] holds them
    assert torch.allclose(deconvolved(of_a_clip), deconvolved(seen), atol=1e-5)
    shaken = torch.cat([along(hook(), frame[None]) for frame in clean])  # another path in each: none is looked for
    found = blur_of(shaken)
    assert found is None or found.optics is not None


def test_a_wide_blur_is_found_in_a_small_version(monkeypatch):
    monkeypatch.setattr(deconvolution, "LARGEST", 200)
    clean = photo("astronaut", 400)
    seen = blurred(clean, Optics(sigma=5.0))
    found = blur_of(seen)
    assert found.scale == 2
    assert found.optics.scaled(found.scale).width == pytest.approx(5.0, rel=0.15)
    assert psnr(found.removed(seen), clean) > psnr(seen, clean) + 1
    mild = blurred(clean, Optics(sigma=1.3))
    assert blur_of(mild).scale == 1


@pytest.mark.parametrize("size", [(1, 1), (5, 200), (63, 64), (64, 64), (65, 97)])
@pytest.mark.parametrize("value", [0.0, 0.5, "noise"])
def test_what_shows_nothing_stays_as_it_is(size, value):
    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    picture = noise if value == "noise" else torch.full_like(noise, value)
    assert deconvolved(picture) is picture


def test_a_known_transfer_function_is_undone():
    clean, optics = photo("chelsea"), Optics(sigma=1.2)
    seen = torch.fft.irfft2(torch.fft.rfft2(periodic(clean[0, 0])) * optics.transfer(extended(256), extended(256)))
    fit = Fit(1.0, 2.0, Noise(1e-9, 0.0), 0.0)
    found = wiener(seen[None, None, :256, :256], optics.transfer(extended(256), extended(256)), fit, 0.0)
    inside = (..., slice(16, -16), slice(16, -16))
    assert psnr(found[0, 0][inside], clean[0, 0][inside]) > psnr(seen[:256, :256][inside], clean[0, 0][inside]) + 8
    nothing = wiener(clean, torch.ones(extended(256), extended(256) // 2 + 1), fit, 0.0)
    assert torch.allclose(nothing, clean, atol=2e-3)


@pytest.mark.parametrize("side", [1, 2, 3, 17, 49, 64, 251, 1021])
def test_sides_are_extended_to_smooth_lengths_and_join(side):
    length = extended(side)
    assert side <= length <= max(2 * side - 1, side + 80)
    picture = torch.linspace(0, 1, side)[:, None].expand(side, 5)
    wide = periodic(picture)
    assert wide.shape == (length, extended(5))
    assert torch.equal(wide[:side, :5], picture)
    if side > 16:  # no step from the last row to the first
        assert (wide.roll(-1, 0) - wide).abs().max() < 0.1


def test_spectra_of_white_noise_are_flat_and_of_its_variance():
    noise = 0.1 * torch.randn(1, 200, 300, generator=torch.Generator().manual_seed(0))
    power = Spectrum.of(noise).power
    assert power[4:28, 4:28].mean() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("optics", [Optics(sigma=2.0), Optics(0.45, radius=4.0), Optics(0.45, length=9.0, angle=0.7), Optics()])
def test_a_transfer_function_is_that_of_a_kernel_of_its_width(optics):
    kernel = torch.fft.fftshift(torch.fft.irfft2(optics.transfer(96, 96), s=(96, 96)))
    assert kernel.sum() == pytest.approx(1, abs=1e-4)
    place = torch.arange(96) - 48.0
    variance = float(kernel.sum(1) @ place.square() + kernel.sum(0) @ place.square())
    both = 2 * optics.sigma**2 + optics.radius**2 / 2 + optics.length**2 / 12
    assert variance == pytest.approx(both, rel=0.1, abs=0.05)
    assert optics.scaled(3).width == pytest.approx(3 * optics.width)


def test_kernels_and_their_transfer_functions_agree():
    kernel = hook()
    again = torch.fft.irfft2(transfer_of(kernel, 64, 48), s=(64, 48)).roll((9, 9), (0, 1))[:19, :19]
    assert torch.allclose(again, kernel, atol=1e-6)
    assert pruned(torch.zeros(5, 5))[2, 2] == 1
    assert kernel_of(torch.full((80, 90), 0.5), 15).isfinite().all()


def test_a_fit_of_a_small_version_is_scaled_to_the_picture():
    small = Fit(2.0, 2.2, Noise(1e-5, 1.0), 0.1)
    squared = torch.tensor([1e-4, 1e-3, 1e-2])
    assert torch.allclose(small.scaled(4).ratio(squared), small.ratio(16 * squared), rtol=1e-5)


def test_a_blur_says_what_it_is():
    fit = Fit(1.0, 2.2, Noise(1e-6, 0.0), 0.1)
    assert str(Blur(Optics(0.45, radius=2.5), None, fit, 2.0)) == "a disc of radius 5.0"
    assert str(Blur(Optics(sigma=1.5), None, fit)) == "a Gaussian of 1.5 pixels"
    assert str(Blur(Optics(0.45, length=9.0, angle=math.pi / 2), None, fit)) == "a path of 9.0 pixels at 90°"
    assert str(Blur(None, hook(), fit)) == "a path of its own"


def test_the_variance_of_noise_is_what_its_spectrum_sums_to():
    assert Noise(0.01, 0.0).variance == pytest.approx(0.01, rel=0.02)
    assert Noise(0.01, 2.0).variance > 0.02  # low frequencies have more
