"""Scores are those of the reference libraries, on odd sizes, grey and 16 bit; what is missing is told in one line."""

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import color, metrics
from torchmetrics.functional import image as theirs

from ebr_engine.errors import EbrError
from ebr_engine.evaluation.metrics import METRICS, WEIGHTS, dissimilarity, luma, luma_psnr, luma_ssim, make_scores, psnr, ssim

SIZES = [(7, 7), (11, 13), (24, 24), (31, 50)]


def pair(height, width, levels=None, grey=False):
    """A smooth picture and a noisy one, [1, 3, H, W], as a file of so many levels would hold them."""
    ramp = torch.linspace(0, 1, height)[:, None] * torch.linspace(0.2, 1, width)
    target = (0.7 * ramp + 0.3 * torch.rand(3, height, width))[None]
    result = (target + 0.08 * torch.randn(target.shape)).clamp(0, 1)
    if grey:
        target, result = (x[:, :1].expand(-1, 3, -1, -1) for x in (target, result))
    return tuple((x * levels).round() / levels if levels else x for x in (result, target))


def arrays(*pictures):
    return [x[0].permute(1, 2, 0).double().numpy() for x in pictures]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", [{}, {"levels": 255}, {"levels": 65535}, {"levels": 255, "grey": True}], ids=str)
def test_psnr_and_ssim_are_scikit_images(size, form):
    result, target = pair(*size, **form)
    ours, wanted = arrays(result, target)
    assert psnr(result, target) == pytest.approx(metrics.peak_signal_noise_ratio(wanted, ours, data_range=1), abs=1e-4)
    expected = metrics.structural_similarity(wanted, ours, data_range=1, channel_axis=2)
    assert ssim(result, target) == pytest.approx(expected, abs=1e-6)
    assert 0.05 < expected < 0.999


