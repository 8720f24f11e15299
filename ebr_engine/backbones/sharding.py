"""A transformer's tokens over several devices: shards everywhere, but in self-attention, where the heads are shared out instead.

Ulysses' scheme (arXiv 2309.14509). Every device has the same latent and all weights. Tokens are cut into equal shards once
they are made; linear layers, norms and cross-attention need no others. Around self-attention q, k and v are exchanged, so that
each device has all tokens of some heads, and its result is exchanged back. What the last layer makes is gathered once. So a
block sends four times its shard, whatever the number of devices, less what stays.

FLUX's text tokens are sharded like the picture's. Kept whole on every device, q, k and v of the text would not be sent and its
result would be gathered: 1/P·(P−1)·T rows in place of 4/P²·(P−1)·T, so fewer with two devices (of all bytes at 2048 × 2048
1.5 percent), as many with four, twice as many with eight; and every device would compute all of the text's layers, which the
other way are computed once.

A trunk has an `exchange`: `WHOLE`, which does nothing, or a `Ulysses`. The collectives are those that `torch.compile` traces,
and they have gradients.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Whole:
    """One device has all tokens: nothing is cut and nothing is exchanged. See `Ulysses` and `Shards`."""

    def over(self, *counts: int) -> "Whole":
        """For a sequence of so many tokens; of several parts where each is cut by itself."""
        return self

    def mine(self, count: int) -> range:
        return range(count)

    def summed(self, x: Tensor) -> Tensor:
        return x

    def shard(self, x: Tensor, dim: int = 1, part: int = 0) -> Tensor:
        return x

    def rows(self, x: Tensor, dim: int = 1) -> Tensor:
        return x

    def gather(self, x: Tensor, part: int = 0) -> Tensor:
        return x

    def scatter_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        return q, k, v

    def gather_heads(self, mixed: Tensor) -> Tensor:
        return mixed


WHOLE = Whole()


@dataclass(frozen=True)
class Ulysses:
    """This device's place among `size` that share a sequence; `group`: the name of their process group."""

    rank: int
    size: int
    group: str

    def over(self, *counts: int) -> "Shards":
        """For a sequence of so many tokens; of several parts where each is cut by itself."""
        return Shards(self.rank, self.size, self.group, counts)

    def mine(self, count: int) -> range:
        """Which of `count` equal pieces of work are this device's."""
        return range(self.rank, count, self.size)

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all devices."""
        return _there(torch.ops._c10d_functional.all_reduce(x, "sum", self.group))


@dataclass(frozen=True)
class Shards:
    """How a sequence of one or more parts, of `counts` tokens each, lies on the devices.

    A part's shards are equal: the last ones end in copies of its last token, to which nothing attends and which are not
    gathered.
    """

    rank: int
    size: int
    group: str
    counts: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a shard of each part."""
        return tuple(math.ceil(count / self.size) for count in self.counts)

    @property
    def padded(self) -> bool:
        return any(count % self.size for count in self.counts)

    def shard(self, x: Tensor, dim: int = 1, part: int = 0) -> Tensor:
        """This device's tokens of a part [..., count, ...] along `dim`."""
        count, length = self.counts[part], self.lengths[part]
        start = min(self.rank * length, count - 1)
        own = x.narrow(dim, start, min(length, count - start))
        missing = length - own.shape[dim]
        if not missing:
            return own
        last = x.narrow(dim, count - 1, 1)
        return torch.cat((own, last.expand(*x.shape[:dim], missing, *x.shape[dim + 1 :])), dim)

    def rows(self, x: Tensor, dim: int = 1) -> Tensor:
        """What lies on this device of rows [..., L, ...] along `dim` that are added to the first L tokens of the first part.

        Where rows are learned and none lies here, one that is zero: all devices have to take part in the backward pass.
        """
        start = min(self.rank * self.lengths[0], x.shape[dim])
        own = x.narrow(dim, start, min(self.lengths[0], x.shape[dim] - start))
        return 0 * x.narrow(dim, 0, 1) if x.requires_grad and not own.shape[dim] else own

    def gather(self, x: Tensor, part: int = 0) -> Tensor:
        """All tokens of a part, [B, count, C], from shards [B, length, C]; the same on every device."""
        shards = gathered(x, self).unflatten(0, (self.size, -1))  # [P, B, length, C]
        return shards.transpose(0, 1).flatten(1, 2)[:, : self.counts[part]]

    def scatter_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """From shards of all heads, [B, H, n, d] each, to all tokens of H/P heads, [B, H/P, N, d] each: one message a device.

        Without padding the parts' shards stay in the order of the devices, as attention asks for none.
        """
        parts = [x.unflatten(1, (self.size, -1)) for x in (q, k, v)]  # [B, P, H/P, n, d]
        sent = torch.stack([x.transpose(0, 1) for x in parts], dim=1)  # [P, 3, B, H/P, n, d]
        came = exchanged(sent, self).permute(1, 2, 3, 0, 4, 5)  # [3, B, H/P, P, n, d]
        if not self.padded:
            return came.flatten(3, 4).unbind()
        pieces = (x.flatten(3, 4)[..., :count, :] for x, count in zip(came.split(self.lengths, 4), self.counts))
        return torch.cat(tuple(pieces), dim=3).unbind()

    def gather_heads(self, mixed: Tensor) -> Tensor:
        """The inverse, of attention's result: [B, H/P, N, d] → [B, H, n, d]."""
        if self.padded:
            whole = mixed.split(self.counts, 2)
            parts = [self._fill(x, length).unflatten(2, (self.size, -1)) for x, length in zip(whole, self.lengths)]
            shards = torch.cat(parts, dim=3)  # [B, H/P, P, n, d]
        else:
            shards = mixed.unflatten(2, (self.size, -1))
        came = exchanged(shards.permute(2, 0, 1, 3, 4).contiguous(), self)  # [P, B, H/P, n, d]
        return came.transpose(0, 1).flatten(1, 2)

    def _fill(self, x: Tensor, length: int) -> Tensor:
        """[B, h, count, d] with copies of the last token, [B, h, P·length, d]."""
        missing = self.size * length - x.shape[2]
        return torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1)), dim=2) if missing else x


