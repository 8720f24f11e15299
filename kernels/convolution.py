"""3 × 3 convolutions of frames, summed over the latest few: what a causal VAE spends its time in.

y = bias + added + Σ frames[i] ∗ weight[:, :, i]          zeros around every frame

On a CPU in float32 native code computes it by Winograd's F(4 × 4, 3 × 3), a quarter of the products, without putting the frames
together: its rounding is some ten times that of plain sums (relative 2e-6), and grows with no size. Elsewhere it is the
library's convolution. No gradients: codecs are never learned.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend


def convolution_ref(
    frames: Sequence[Tensor | None], weight: Tensor, bias: Tensor | None, added: Tensor | None, doubled: bool
) -> Tensor:
    """The formula with the library's convolution, a frame at a time."""
    out = None
    for i, frame in enumerate(frames):
        if frame is None:
            continue
        x = F.interpolate(frame, scale_factor=2.0, mode="nearest") if doubled else frame
        part = F.conv2d(x, weight[:, :, i], bias if out is None else None, padding=1)
        out = part if out is None else out.add_(part)
    return out if added is None else out.add_(added)


def convolution(
    frames: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    doubled: bool = False,
    over_added: bool = False,
) -> Tensor:
    """Convolve frames and add what comes of them.

    Args: `frames`, each [B, C, h, w], the oldest first, None for zeros, the last one never; `weight` [O, C, frames, 3, 3];
    `bias` [O]; `added` like the result; `doubled`: frames are magnified twice first, every pixel to 2 × 2; `over_added`: the
    result may take the place of `added`, which is needed no more.
    Returns: [B, O, h, w], or [B, O, 2h, 2w] if doubled. Fast where channels lie side by side, in `weight` too.
    """
    cpu = backend.native(frames[-1], weight, bias, added)
    if cpu and (out := cpu.convolution(frames, weight, bias, added, doubled, over_added)) is not None:
        return out
    return convolution_ref(frames, weight, bias, added, doubled)


def packed(weight: Tensor) -> Tensor:
    """The same numbers [O, C, frames, 3, 3] in the order in which they are read fastest: frame, output, pixel, channel."""
    return weight.permute(2, 0, 3, 4, 1).contiguous().permute(1, 4, 0, 2, 3)
