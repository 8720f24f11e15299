"""Weights over the block codec, turned to the lapped one: the same transformer, read and written in another basis."""

from dataclasses import replace

import pytest
import torch

from ebr_engine.backbones.mini.codec import PixelCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.errors import EbrError
from ebr_engine.training.turning import central_basis, token_bases, turned
from tests.tiny import save_blocks


@pytest.fixture
def blocks(tmp_path):
    """A tiny backbone over the block codec."""
    return load_mini(save_blocks(tmp_path / "blocks.safetensors", PixelCodec(torch.randn(48), torch.rand(48) + 0.1)))


def test_bases_of_a_token_are_those_of_the_codecs(blocks):
    for basis in token_bases(blocks.trunk):
        torch.testing.assert_close(basis @ basis.T, torch.eye(192), atol=1e-5, rtol=0)
    block = torch.rand(3, 8, 8)
    pixels = torch.zeros(1, 3, 1, 24, 24)
    pixels[0, :, 0, 8:16, 8:16] = block
    latent = LappedCodec().encode(pixels)[0, :, 0, 1, 1]
    torch.testing.assert_close(central_basis(LappedCodec()) @ block.flatten(), latent, atol=1e-5, rtol=0)


def test_the_first_layer_sees_a_token_that_its_neighbours_do_not_reach_as_before(blocks):
    """A constant picture: every lapped function that sees anything sees it whole."""
    codec = LappedCodec(torch.randn(192), torch.rand(192) + 0.1)
    whole = LappedCodec(codec.mean, codec.scale)
    mini = turned(blocks, whole)
    pixels = torch.full((1, 3, 1, 24, 24), 0.3)
    before = blocks.trunk.patch_in(blocks.trunk.patchify(blocks.codec.encode(pixels), (1, 3, 3)))
    after = mini.trunk.patch_in(mini.trunk.patchify(whole.encode(pixels), (1, 3, 3)))
    energy = (central_basis(codec)[0].sum() / 8 / 3**0.5) ** 2  # of a constant, the part in the functions' own blocks
    assert 0.5 < energy < 1
    assert (after - before).norm() < 0.5 * before.norm()


def test_everything_between_the_layers_is_kept(blocks):
    mini = turned(blocks, LappedCodec())
    assert mini.trunk.config == replace(blocks.trunk.config, patch_size=(1, 1, 1), in_channels=192, out_channels=192)
    assert mini.text_encoder is blocks.text_encoder
    for old, new in ((blocks.trunk, mini.trunk), (blocks.conditioner, mini.conditioner)):
        state = new.state_dict()
        for name, value in old.state_dict().items():
            assert name.startswith("patch_") or torch.equal(state[name], value)


def test_only_block_weights_are_turned(blocks):
    with pytest.raises(EbrError, match="only a backbone of 2 x 2 patches over the block codec"):
        turned(turned(blocks, LappedCodec()), LappedCodec())