def test_dissimilarity_is_what_ssim_leaves_and_has_a_gradient():
    clips, targets = (torch.rand(2, 3, 2, 21, 33, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    clips = (0.3 * clips + 0.7 * targets).requires_grad_()
    found = dissimilarity(clips, targets)
    still = clips.detach()
    frames = [ssim(x.movedim(1, 0)[None, i], y.movedim(1, 0)[None, i]) for x, y in zip(still, targets) for i in range(2)]
    assert found.tolist() == pytest.approx([1 - (frames[0] + frames[1]) / 2, 1 - (frames[2] + frames[3]) / 2], abs=1e-5)
    found.sum().backward()
    assert clips.grad.abs().min() > 0


def test_psnr_is_torchmetrics():
    result, target = pair(31, 50)
    expected = theirs.peak_signal_noise_ratio(result, target, data_range=1.0)
    assert psnr(result, target) == pytest.approx(expected.item(), abs=1e-4)


def test_grey_by_one_channel_is_grey_by_three():
    result, target = pair(20, 30, grey=True)
    assert ssim(result[:, :1], target[:, :1]) == pytest.approx(ssim(result, target), abs=1e-12)
    assert psnr(result[:, :1], target[:, :1]) == pytest.approx(psnr(result, target), abs=1e-12)


def test_luma_is_matlabs():
    # rgb2ycbcr's matrix in MATLAB's documentation: white 235, black 16, primaries 81.481, 144.553, 40.966.
    colours = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).float().T[None, :, None]
    torch.testing.assert_close(luma(colours).flatten(), torch.tensor([235, 16, 81.481, 144.553, 40.966], dtype=torch.float64))
    result, _ = pair(9, 14, 255)
    expected = color.rgb2ycbcr(arrays(result)[0])[..., 0]
    np.testing.assert_allclose(luma(result)[0, 0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("size", [(11, 11), (24, 37)])
def test_scores_on_luma_are_those_of_derainings_scripts(size):
    result, target = pair(*size, 255)
    ours, wanted = (color.rgb2ycbcr(x)[..., 0] for x in arrays(result, target))
    assert luma_psnr(result, target) == pytest.approx(metrics.peak_signal_noise_ratio(wanted, ours, data_range=255), abs=1e-4)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = metrics.structural_similarity(wanted, ours, data_range=255, **gaussian)
    assert luma_ssim(result, target) == pytest.approx(expected, abs=1e-6)


def test_the_gaussian_ssim_is_torchmetrics():
    result, target = pair(40, 33)
    ours, wanted = (luma(x).float() for x in (result, target))
    _, whole = theirs.structural_similarity_index_measure(ours, wanted, data_range=255.0, return_full_image=True)
    # Their mean is over a border of mirrored pixels too: only windows that fit are compared.
    expected = whole[..., 5:-5, 5:-5].mean().item()
    assert luma_ssim(result, target) == pytest.approx(expected, abs=1e-4)


def test_a_picture_is_like_itself():
    picture, _ = pair(16, 21)
    assert psnr(picture, picture) == luma_psnr(picture, picture) == math.inf
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert luma_ssim(picture, picture) == pytest.approx(1, abs=1e-12)


def test_what_cannot_be_compared_is_refused():
    result, target = pair(16, 21)
    for score in (psnr, ssim, luma_psnr, luma_ssim):
        with pytest.raises(EbrError, match="different sizes"):
            score(result, target[..., :20])
    with pytest.raises(EbrError, match=r"21 x 6 pixels.*7"):
        ssim(result[..., :6, :], target[..., :6, :])
    with pytest.raises(EbrError, match="11"):
        luma_ssim(result[..., :10], target[..., :10])


def test_scores_come_by_name_and_on_luma():
    result, target = pair(16, 21, 255)
    scores, on_luma = make_scores(["ssim", "psnr"]), make_scores(["psnr"], on_luma=True)
    assert list(scores) == ["psnr", "ssim"]
    assert scores["psnr"](result, target) == psnr(result, target)
    assert on_luma["psnr"](result, target) == luma_psnr(result, target) != psnr(result, target)
    with pytest.raises(EbrError, match=r"sharpness.*psnr, ssim"):
        make_scores(["psnr", "sharpness"])


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for the libraries: LPIPS is the mean of what it gets, others the mean of the first picture."""
    calls = []

    class Network(torch.nn.Module):
        def __init__(self, **settings):
            super().__init__()
            calls.append(settings)

        def reset(self):
            calls.append("reset")

        def forward(self, *pictures):
            calls.append(len(pictures))
            return torch.stack([picture.mean() for picture in pictures]).sum()

    lpips, pyiqa = types.ModuleType("torchmetrics.image.lpip"), types.ModuleType("pyiqa")
    lpips.LearnedPerceptualImagePatchSimilarity = Network
    pyiqa.create_metric = lambda name, device: Network(name=name, device=device)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", lpips)
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)
    return calls


def test_lpips_gets_pictures_from_minus_one_to_one(libraries):
    result, target = pair(16, 16)
    score = make_scores(["lpips"])["lpips"]
    expected = float((2 * result - 1).mean() + (2 * target - 1).mean())
    assert score(result, target) == score(result, target) == pytest.approx(expected, abs=1e-5)
    assert libraries == [{"net_type": "alex"}, "reset", 2, "reset", 2]


def test_pyiqas_get_pictures_from_zero_to_one_and_a_target_where_they_need_one(libraries):
    result, target = pair(16, 16)
    for name in ("dists", "clipiqa+", "musiq"):
        pictures = (result, target) if METRICS[name].needs_target else (result,)
        assert make_scores([name])[name](*pictures) == pytest.approx(float(sum(x.mean() for x in pictures)), abs=1e-5)
    assert [call["name"] for call in libraries[::2]] == ["dists", "clipiqa+", "musiq"]
    assert libraries[1::2] == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("lpips", "torchmetrics.image.lpip", ["torchmetrics", "ebr-engine[metrics]"]),
        ("musiq", "pyiqa", ["pyiqa", "ebr-engine[iqa]", "no commercial use"]),
    ],
)
def test_a_missing_library_is_told_with_the_line_that_installs_it(monkeypatch, name, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EbrError) as error:
        make_scores([name])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_psnr_y_is_basicsrs_or_pyiqas_by_its_name():
    result, target = pair(24, 37, 255)
    ours, wanted = (color.rgb2ycbcr(x)[..., 0] for x in arrays(result, target))
    scores = make_scores(["psnr", "psnr-y", "psnr-y-full"])
    expected = metrics.peak_signal_noise_ratio(wanted, ours, data_range=255)
    assert scores["psnr-y"](result, target) == pytest.approx(expected, abs=1e-6)
    assert scores["psnr-y"](result + 0.4 / 255, target) == pytest.approx(expected, abs=1e-6)  # of 8 bit
    full = [color.rgb2yiq(x)[..., 0] for x in arrays(result, target)]
    assert scores["psnr-y-full"](result, target) == pytest.approx(-10 * np.log10(np.mean((full[0] - full[1]) ** 2)), abs=1e-3)
    assert expected - scores["psnr-y-full"](result, target) == pytest.approx(20 * math.log10(255 / 219), abs=0.01)


@pytest.mark.parametrize("layout", ["flat", "torch's"])
def test_weights_come_from_a_folder(libraries, tmp_path, monkeypatch, layout):
    seen, download = [], types.ModuleType("download_util")
    monkeypatch.setitem(sys.modules, "pyiqa.utils.download_util", download)
    before = torch.hub.get_dir()
    names = ["lpips", "dists", "clipiqa+", "musiq"]
    for file in [file for name in names for file in WEIGHTS[name]]:
        path = tmp_path / (Path(file).name if layout == "flat" else file)
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def look(name):
        folder = Path(torch.hub.get_dir())
        seen.append((name, all((folder / file).is_file() for file in WEIGHTS[name])))
        return torch.nn.Identity()

    monkeypatch.setattr(
        sys.modules["torchmetrics.image.lpip"], "LearnedPerceptualImagePatchSimilarity", lambda **_: look("lpips")
    )
    monkeypatch.setattr(sys.modules["pyiqa"], "create_metric", lambda name, device: look(name))
    make_scores(names, weights_dir=tmp_path)
    assert seen == [(name, True) for name in names]
    assert download.DEFAULT_CACHE_DIR.endswith("pyiqa")
    assert torch.hub.get_dir() == before
    next(tmp_path.rglob("RN50.pt")).unlink()
    with pytest.raises(EbrError, match=r"lacks the weights RN50\.pt"):
        make_scores(names, weights_dir=tmp_path)


def test_missing_weights_are_told(libraries, monkeypatch):
    def offline(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(sys.modules["torchmetrics.image.lpip"], "LearnedPerceptualImagePatchSimilarity", offline)
    with pytest.raises(EbrError, match=r"lpips: its weights.*checkpoints.*no route to host"):
        make_scores(["lpips"])


def test_the_real_lpips_tells_pictures_apart():
    try:
        score = make_scores(["lpips"])["lpips"]
    except EbrError as error:
        pytest.skip(str(error))
    result, target = pair(64, 64)
    assert score(target, target) == pytest.approx(0, abs=1e-6)
    assert score(result, target) > 0.01
