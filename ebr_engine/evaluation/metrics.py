"""Scores of restored pictures: PSNR and SSIM here, learned ones through the libraries that hold their weights.

Pictures are [1, 3, H, W] float in [0, 1]. Sources: SSIM, Wang et al., "Image Quality Assessment: From Error Visibility to
Structural Similarity", 2004; LPIPS, Zhang et al., arXiv 1801.03924; DISTS, Ding et al., arXiv 2004.07728; CLIP-IQA+, Wang et
al., arXiv 2207.12396; MUSIQ, Ke et al., arXiv 2108.05997. Luma: ITU-R BT.601, in MATLAB's form (`rgb2ycbcr` of doubles), as
deraining is measured since Yang et al., "Deep Joint Rain Detection and Removal from a Single Image", 2017.

PSNR-Y has two meanings. BasicSR's (`psnr-y`, and `psnr` under the protocol y-channel) is of luma from 16 to 235 against a peak of
255; pyiqa's (`psnr-y-full`, there `psnry`) of luma from 0 to 255, which lies 20·log10(255/219) = 1.32 dB below.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.errors import EbrError
from ebr_engine.evaluation.choices import METRICS

WINDOW = 7  # pixels, of scikit-image's SSIM
GAUSSIAN_WINDOW, GAUSSIAN_SIGMA = 11, 1.5  # of Wang's
LUMA = (65.481, 128.553, 24.966)  # of RGB in [0, 1]; luma is then 16 to 235
FULL_LUMA = (0.299, 0.587, 0.114)  # luma is then 0 to 1
# The weights that the libraries look for, below torch's folder; names hold the beginning of the content's SHA-256.
WEIGHTS = {
    "lpips": ("checkpoints/alexnet-owt-7be5be79.pth",),
    "dists": ("checkpoints/vgg16-397923af.pth", "pyiqa/DISTS_weights-f5e65c96.pth"),
    "clipiqa+": ("clip/RN50.pt", "pyiqa/CLIP-IQA+_learned_prompts-603f3273.pth"),
    "musiq": ("pyiqa/musiq_koniq_ckpt-e95806b9.pth",),
}
NON_COMMERCIAL = "pyiqa's licence (PolyForm Noncommercial, NTU S-Lab) allows no commercial use"


Score = Callable[..., float]  # of a result, and of its target where the metric needs one


def psnr(result: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], of any shape; infinite where they are equal."""
    _check_alike(result, target)
    return float(-10 * torch.log10((result.double() - target.double()).square().mean()))


def ssim(result: Tensor, target: Tensor) -> float:
    """Mean SSIM of [1, C, H, W] in scikit-image's form: 7×7 uniform windows, sample covariances, channels apart."""
    weights = torch.full((WINDOW,), 1 / WINDOW, dtype=torch.float64)
    count = WINDOW**2
    return _ssim(result, target, weights, 1.0, count / (count - 1))


def luma(picture: Tensor) -> Tensor:
    """BT.601 luma [B, 1, H, W] float64, 16 to 235 and not rounded, of RGB [B, 3, H, W] in [0, 1]."""
    weights = torch.tensor(LUMA, dtype=torch.float64)
    return 16 + torch.einsum("bchw,c->bhw", picture.double(), weights)[:, None]


def luma_psnr(result: Tensor, target: Tensor) -> float:
    """PSNR in dB of the lumas of RGB pictures [1, 3, H, W] in [0, 1]; the peak is 255."""
    _check_alike(result, target)
    return psnr(luma(result) / 255, luma(target) / 255)


def basicsr_luma_psnr(result: Tensor, target: Tensor) -> float:
    """PSNR-Y in dB as BasicSR's `calculate_psnr(test_y_channel=True, crop_border=0)` has it: of 8-bit RGB [1, 3, H, W]."""
    return luma_psnr(*((x.double().clamp(0, 1) * 255).round() / 255 for x in (result, target)))


def full_luma_psnr(result: Tensor, target: Tensor) -> float:
    """PSNR-Y in dB as pyiqa's `psnry` has it, of RGB [1, 3, H, W] in [0, 1]: luma of full range, 1e-8 added to its error."""
    _check_alike(result, target)
    weights = torch.tensor(FULL_LUMA, dtype=torch.float64)
    error = torch.einsum("bchw,c->bhw", result.double() - target.double(), weights).square().mean()
    return float(-10 * torch.log10(error + 1e-8))


def luma_ssim(result: Tensor, target: Tensor) -> float:
    """SSIM of the lumas of RGB pictures [1, 3, H, W] in the form of Wang's script: 11×11 Gaussian windows, σ 1.5, peak 255."""
    position = torch.arange(GAUSSIAN_WINDOW, dtype=torch.float64) - GAUSSIAN_WINDOW // 2
    weights = torch.exp(-0.5 * (position / GAUSSIAN_SIGMA) ** 2)
    return _ssim(luma(result), luma(target), weights / weights.sum(), 255.0, 1.0)