@contextmanager
def exchanging(part: Any, exchange: Whole | Ulysses) -> Iterator[None]:
    """A transformer or codec works with other devices; before and after, it is its own device's."""
    part.exchange = exchange
    try:
        yield
    finally:
        part.exchange = WHOLE


def exchanged(x: Tensor, shards: Shards) -> Tensor:
    """[P, ...] → [P, ...]: block i goes to device i, block i of the result has come from it."""
    return _Exchanged.apply(x, shards.group) if torch.is_grad_enabled() else _exchanged(x, shards.group)


def gathered(x: Tensor, shards: Shards) -> Tensor:
    """[B, ...] → [P·B, ...], the devices' in order."""
    arguments = x.contiguous(), shards.rank, shards.size, shards.group
    return _Gathered.apply(*arguments) if torch.is_grad_enabled() else _gathered(*arguments)


def _exchanged(x: Tensor, group: str) -> Tensor:
    ones = [1] * x.shape[0]
    return _there(torch.ops._c10d_functional.all_to_all_single(x, ones, ones, group))


def _gathered(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    return _there(torch.ops._c10d_functional.all_gather_into_tensor(x, size, group))


def _there(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


class _Exchanged(torch.autograd.Function):
    """What comes from a device goes back to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient.contiguous(), ctx.group), None


class _Gathered(torch.autograd.Function):
    """A shard's gradient is the sum of what all devices that have gathered it say: they may go on in different ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, size: int, group: str) -> Tensor:
        ctx.place = rank, size, group
        return _gathered(x, rank, size, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rank, size, group = ctx.place
        total = _there(torch.ops._c10d_functional.all_reduce(gradient.contiguous(), "sum", group))
        return total.unflatten(0, (size, -1))[rank], None, None, None
