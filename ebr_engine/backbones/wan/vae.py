"""Wan's causal 3-D VAE, of 2.1 and of 2.2 TI2V-5B (shortcuts, patches), with diffusers' names of weights.

A network is two halves, as `backbones/vae.py` runs them: the fine half goes depth first, a frame after the other where that is
possible, so that what is in work is a few frames wherever the clip's frames become four times as many.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebr_engine.backbones.vae_layers import (
    Attention,
    Cache,
    CausalConvolution,
    Convolution,
    Halving,
    Pointwise,
    RmsNorm,
    joined,
    linear,
    through,
)

MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class WanVaeConfig:
    """Sizes as config.json has them; the defaults are Wan 2.1's."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: Sequence[float] = ()
    temperal_downsample: Sequence[bool] = (False, True, True)
    latents_mean: Sequence[float] = MEAN
    latents_std: Sequence[float] = STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None


class WanVae(nn.Module):
    """The whole network; its halves are called one by one."""

    def __init__(self, config: WanVaeConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = Pointwise(2 * config.z_dim, 2 * config.z_dim, 3)
        self.post_quant_conv = Pointwise(config.z_dim, config.z_dim, 3)
        for number, layer in enumerate(self.modules()):
            layer.number = number  # which caches know it by


class Encoder(nn.Module):
    """Pixels → moments."""

    def __init__(self, config: WanVaeConfig):
        super().__init__()
        widths = [config.base_dim * by for by in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConvolution(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (channels, outputs) in enumerate(itertools.pairwise(widths)):
            time = i < last and config.temperal_downsample[i]
            if config.is_residual:
                self.down_blocks.append(ShortcutDown(channels, outputs, config.num_res_blocks, time, i < last))
                continue
            inner = [channels] + [outputs] * config.num_res_blocks
            self.down_blocks.extend(Residual(*pair) for pair in itertools.pairwise(inner))
            if i < last:
                self.down_blocks.append(Downsample(outputs, time))
        self.mid_block = Middle(widths[-1])
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = CausalConvolution(widths[-1], 2 * config.z_dim)

    def fine(self, x: Tensor, cache: Cache) -> Tensor:
        """Frames [T, channels, H, W] of a group → features [1, C, h, w]."""
        return through(x, [lambda part, cache: [self.conv_in(part, cache)], *self.down_blocks], cache)

    def coarse(self, x: Tensor, cache: Cache) -> Tensor:
        """Features → moments [1, 2·z_dim, h, w], before `quant_conv`."""
        return self.conv_out(self.mid_block(x, cache), cache, self.norm_out, overwrite=True)


class Decoder(nn.Module):
    """Latent → pixels."""

    def __init__(self, config: WanVaeConfig):
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * by for by in (config.dim_mult[-1], *reversed(config.dim_mult))]
        doubles, last = list(reversed(config.temperal_downsample)), len(config.dim_mult) - 1
        self.conv_in = CausalConvolution(config.z_dim, widths[0])
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (channels, outputs) in enumerate(itertools.pairwise(widths)):
            time, up = i < last and doubles[i], i < last
            if config.is_residual:
                self.up_blocks.append(ShortcutUp(channels, outputs, config.num_res_blocks, time, up))
            else:
                inner = channels if i == 0 else channels // 2
                self.up_blocks.append(Up(inner, outputs, config.num_res_blocks, time, up, first=i == 0))
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = CausalConvolution(widths[-1], config.out_channels)

    def coarse(self, z: Tensor, cache: Cache) -> Tensor:
        """Latent [1, z_dim, h, w], after `post_quant_conv` → features [1, C, h, w]."""
        return self.mid_block(self.conv_in(z, cache), cache)

    def fine(self, x: Tensor, cache: Cache) -> Tensor:
        """Features → frames [T, channels, H, W] of the group."""
        blocks = [part for block in self.up_blocks for part in block.parts()]
        return through(x, [*blocks, lambda part, cache: [self.conv_out(part, cache, self.norm_out, overwrite=True)]], cache)


class Residual(nn.Module):
    """Two convolutions beside a shortcut; `last`: nobody else has what it is given, whose place the result may take."""

    def __init__(self, channels: int, outputs: int, last: bool = False):
        super().__init__()
        self.last = last
        self.norm1, self.conv1 = RmsNorm(channels), CausalConvolution(channels, outputs)
        self.norm2, self.conv2 = RmsNorm(outputs), CausalConvolution(outputs, outputs)
        self.conv_shortcut = Pointwise(channels, outputs, 3) if channels != outputs else nn.Identity()

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, channels, H, W] → one piece [T, outputs, H, W]."""
        beside, y = self.conv_shortcut(x), self.conv1(x, cache, self.norm1)
        over = self.last or beside is not x
        return [self.conv2(y, cache, self.norm2, added=beside, overwrite=True, over_added=over)]


class FrameAttention(Attention):
    """Attention within every frame, added to it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RmsNorm(channels, dims=2, silu=False)
        self.to_qkv, self.proj = Pointwise(channels, 3 * channels, 2), Pointwise(channels, channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, H, W] → the same."""
        return x + self.proj(self.attend(x, *self.to_qkv(self.norm(x)).chunk(3, dim=1)))


class Middle(nn.Module):
    """Where every position of a frame sees all others."""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([Residual(channels, channels), Residual(channels, channels)])
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        """[T, C, H, W] → the same."""
        (x,) = self.resnets[0](x, cache)
        return self.resnets[1](self.attentions[0](x), cache)[0]


class TimeConvolution(nn.Module):
    """A linear layer over a pixel in three frames."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, channels, 3, 1, 1).uniform_(-1, 1).div_((3 * channels) ** 0.5))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, frames: Sequence[Tensor], part: slice = slice(None)) -> Tensor:
        """Up to three frames [1, C, H, W], the last of which counts as the third → `part` of [1, outputs, H, W]."""
        weights = self.weight[part, :, 3 - len(frames) :, 0, 0].unbind(-1)
        return linear(frames, weights, self.bias[part])


class Downsample(nn.Module):
    """Half the height and width; with `time` also half the frames, but for a clip's first, which stays."""

    number: int

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), Halving(channels))
        self.time_conv = TimeConvolution(channels, channels) if time else None

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, C, H, W] → [t, C, H/2, W/2] in one piece, or none where a second frame is still to come."""
        x = self.resample(x)
        if self.time_conv is None:
            return [x]
        if self.number not in cache:
            cache[self.number] = (x,)
            return [x]
        frames = [*cache[self.number], *x.split(1)]
        made = [self.time_conv(frames[i : i + 3]) for i in range(0, len(frames) - 2, 2)]
        cache[self.number] = kept(frames[2 * len(made) :], x)
        return [joined(made)] if made else []


class Upsample(nn.Module):
    """Twice the height and width; with `time` also twice the frames, but for a clip's first."""

    number: int

    def __init__(self, channels: int, outputs: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), Convolution(channels, outputs, doubled=True))
        self.time_conv = TimeConvolution(channels, 2 * channels) if time else None

    def starts(self, cache: Cache) -> bool:
        """Whether what comes next is a clip's first frame, which stays one."""
        return self.time_conv is not None and self.number not in cache

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, C, H, W] → [t, outputs, 2H, 2W], in pieces."""
        if self.starts(cache):
            cache[self.number] = ()  # the second frame does not see it
        elif self.time_conv is not None:
            before, half = cache[self.number], x.shape[1]
            frames = [*before, *x.split(1)]
            windows = [frames[max(0, i - 2) : i + 1] for i in range(len(before), len(frames))]
            cache[self.number] = kept(frames[-2:], x)
            pieces = [self.time_conv(window, slice(i, i + half)) for window in windows for i in (0, half)]
            return [self.resample(piece) for piece in (pieces if x.is_cpu else [joined(pieces)])]
        return [self.resample(x)]


class Up(nn.Module):
    """A stage of the decoder; `first` of them."""

    def __init__(self, channels: int, outputs: int, count: int, time: bool, up: bool, first: bool):
        super().__init__()
        inner = itertools.pairwise([channels] + [outputs] * (count + 1))
        self.resnets = nn.ModuleList(Residual(*pair, last=i > 0 or not first) for i, pair in enumerate(inner))
        self.upsamplers = nn.ModuleList([Upsample(outputs, outputs // 2, time)] if up else [])

    def parts(self) -> list[nn.Module]:
        """What frames go through, one after the other."""
        return [*self.resnets, *self.upsamplers]


class ShortcutUp(nn.Module):
    """A stage of Wan 2.2's decoder: beside it what came in, every channel repeated over the new frames and pixels."""

    def __init__(self, channels: int, outputs: int, count: int, time: bool, up: bool):
        super().__init__()
        inner = [channels] + [outputs] * (count + 1)
        self.resnets = nn.ModuleList(Residual(*pair) for pair in itertools.pairwise(inner))
        self.upsampler = Upsample(outputs, outputs, time) if up else None
        self.outputs, self.frames = outputs, 2 if time else 1

    def parts(self) -> list[nn.Module]:
        """What frames go through, one after the other."""
        return [self]

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, channels, H, W] → [t, outputs, …], in pieces."""
        y = x
        for block in self.resnets:
            (y,) = block(y, cache)
        if self.upsampler is None:
            return [y]
        first = self.upsampler.starts(cache)
        pieces = self.upsampler(y, cache)
        beside = self._repeated(x)[self.frames - 1 if first else 0 :]
        return [piece.add_(one) for piece, one in zip(pieces, beside.split(len(pieces[0])))]

    def _repeated(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(self.outputs * self.frames * 4 // x.shape[1], dim=1)
        x = x.unflatten(1, (self.outputs, self.frames, 2, 2))  # [T, outputs, frames, rows, columns, H, W]
        return x.permute(0, 2, 1, 5, 3, 6, 4).flatten(5, 6).flatten(3, 4).flatten(0, 1)


class ShortcutDown(nn.Module):
    """A stage of Wan 2.2's encoder: beside it the means of what came in."""

    number: int

    def __init__(self, channels: int, outputs: int, count: int, time: bool, down: bool):
        super().__init__()
        inner = [channels] + [outputs] * count
        self.resnets = nn.ModuleList(Residual(*pair) for pair in itertools.pairwise(inner))
        self.downsampler = Downsample(outputs, time) if down else None
        self.outputs, self.frames, self.side = outputs, 2 if time else 1, 2 if down else 1

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, channels, H, W] → [t, outputs, …] in one piece, or none where a second frame is still to come."""
        y = x
        for block in self.resnets:
            (y,) = block(y, cache)
        made = [y] if self.downsampler is None else self.downsampler(y, cache)
        frames = [*cache.get(self.number, (torch.zeros_like(x[:1]),) * (self.frames - 1)), *x.split(1)]
        groups = [frames[i : i + self.frames] for i in range(0, len(frames) - self.frames + 1, self.frames)]
        cache[self.number] = kept(frames[len(groups) * self.frames :], x)
        return [y + joined([self._mean(group) for group in groups]) for y in made]

    def _mean(self, frames: Sequence[Tensor]) -> Tensor:
        """Frames [1, C, H, W] → [1, outputs, h, w]."""
        x = joined(frames).unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))  # [t, C, h, rows, w, columns]
        return x.permute(1, 0, 3, 5, 2, 4).flatten(0, 3).unflatten(0, (self.outputs, -1)).mean(1)[None]


def kept(frames: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Frames to remember; of several in one tensor copies, for it would be kept whole."""
    return tuple(frame.clone() if len(x) > 1 else frame for frame in frames)
