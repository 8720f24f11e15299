"""A restoration with the detail of its input: tones from a small restored version, everything fine from the picture itself.

Haze and darkness are smooth: around every place, restored ≈ a·input + b, a channel at a time. A guided filter (He, Sun and
Tang, "Guided Image Filtering", 2013) finds a and b in small versions of both, and the map is enlarged and applied to the
picture (He and Sun, "Fast Guided Filter", arXiv 1505.00996), so that a model has to see nothing but the small version.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RADIUS = 16  # pixels of the small version, about the middle of a window
EPSILON = 1e-5  # variance below which a window counts as flat
NEIGHBOURS = 2  # frames before and after that a frame's map is smoothed over
STILL = 0.04  # mean square difference of two frames' values, over their spread in a window, at which smoothing is down to 1/e
SLAB = 1 << 18  # pixels that the map is enlarged for at once
BANDS = 128  # pairs of rows that noise is measured in
RUN = 32  # differences along a row whose mean is one measurement of noise


def detail_of_input(pixels: Tensor, small: Tensor, restored: Tensor) -> Tensor:
    """Clips [B, 3, F, H, W] with the tones that `restored` has where `small` is their small version [B, 3, F, h, w].

    All in [0, 1]; the result is float32. In a clip the map is smoothed over time (`steadied`): frames belong to one scene.
    """
    results = torch.empty_like(pixels)
    for clip, version, tones, result in zip(pixels, small, restored, results):
        frames, version, tones = (x.transpose(0, 1) for x in (clip, version, tones))  # [F, 3, H, W]
        maps = torch.cat(affine_map(version, tones, noise_of(frames)), 1)
        slope, offset = (steadied(maps, version) if len(maps) > 1 else maps).chunk(2, 1)
        applied(frames, slope, offset, result.transpose(0, 1))
    return results


def affine_map(small: Tensor, restored: Tensor, noise: Tensor | None = None, radius: int = RADIUS) -> tuple[Tensor, Tensor]:
    """a and b [N, C, h, w] of restored ≈ a·small + b, fitted in windows and averaged over all windows that hold a pixel.

    Args: `small`, `restored`: [N, C, h, w] float32 in [0, 1]. `noise` [N, C, 1, 1]: its standard deviation in the picture that
    the map is for (see `noise_of`): what varies less than that is not detail, and is not made stronger. `a` is never negative:
    what is brighter stays brighter.
    """
    flat = EPSILON if noise is None else EPSILON + noise.square()
    mean, target = boxed(small, radius), boxed(restored, radius)
    variance = boxed(small * small, radius) - mean * mean
    covariance = boxed(small * restored, radius) - mean * target
    slope = (covariance / (variance.clamp(min=0) + flat)).clamp(min=0)
    return boxed(slope, radius), boxed(target - slope * mean, radius)


def boxed(x: Tensor, radius: int) -> Tensor:
    """The mean of [N, C, h, w] over windows of 2·radius + 1 pixels either way; borders are reflected, so far as they reach."""
    for dim in (2, 3):
        reach = min(radius, x.shape[dim] - 1)
        if reach == 0:
            continue
        pad, window = [0, 0, 0, 0], [1, 1]
        pad[2 * (3 - dim) : 2 * (3 - dim) + 2] = (reach, reach)
        window[dim - 2] = 2 * reach + 1
        x = F.avg_pool2d(F.pad(x, pad, mode="reflect"), window, stride=1)
    return x


def noise_of(pictures: Tensor) -> Tensor:
    """The standard deviation [N, C, 1, 1] of the fine noise in the quietest places of pictures [N, C, H, W] in [0, 1].

    Each 2×2 pixels give a difference across both diagonals, which edges along rows and columns leave at 0; its mean size over
    runs along a row is a measurement, and a quarter of all runs is quieter than the result. Runs that are clipped to black or
    white show nothing, and do not count.
    """
    height, width = pictures.shape[-2:]
    run = min(RUN, width // 2)
    if height < 2 or run < 1:
        return pictures.new_zeros((*pictures.shape[:2], 1, 1))
    step = max(2, height // BANDS)
    count = width // (2 * run)
    top, bottom = (pictures[..., first : height - 1 + first : step, : 2 * run * count] for first in (0, 1))
    across = (top[..., 0::2] - top[..., 1::2] - bottom[..., 0::2] + bottom[..., 1::2]).abs() / 2
    sizes = across.unflatten(-1, (count, run)).mean(-1).flatten(2)
    shown = top.unflatten(-1, (count, 2 * run))
    clipped = ((shown == 0).all(-1) | (shown == 1).all(-1)).flatten(2)
    quiet = sizes.masked_fill(clipped, math.nan).nanquantile(0.25, dim=-1).nan_to_num(0)
    return (quiet * math.sqrt(math.pi / 2))[..., None, None]  # of a normal deviation, the mean size is σ·√(2/π)


def steadied(maps: Tensor, small: Tensor, reach: int = NEIGHBOURS) -> Tensor:
    """Maps [F, K, h, w] of a scene's successive frames, each averaged with its neighbours' where `small` [F, C, h, w] is still.

    Where a place changes from frame to frame, its map is that of the frame alone, so that nothing trails behind what moves.
    """
    total, weights = maps.clone(), torch.ones_like(maps[:, :1])
    for distance in range(1, min(reach, len(maps) - 1) + 1):
        before, after = slice(None, -distance), slice(distance, None)
        change = boxed((small[after] - small[before]).square().mean(1, keepdim=True), 2)
        weight = torch.exp(-change / STILL**2)
        for one, other in ((before, after), (after, before)):
            total[one] += weight * maps[other]
            weights[one] += weight
    return total / weights


def applied(pictures: Tensor, slope: Tensor, offset: Tensor, result: Tensor, slab: int = SLAB) -> None:
    """Write slope·pictures + offset, clamped to [0, 1], into `result` [N, C, H, W]: the maps [N, C, h, w] enlarged bilinearly.

    Works in slabs of rows, about `slab` pixels each, so that beside the result little memory is needed.
    """
    height, width = pictures.shape[-2:]
    rows = max(1, slab // width)
    low, high, part = _between(height, slope.shape[-2])
    for n in range(len(pictures)):
        maps = torch.stack((slope[n], offset[n]))
        for top in range(0, height, rows):
            some = slice(top, top + rows)
            first, last = int(low[top]), int(high[some][-1]) + 1
            wide = _widened(maps[..., first:last, :], width)
            a, b = wide[..., low[some] - first, :].lerp(wide[..., high[some] - first, :], part[some, None])
            torch.addcmul(b, a, pictures[n, :, some], out=b)
            result[n, :, some] = b.clamp_(0, 1)


def _widened(maps: Tensor, width: int) -> Tensor:
    low, high, part = _between(width, maps.shape[-1])
    return maps[..., low].lerp(maps[..., high], part)


def _between(size: int, small: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two of `small` cells between whose middles each of `size` pixels lies, and how far along."""
    places = ((torch.arange(size, dtype=torch.float64) + 0.5) * (small / size) - 0.5).clamp(0, small - 1)
    low = places.long()
    return low, (low + 1).clamp(max=small - 1), (places - low).float()