def _ssim(result: Tensor, target: Tensor, weights: Tensor, peak: float, correction: float) -> float:
    """`weights` [N]: the window is their outer product; `correction` scales variances."""
    _check_alike(result, target)
    if min(result.shape[-2:]) < len(weights):
        height, width = result.shape[-2:]
        raise EbrError(f"a picture of {width} x {height} pixels is too small for SSIM's windows of {len(weights)} pixels")

    def mean(planes: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    total = 0.0
    for x, y in zip(result.flatten(0, 1), target.flatten(0, 1)):  # a channel at a time: float64 of a large picture is much
        total += float(similarity(x.double()[None, None], y.double()[None, None], mean, peak, correction).mean())
    return total / result.shape[:2].numel()


def similarity(x: Tensor, y: Tensor, mean: Callable[[Tensor], Tensor], peak: float, correction: float) -> Tensor:
    """SSIM of planes in every place that has a whole window, whose `mean` that function takes; differentiable."""
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mx, my = mean(x), mean(y)
    vx, vy = correction * (mean(x * x) - mx * mx), correction * (mean(y * y) - my * my)
    covariance = correction * (mean(x * y) - mx * my)
    return (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def dissimilarity(results: Tensor, targets: Tensor) -> Tensor:
    """1 − SSIM of each of [B, C, F, H, W] in [0, 1], [B], as `ssim` has it but in their own precision; differentiable."""
    x, y = (clips.transpose(1, 2).flatten(1, 2) for clips in (results, targets))
    count = WINDOW**2
    return 1 - similarity(x, y, window_mean, 1.0, count / (count - 1)).mean((1, 2, 3))


def window_mean(planes: Tensor) -> Tensor:
    """The mean over windows of 7×7 pixels, along columns and then along rows: [N, C, H, W] → [N, C, H − 6, W − 6]."""
    return F.avg_pool2d(F.avg_pool2d(planes, (WINDOW, 1), 1), (1, WINDOW), 1)


def make_scores(
    names: Sequence[str], device: str | torch.device = "cpu", on_luma: bool = False, weights_dir: str | Path | None = None
) -> dict[str, Score]:
    """The functions of metrics by name, in the order of `METRICS`; `on_luma`: PSNR and SSIM of BT.601 luma.

    A score is called `score(result, target)`, or `score(result)` where the metric needs no target. `weights_dir`: a folder that
    holds the networks' weights, in place of torch's. Raises `EbrError` for an unknown name, with the line that installs it for a
    library that is missing, and naming the file of weights that are.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise EbrError(f"unknown metric {', '.join(unknown)}; there is: {', '.join(METRICS)}")
    if weights_dir is not None:
        _check_weights(Path(weights_dir), names)
    plain = {"psnr": luma_psnr, "ssim": luma_ssim} if on_luma else {"psnr": psnr, "ssim": ssim}
    plain |= {"psnr-y": basicsr_luma_psnr, "psnr-y-full": full_luma_psnr}
    device = torch.device(device)
    makers = {name: _lpips if name == "lpips" else _pyiqa for name in WEIGHTS}
    with _weights_from(weights_dir):
        return {name: plain[name] if name in plain else makers[name](name, device) for name in METRICS if name in names}


def _check_weights(folder: Path, names: Sequence[str]) -> None:
    """`EbrError` unless a folder holds the weights of the metrics `names`, as torch keeps them or all in one place."""
    wanted = [file for name in names for file in WEIGHTS.get(name, ())]
    if missing := [Path(file).name for file in wanted if not any((folder / x).is_file() for x in (file, Path(file).name))]:
        raise EbrError(f"{folder}: lacks the weights {', '.join(missing)}")


@contextmanager
def _weights_from(folder: str | Path | None) -> Iterator[None]:
    """Have the libraries look for weights in a folder: in checkpoints/, pyiqa/ and clip/ below it, or without those in itself."""
    if folder is None:
        yield
        return
    folder, before = Path(folder).absolute(), torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as made:
        for name in ("checkpoints", "pyiqa", "clip"):
            Path(made, name).symlink_to(folder / name if (folder / name).is_dir() else folder, target_is_directory=True)
        torch.hub.set_dir(made)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


def _lpips(name: str, device: torch.device) -> Score:
    module = _library("torchmetrics.image.lpip", name, "metrics")
    try:
        network = module.LearnedPerceptualImagePatchSimilarity(net_type="alex").to(device).eval()
    except (ImportError, RuntimeError) as error:  # torchvision is missing, or is not this torch's
        raise EbrError(f"lpips needs torchvision: pip install 'ebr-engine[metrics]' ({_first_line(error)})") from error
    except OSError as error:
        raise EbrError(_no_weights(name, error)) from error

    @torch.no_grad()
    def score(result: Tensor, target: Tensor) -> float:
        network.reset()  # it remembers every pair otherwise
        return float(network(*(2 * x.float().clamp(0, 1).to(device) - 1 for x in (result, target))))

    return score


def _pyiqa(name: str, device: torch.device) -> Score:
    module = _library("pyiqa", name, "iqa")
    if downloads := sys.modules.get("pyiqa.utils.download_util"):  # which asked for torch's folder when it was imported
        downloads.DEFAULT_CACHE_DIR = str(Path(torch.hub.get_dir(), "pyiqa"))
    try:
        network = module.create_metric(name, device=device).eval()
    except OSError as error:
        raise EbrError(_no_weights(name, error)) from error

    @torch.no_grad()
    def score(*pictures: Tensor) -> float:
        return float(network(*(x.float().clamp(0, 1).to(device) for x in pictures)).mean())

    return score


def _library(module: str, name: str, extra: str):
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that is not this torch's
        missing = module.partition(".")[0]
        note = f"; {NON_COMMERCIAL}" if extra == "iqa" else ""
        raise EbrError(f"{name} needs {missing}: pip install 'ebr-engine[{extra}]'{note} ({_first_line(error)})") from error


def _no_weights(name: str, error: OSError) -> str:
    files = ", ".join(Path(file).name for file in WEIGHTS[name])
    folder = f"{torch.hub.get_dir()}/checkpoints"
    return (
        f"{name}: its weights ({files}) could not be fetched; put them into {folder}, or name a folder by --weights-dir ({error})"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_alike(result: Tensor, target: Tensor) -> None:
    if result.shape != target.shape:
        raise EbrError(f"pictures of different sizes cannot be compared: {tuple(result.shape)} and {tuple(target.shape)}")
