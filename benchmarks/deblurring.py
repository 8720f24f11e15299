"""`python -m benchmarks.quality blur`: what taking the blur out first, and the prompt after that, do for blurred photos.

Ten photos, blurred as in `ebr-engine eval` at three strengths, at the heaviest also stored as JPEG, and shaken as heavy damage
has it (`media/heavy.py`); clean ones beside them. Each as it is, through the bundled prompt for blur without deconvolution,
deconvolved alone, and as `--task blur` restores it. Where a shaken camera's picture lay cannot be told from it: *aligned* is the
PSNR where input and result are moved by the whole pixels, 4 at most, that suit each best. Seconds are of the CPU, for a photo.
"""

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import fmean
from time import process_time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.report import columns
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.photos import TEN, load_photo, make_case
from ebr_engine.media.deconvolution import deconvolved
from ebr_engine.media.degradations import seeds
from ebr_engine.media.heavy import shake

JPEG = 85
REACH = 4  # pixels that a result may be moved by
STRENGTHS = {"mild": 0.25, "middling": 0.5, "heavy": 0.75}
DAMAGES = (*STRENGTHS, "heavy, JPEG", "shaken", "clean")


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--photos", nargs="+", choices=TEN, default=TEN)
    parser.add_argument("--damages", nargs="+", choices=DAMAGES, default=DAMAGES)
    parser.add_argument("--size", type=int, default=256, help="side of the photos in pixels")
    parser.add_argument("--quick", action="store_true", help="one photo, one damage, to try the benchmark itself")


def measure(options: Namespace) -> dict[str, Any]:
    """Blurred photos as they are, deconvolved, through the prompt, and both: PSNR, aligned PSNR, SSIM and seconds."""
    restorer = Restorer("mini", device="cpu", precision="fp32")
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "input": lambda picture: picture,
        "prompt alone": lambda picture: restorer.restore(picture, "blur", deconvolve="off"),
        "deconvolution alone": deconvolved,
        "both": lambda picture: restorer.restore(picture, "blur", deconvolve="on"),
    }
    photos, damages = (options.photos[:1], options.damages[:1]) if options.quick else (options.photos, options.damages)
    rows = []
    for damage in damages:
        pairs = [damaged(photo, damage, options.size) for photo in photos]
        for way, restore in ways.items():
            started = process_time()
            results = [eight_bit(restore(seen)) for _, seen in pairs]
            seconds = (process_time() - started) / len(pairs)
            rows.append({"damage": damage, "way": way, "seconds": seconds} | scores(results, [clean for clean, _ in pairs]))
    return {"size": options.size, "photos": list(photos), "rows": rows}


def damaged(photo: str, damage: str, size: int) -> tuple[Tensor, Tensor]:
    """A photo [1, 3, H, W], clean and damaged, the latter in 8 bit."""
    clean, _ = load_photo(photo, size)
    if damage == "clean":
        return clean, eight_bit(clean)
    if damage == "shaken":
        generator = torch.Generator().manual_seed(seeds("test").start + TEN.index(photo))
        return clean, eight_bit(shake(clean, generator))
    name, _, stored = damage.partition(", ")
    seen = make_case(photo, "blur", size, STRENGTHS[name]).degraded
    return clean, jpeg(seen) if stored else seen


def jpeg(picture: Tensor) -> Tensor:
    """A picture [1, 3, H, W] in 8 bit after JPEG of quality 85, with half of the colours' resolution."""
    file = io.BytesIO()
    Image.fromarray((picture[0].movedim(0, -1) * 255).round().byte().numpy()).save(file, "JPEG", quality=JPEG)
    return torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0)[None].float() / 255


def eight_bit(picture: Tensor) -> Tensor:
    return (picture.clamp(0, 1) * 255).round() / 255


def scores(results: list[Tensor], cleans: list[Tensor]) -> dict[str, float]:
    """Means over the photos."""
    pairs = list(zip(results, cleans))
    return {
        "psnr": fmean(psnr(*pair) for pair in pairs),
        "aligned": fmean(aligned(*pair) for pair in pairs),
        "ssim": fmean(ssim(*pair) for pair in pairs),
    }


def aligned(result: Tensor, clean: Tensor) -> float:
    """The largest PSNR in dB of a result that is moved by whole pixels, its border left out."""
    inside = (..., slice(REACH, -REACH), slice(REACH, -REACH))
    moves = [(down, aside) for down in range(-REACH, REACH + 1) for aside in range(-REACH, REACH + 1)]
    return max(psnr(result.roll(move, (2, 3))[inside], clean[inside]) for move in moves)


def table(found: dict[str, Any]) -> str:
    """What a person reads."""
    kinds = {"damage": "", "way": "", "psnr": ".2f", "aligned": ".2f", "ssim": ".3f", "seconds": ".2f"}
    rows = [[format(row[name], kind) for name, kind in kinds.items()] for row in found["rows"]]
    title = f"mini, {found['size']} x {found['size']}, means of {len(found['photos'])} photo(s)"
    return "\n".join([title, columns(list(kinds), rows)])
