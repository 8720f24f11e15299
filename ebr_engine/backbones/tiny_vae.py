"""Tiny autoencoders that others trained for the latents of Wan and FLUX: rough pictures in a hundredth of the VAE's time.

TAEHV (taew2_1: frames remember the one before them, pairs are pooled and grown) and TAESD's architecture (taef1), in their own
layout or in that of diffusers' AutoencoderTiny; which it is, and every size, is read off the names and shapes of the tensors.
They work on the latents that the transformer sees. Sources: github.com/madebyollin/taehv, github.com/madebyollin/taesd.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.vae import VaeCodec
from ebr_engine.backbones.vae_layers import Cache, Convolution, laid_out, put_back, through
from ebr_engine.errors import BackboneError

RANGE = 3  # latents are bent to within ±3 before they are decoded


class Block(nn.Module):
    """Three convolutions beside a shortcut; one that remembers is given the frame before as well, zeros before the first."""

    number: int

    def __init__(self, channels: int, outputs: int, remembers: bool):
        super().__init__()
        first, relu = Convolution(channels * (2 if remembers else 1), outputs), nn.ReLU(inplace=True)
        self.conv = nn.Sequential(first, relu, Convolution(outputs, outputs), relu, Convolution(outputs, outputs))
        self.skip = nn.Conv2d(channels, outputs, 1, bias=False) if channels != outputs else nn.Identity()
        self.remembers = remembers

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, channels, H, W] → one piece [T, outputs, H, W]."""
        y = x
        if self.remembers:
            (before,) = cache.get(self.number, (torch.zeros_like(x[:1]),))
            y = torch.cat((x, torch.cat((before, x[:-1]))), dim=1).contiguous(memory_format=torch.channels_last)
            cache[self.number] = (x[-1:].clone(),)
        for layer in self.conv[:-1]:
            y = layer(y)
        return [F.relu_(self.conv[-1](y, added=self.skip(x)))]


class Pool(nn.Module):
    """One frame of every `stride`, by all of their channels."""

    number: int

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv, self.stride = nn.Conv2d(channels * stride, channels, 1, bias=False), stride

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, C, H, W] → [T / stride, C, H, W], or nothing where frames are still to come."""
        frames = [*cache.get(self.number, ()), *x.split(1)]
        count = len(frames) // self.stride
        cache[self.number] = tuple(frames[count * self.stride :])
        return [self.conv(torch.cat(frames[i * self.stride : (i + 1) * self.stride], dim=1)) for i in range(count)]


class Grow(nn.Module):
    """Several frames of each."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv, self.stride = nn.Conv2d(channels, channels * stride, 1, bias=False), stride

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, C, H, W] → `stride` pieces of each frame."""
        parts = [part for frame in x.split(1) for part in self.conv(frame).chunk(self.stride, dim=1)]
        return [part.contiguous(memory_format=torch.channels_last) for part in parts]


class Simple(nn.Module):
    """A layer that remembers nothing; `doubled` magnifies first, `stride` takes every second row and column."""

    def __init__(self, channels: int, outputs: int, bias: bool, stride: int, doubled: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, channels, 3, 3).contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.stride, self.doubled = stride, doubled

    def forward(self, x: Tensor, cache: Cache) -> Sequence[Tensor]:
        """[T, channels, H, W] → one piece."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.doubled else x
        return [F.conv2d(x, self.weight, self.bias, self.stride, padding=1)]


def relu(x: Tensor, cache: Cache) -> Sequence[Tensor]:
    return [F.relu(x)]


