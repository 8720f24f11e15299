"""How pictures are brought to the size at which they are measured.

`released` is what the authors' inference code does: input and target are resized (bicubic with antialiasing, 8 bit) to
480×832 for clips and Wan, the first 33 frames, or to 1024×1024 for FLUX; the result and the target are then resized to 512×512
(bicubic without antialiasing) and measured in RGB, unrounded; a clip's score is the mean over its frames, the set's the mean
over files. Of SICE it counts the first three exposures of each scene only, the files numbered 1 to 3: 174 of 565. The files that
it saves are truncated to 8 bit and JPEG: measuring those gives other numbers than it prints.

`native` measures at the file's own size. `y-channel` does so on BT.601 luma, not rounded and without a border cut off, as BasicSR
and the scripts of deraining do (Ren et al., PReNet, arXiv 1901.09221); Restormer's script (arXiv 2111.09881) rounds luma to 8 bit
first, which moves PSNR in the second decimal.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.backbones.registry import BACKBONES, spec
from ebr_engine.errors import EbrError
from ebr_engine.evaluation.choices import PROTOCOLS
from ebr_engine.evaluation.paired import Item

METRIC_SIDE = 512
SICE, SICE_LAST = "SICE", 3  # a data set of exposures, and the last that counts
RELEASED_FRAMES = 33


@dataclass(frozen=True)
class Protocol:
    """How a file is measured. Frames are [F, 3, H, W] float32 in [0, 1]."""

    name: str
    about: str  # what is printed with every result
    size: tuple[int, int] | None = None  # height and width that input and target are brought to; None is their own
    side: int | None = None  # of the square that result and target are compared at
    frames: int | None = None  # of a clip, from its beginning
    on_luma: bool = False  # PSNR and SSIM
    rounded: bool = True  # results are measured as a file would hold them, not as the decoder gives them

    def prepared(self, frames: Tensor) -> Tensor:
        """Input or target frames at the size that the model sees."""
        if self.size is None or tuple(frames.shape[-2:]) == self.size:
            return frames
        levels = (frames * 255).round().byte()  # of bytes, torch's result is Pillow's but for rounding
        return F.interpolate(levels, self.size, mode="bicubic", antialias=True).float() / 255

    def result(self, frames: Tensor, native: tuple[int, int], name: str) -> Tensor:
        """Frames of a restored file at the size that the model gave; `native`: the size of its input or target.

        Raises `EbrError` naming the file when it has neither that size nor the protocol's.
        """
        size = tuple(frames.shape[-2:])
        if size == self.size:
            return frames
        if size != native:
            wanted = " or ".join(f"{w} x {h}" for h, w in dict.fromkeys(filter(None, (native, self.size))))
            raise EbrError(f"{name}: has {size[1]} x {size[0]} pixels, not {wanted} as the file that it is compared with")
        return self.prepared(frames)

    def compared(self, frames: Tensor) -> Tensor:
        """Result or target frames at the size at which they are measured."""
        if self.side is None:
            return frames
        return F.interpolate(frames, (self.side, self.side), mode="bicubic", antialias=False).clamp(0, 1)


def protocol_for(name: str, backbone: str | None, clip: bool) -> Protocol:
    """The protocol of a name for a picture or a clip; wan and flux have a size each, without them the kind of file decides."""
    if name == "released":
        known = {name: one for name in BACKBONES if (one := spec(name)).released_size}
        model = known.get(backbone) or next(one for one in known.values() if one.knows_time == clip)
        height, width = model.released_size
        frames = RELEASED_FRAMES if clip else None
        about = f"released: {height}x{width}{f', first {frames} frames' if frames else ''}, measured at "
        about += f"{METRIC_SIDE}x{METRIC_SIDE} (bicubic, no antialiasing), RGB"
        return Protocol(name, about, (height, width), METRIC_SIDE, frames, rounded=False)
    if name == "native":
        return Protocol(name, "native: each file at its own size, RGB")
    if name == "y-channel":
        return Protocol(name, "y-channel: each file at its own size, PSNR and SSIM on BT.601 luma (16 to 235)", on_luma=True)
    raise EbrError(f"unknown protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")


def counts(protocol: str, item: Item) -> bool:
    """Whether a protocol measures an item: `released` leaves out SICE's files that are numbered above 3."""
    path = (item.source or item.restored).paths[0]
    number = path.name.split(".")[0]
    return not (protocol == "released" and SICE in path.as_posix() and number.isdigit() and int(number) > SICE_LAST)


def as_frame(pixels: np.ndarray) -> Tensor:
    """One frame, an array [H, W, 3], as [1, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
