"""What waits on the CPU while the device does not need it: the codec, and the transformer's blocks one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ebr_engine.backbones.base import Backbone, Codec


def offloaded(backbone: "Backbone", device: torch.device, mode: str) -> "Backbone":
    """The same backbone set to run on `device`; `mode` says what waits on the CPU: `none`, `codec`, or `blocks` (both).

    For `blocks` the trunk has to be on the CPU when it comes in.
    """
    if mode == "none":
        return backbone
    in_every_step = backbone.spec.moves  # mini's, which has no weights
    codec = backbone.codec.to(device) if in_every_step else OffloadedCodec(backbone.codec, device)
    if mode == "blocks":
        lists = block_lists(backbone.trunk)
        for child in backbone.trunk.children():
            if not any(child is blocks for blocks in lists):
                child.to(device)
        BlockOffload(list(chain(*lists)), device)
    return replace(backbone, codec=codec, device=device)


def block_lists(trunk: nn.Module) -> list[nn.ModuleList]:
    """The transformer's blocks, in the lists that run one after the other."""
    return [part for part in trunk.children() if isinstance(part, nn.ModuleList)]


class OffloadedCodec:
    """A codec that lies on the CPU; copies of its weights are on the device while it encodes or decodes.

    The weights never change, so nothing is copied back: the copies are dropped, and those that waited are there again.
    """

    def __init__(self, codec: "Codec", device: torch.device):
        self.codec, self.device = codec.to("cpu"), device

    def __getattr__(self, name: str) -> Any:
        """What a codec tells of itself, which waits for nothing."""
        if name == "codec":  # not yet there
            raise AttributeError(name)
        return getattr(self.codec, name)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `base.Codec`."""
        with self._there() as codec:
            return codec.encode(pixels)

    def decode(self, latent: Tensor) -> Tensor:
        """See `base.Codec`."""
        with self._there() as codec:
            return codec.decode(latent)

    @contextmanager
    def _there(self) -> Iterator["Codec"]:
        waiting = [(weight, weight.data) for weight in self.codec.parameters()]
        try:
            yield self.codec.to(self.device)
        finally:
            for weight, host in waiting:
                weight.data = host
            self.codec.to("cpu")


def inner(codec: "Codec") -> "Codec":
    """The codec itself, where one waits on the CPU."""
    return getattr(codec, "codec", codec)


class BlockOffload:
    """Blocks whose weights lie in (pinned) host memory; the next block's are copied while one computes: two at most are there.

    Works through hooks on the blocks, which are always run in order, over and over.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.device = device
        self.weights = [[*block.parameters(), *block.buffers()] for block in blocks]
        self.host = [[_pinned(weight.data, device) for weight in weights] for weights in self.weights]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.there: dict[int, list[Tensor]] = {}
        self.most = 0  # blocks that were on the device at once
        for i, block in enumerate(blocks):
            self._place(i, self.host[i])
            block.register_forward_pre_hook(partial(self._enter, i))
            block.register_forward_hook(partial(self._leave, i))

    def _enter(self, i: int, *_: object) -> None:
        self._fetch(i)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for weight in self.there[i]:
                weight.record_stream(current)
        self._place(i, self.there[i])
        self._fetch((i + 1) % len(self.host))

    def _leave(self, i: int, *_: object) -> None:
        self._place(i, self.host[i])
        del self.there[i]

    def _fetch(self, i: int) -> None:
        if i in self.there:
            return
        with torch.cuda.stream(self.stream):  # None: no stream, no effect
            self.there[i] = [weight.to(self.device, non_blocking=True, copy=True) for weight in self.host[i]]
        self.most = max(self.most, len(self.there))

    def _place(self, i: int, tensors: Sequence[Tensor]) -> None:
        for weight, tensor in zip(self.weights[i], tensors):
            weight.data = tensor


def _pinned(weight: Tensor, device: torch.device) -> Tensor:
    return weight.cpu().pin_memory() if device.type == "cuda" else weight.cpu()
