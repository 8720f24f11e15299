"""Layers that the VAEs of Wan and FLUX are made of, with diffusers' names of weights.

Between layers frames are [T, C, H, W] with channels side by side: T consecutive frames of a clip, or one picture. A layer of a
causal network is given `cache`, by layer the last frames of its input: it reads what was and puts what is, never writing into
a tensor, so that a copy of the dict is a state to go back to.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.kernels.channel_norm_silu import channel_norm_silu
from ebr_engine.kernels.convolution import convolution, packed

Cache = dict[int, tuple[Tensor, ...]]  # by layer: frames [1, C, H, W], the oldest first, at most those that it reads


class RmsNorm(nn.Module):
    """Wan's norm over the channels of a pixel, and SiLU if asked for. `dims`: of the weight behind its channels."""

    def __init__(self, channels: int, dims: int = 3, silu: bool = True):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))
        self.silu = silu

    def forward(self, x: Tensor, before: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """[T, C, H, W] → the same, behind `before` if that is given, perhaps in the place of x."""
        return channel_norm_silu(x, self.gamma.flatten(), silu=self.silu, before=before, overwrite=overwrite)


class GroupNorm(nn.GroupNorm):
    """The norm of a frame over groups of channels, and SiLU if asked for."""

    def __init__(self, groups: int, channels: int, silu: bool = True):
        super().__init__(groups, channels, eps=1e-6)
        self.silu = silu

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """[T, C, H, W] → the same, perhaps in the place of x."""
        return channel_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, self.silu, overwrite=overwrite)


class Convolution(nn.Module):
    """3 × 3 pixels of one frame after the other, with zeros around; `doubled` magnifies frames first."""

    def __init__(self, channels: int, outputs: int, doubled: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, channels, 3, 3).contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.doubled = doubled
        _start(self)

    def forward(self, x: Tensor, added: Tensor | None = None, over_added: bool = False) -> Tensor:
        """[T, C, H, W], and what is added to the result → [T, outputs, H, W], twice as high and wide if doubled.

        `over_added`: what is added is needed no more, and the result may take its place.
        """
        weight = self.weight.unsqueeze(2)
        more = [None] * len(x) if added is None else pieces_of(added)
        parts = zip(pieces_of(x), more)
        return joined([convolution([frame], weight, self.bias, one, self.doubled, over_added) for frame, one in parts])


class Halving(nn.Conv2d):
    """3 × 3 pixels of every second row and column, with zeros below and to the right."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, H, W] → [T, C, H/2, W/2]."""
        return joined([F.conv2d(F.pad(frame, (0, 1, 0, 1)), self.weight, self.bias, stride=2) for frame in pieces_of(x)])


class Pointwise(nn.Module):
    """A linear layer over the channels of every pixel; `dims`: of the weight behind outputs and channels."""

    def __init__(self, channels: int, outputs: int, dims: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, channels, *[1] * dims))
        self.bias = nn.Parameter(torch.empty(outputs))
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, H, W] → [T, outputs, H, W]."""
        return linear([x], [self.weight.flatten(1)], self.bias)


class CausalConvolution(nn.Module):
    """3 × 3 pixels of a frame and of the two before it; nothing was before the first.

    The norm in front of it is called here: what it writes is what is remembered, and what is convolved.
    """

    number: int  # in its network, which the cache knows it by

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(packed(torch.empty(outputs, channels, 3, 3, 3)))
        self.bias = nn.Parameter(torch.empty(outputs))
        _start(self)

    def forward(
        self,
        x: Tensor,
        cache: Cache,
        norm: RmsNorm | None = None,
        added: Tensor | None = None,
        overwrite: bool = False,
        over_added: bool = False,
    ) -> Tensor:
        """[T, C, H, W] → [T, outputs, H, W]; `added` like the result; `overwrite`, `over_added`: x, or what is added, is
        needed no more, and its place may be taken."""
        before = cache.get(self.number, ())
        if len(x) > 1:
            return self._several(x, cache, before, norm, added)
        x = x if norm is None else norm(x, overwrite=overwrite)
        frames = [*before, x]
        cache[self.number] = tuple(frames[-2:])
        return convolution([None] * (3 - len(frames)) + frames, self.weight, self.bias, added, over_added=over_added)

    def _several(self, x: Tensor, cache: Cache, before: tuple, norm: nn.Module | None, added: Tensor | None) -> Tensor:
        """Of frames that lie one behind the other, those before them in front: one convolution of the library."""
        zeros = x.new_zeros(1, *x.shape[1:])
        front = torch.cat([zeros] * (2 - len(before)) + list(before))
        x = torch.cat((front, x)) if norm is None else norm(x, front)
        cache[self.number] = tuple(x[-2:].clone().split(1))
        y = F.conv3d(x.transpose(0, 1)[None], self.weight, self.bias, padding=(0, 1, 1))[0].transpose(0, 1)
        return y if added is None else y.add_(added)


class Attention(nn.Module):
    """Attention of every position of a frame to all, in one head; the projections are made by who inherits."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [T, C, H, W] → the same shape as `x`, channels side by side."""
        q, k, v = (t.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1) for t in (q, k, v))  # [T, 1, pixels, C]
        y = F.scaled_dot_product_attention(q, k, v)
        return y.squeeze(1).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def linear(frames: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """bias + Σ frames[i] · weights[i]ᵀ over the channels of every pixel: [T, C, H, W] each → [T, outputs, H, W]."""
    shape = frames[-1].shape
    rows = [frame.permute(0, 2, 3, 1).reshape(-1, shape[1]) for frame in frames]
    y = F.linear(rows[-1], weights[-1], bias)
    for x, weight in zip(rows[:-1], weights[:-1]):
        y = y.addmm_(x, weight.t())
    return y.view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2)


def joined(frames: Sequence[Tensor]) -> Tensor:
    """Frames one behind the other; a single one as it is."""
    return frames[0] if len(frames) == 1 else torch.cat(list(frames))


def laid_out(x: Tensor) -> Tensor:
    """[1, C, T, H, W] → [T, C, H, W], channels side by side."""
    return x[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)


def put_back(x: Tensor) -> Tensor:
    """The inverse of `laid_out`, in whatever order it lies."""
    return x.transpose(0, 1)[None]


def pieces_of(x: Tensor) -> Sequence[Tensor]:
    """Frames one by one on a CPU, where that keeps what is in work small; all of them at once elsewhere."""
    return x.split(1) if x.is_cpu and len(x) > 1 else (x,)


def through(x: Tensor, blocks: Sequence[Callable[[Tensor, Cache], Sequence[Tensor]]], cache: Cache) -> Tensor:
    """What blocks make of frames [T, …]: each gives pieces, and a piece goes through all that follow before the next one.

    A block that waits for another frame gives none.
    """
    waiting, done = [(piece, 0) for piece in reversed(pieces_of(x))], []
    del x
    while waiting:
        piece, place = waiting.pop()
        if place == len(blocks):
            done.append(piece)
        else:
            waiting += [(made, place + 1) for made in reversed(blocks[place](piece, cache))]
    return joined(done)


def _start(layer: nn.Module) -> None:
    """As torch starts its own convolutions, for who makes a random network."""
    bound = layer.weight[0].numel() ** -0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layer.bias, -bound, bound)