class Half(nn.Module):
    """An encoder or a decoder, made of what its tensors say; they keep their places' numbers as names."""

    def __init__(self, tensors: dict[str, Tensor], decodes: bool):
        super().__init__()
        self.decodes = decodes
        self.places: list[str | Callable] = [lambda x, cache: [torch.tanh(x / RANGE) * RANGE]] if decodes else []
        named = sorted({int(name.split(".")[0]) for name in tensors})
        magnified, former = False, None
        for place in named:
            weight = {name.split(".", 1)[1]: t for name, t in tensors.items() if int(name.split(".")[0]) == place}
            gap = former is not None and place - former > 1
            if "conv.0.weight" in weight:
                outputs, channels = weight["conv.0.weight"].shape[:2]
                inner = weight["skip.weight"].shape[1] if "skip.weight" in weight else outputs
                layer: nn.Module = Block(inner, outputs, remembers=channels == 2 * inner)
            elif "conv.weight" in weight:
                outputs, channels = weight["conv.weight"].shape[:2]
                layer = Grow(channels, outputs // channels) if decodes else Pool(outputs, channels // outputs)
                magnified = magnified or (decodes and gap)
            else:
                outputs, channels = weight["weight"].shape[:2]
                bare = "bias" not in weight
                doubled = decodes and bare and (gap or magnified)
                layer = Simple(channels, outputs, not bare, 2 if bare and not decodes else 1, doubled)
                magnified, gap = False, gap and not doubled
            if gap and not isinstance(layer, Grow):
                self.places.append(relu)
            self.add_module(str(place), layer)
            self.places.append(str(place))
            former = place

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        """Frames [T, …] → frames, as many as there are for now."""
        return through(x, [self.get_submodule(one) if isinstance(one, str) else one for one in self.places], cache)

    @property
    def strides(self) -> tuple[int, int]:
        """How many pixels a side, and frames, one cell is."""
        layers = list(self.children())
        side = 2 ** sum(isinstance(one, Simple) and (one.stride == 2 or one.doubled) for one in layers)
        return side, 2 ** sum(isinstance(one, (Pool, Grow)) and one.stride == 2 for one in layers)


class TinyVae(nn.Module):
    """Both halves, from the tensors of a file."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, decodes in (("encoder", False), ("decoder", True)):
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            half = Half(own, decodes)
            half.load_state_dict(own)
            self.add_module(name, half)
        for number, layer in enumerate(self.modules()):
            layer.number = number  # which caches know it by


class TinyCodec(VaeCodec):
    """A tiny autoencoder behind the interface of the VAEs; latents are as the transformer has them, there is no posterior.

    A clip's first frame, which is a latent frame of its own, is given to the encoder as often as a latent frame has frames.
    """

    whole_area = 1024 * 1024
    default_tile, default_overlap, margin = 512, 128, 3 / 8
    width = 64

    def __init__(self, vae: TinyVae, **options: Any):
        self.spatial, self.temporal = vae.decoder.strides
        self.channels = list(vae.encoder.children())[-1].weight.shape[0]
        if vae.encoder.strides != vae.decoder.strides:
            raise BackboneError(f"the tiny autoencoder's halves do not fit: {vae.encoder.strides} and {vae.decoder.strides}")
        super().__init__(vae, [0.0] * self.channels, [1.0] * self.channels, **options)

    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        x = laid_out(x).add(1).div(2)
        x = x if len(x) == self.temporal else x.expand(self.temporal, -1, -1, -1)
        return put_back(self.vae.encoder(x, cache))

    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        return torch.cat((x, torch.full_like(x, -30.0)), dim=1)  # no variance

    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        return z

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        first = not cache.get(-1)
        cache[-1] = (x[:, :, :0],)  # says that a frame was before
        frames = self.vae.decoder(laid_out(x), cache)
        return put_back(frames[self.temporal - 1 if first else 0 :].mul(2).sub(1))


def is_tiny(path: Path) -> bool:
    """Whether `--vae` names a tiny autoencoder: a file, or a folder in which diffusers has saved one."""
    config = path / "config.json"
    return path.is_file() or (config.is_file() and '"AutoencoderTiny"' in config.read_text(encoding="utf-8", errors="replace"))


def load_tiny(backbone: str, path: Path, **options: Any) -> TinyCodec:
    """The tiny codec in a safetensors file or a folder of diffusers', on the CPU, for a backbone's latents.

    Options as for `VaeCodec`. Raises `BackboneError` for what is no such file, is damaged, or is for another model's latents.
    """
    file = path if path.is_file() else path / "diffusion_pytorch_model.safetensors"
    if file.suffix != ".safetensors":
        raise BackboneError(f"{file} is no safetensors file; pickled ones can run code and are never read")
    try:
        tensors = renamed(load_file(file))
        codec = TinyCodec(TinyVae(tensors), **options)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, StopIteration) as error:
        raise BackboneError(f"{file} holds no tiny autoencoder: {' '.join(str(error).split())[:200]}") from error
    costs = spec(backbone).codec_costs
    if (codec.spatial, codec.temporal) != (costs.spatial, costs.temporal):
        cells = f"{codec.spatial} pixels and {codec.temporal} frames a cell; {backbone} has {costs.spatial} and {costs.temporal}"
        raise BackboneError(f"{file} is a tiny autoencoder of another model: {cells}")
    return codec


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the original names; diffusers' decoder has no place for the bend of its input, so all others are one lower."""

    def original(name: str) -> str:
        found = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name)
        return name if not found else f"{found[1]}.{int(found[2]) + (found[1] == 'decoder')}.{found[3]}"

    return {original(name): tensor.float() for name, tensor in tensors.items()}
