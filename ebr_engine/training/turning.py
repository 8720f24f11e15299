"""Weights that were trained over the block codec, turned to the lapped one: a start that is near, not equal."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ebr_engine.backbones.mini.codec import PixelCodec
from ebr_engine.backbones.mini.lapped import HOP, LappedCodec
from ebr_engine.backbones.mini.model import Mini
from ebr_engine.backbones.wan.model import WanConditioner, WanTrunk
from ebr_engine.errors import EbrError


def turned(mini: Mini, codec: LappedCodec) -> Mini:
    """The same transformer over a lapped codec: its first and last layer multiplied by the inner products of the two bases.

    A token is 8×8 pixels before and after. A lapped function reaches into the neighbouring blocks, and that part of it is left
    out: training has to find it. `EbrError` for a backbone whose tokens are not the block codec's.
    """
    config, old = mini.trunk.config, mini.codec
    if not isinstance(old, PixelCodec) or config.patch_size != (1, 2, 2):
        raise EbrError("only a backbone of 2 x 2 patches over the block codec can be turned to the lapped one")
    inputs, outputs = token_bases(mini.trunk)
    products = central_basis(codec) @ inputs.T, central_basis(codec) @ outputs.T
    centre, scale = (x.repeat_interleave(4) for x in (old.mean, old.scale))  # of a token's inputs: channel, then cell
    sizes = replace(config, patch_size=(1, 1, 1), in_channels=codec.channels, out_channels=codec.channels)
    trunk, conditioner = WanTrunk(sizes), WanConditioner(sizes)
    conditioner.load_state_dict(mini.conditioner.state_dict())
    state = {name: value.float() for name, value in mini.trunk.state_dict().items()}
    reader = state["patch_in.weight"] / scale
    state["patch_in.weight"] = reader @ products[0].T * codec.scale
    state["patch_in.bias"] = state["patch_in.bias"] + reader @ (products[0].T @ codec.mean - centre)
    writer = products[1] * old.scale.repeat(4) / codec.scale[:, None]
    state["patch_out.weight"] = writer @ state["patch_out.weight"]
    state["patch_out.bias"] = writer @ state["patch_out.bias"]
    trunk.load_state_dict(state)
    return replace(mini, trunk=trunk, conditioner=conditioner, codec=codec)


def token_bases(trunk: nn.Module) -> tuple[Tensor, Tensor]:
    """The block codec's functions of a token over its 8×8 pixels [192, 3·64], in the order of the trunk's inputs and outputs."""
    pixels = torch.eye(3 * HOP * HOP).view(-1, 3, 1, HOP, HOP)
    latent = PixelCodec().encode(pixels)
    inputs = trunk.patchify(latent, (1, 1, 1))[:, 0]
    return inputs.T, latent.permute(0, 2, 3, 4, 1).flatten(1).T


def central_basis(codec: LappedCodec) -> Tensor:
    """The lapped functions' values on the middle 8×8 of their pixels, [192, 3·64]."""
    half = HOP // 2
    inside = torch.block_diag(codec.overlap[half:, half:], codec.overlap[:half, :half])
    line = codec.dct @ inside
    return torch.kron(codec.colour, torch.kron(line, line))
