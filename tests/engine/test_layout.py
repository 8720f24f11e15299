"""Shapes: tiles that cannot be are refused, a graph of one size takes no other, and noise belongs to a moment of a clip."""

from types import SimpleNamespace

import pytest
import torch

from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.registry import spec
from ebr_engine.engine.layout import Geometry
from ebr_engine.errors import EbrError, EngineError
from tests.tiny import picture


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"tile": 12}, ["tile", "multiple of 8", "12"]),
        ({"tile": -8}, ["tile", "-8"]),
        ({"tile": 16, "tile_overlap": 16}, ["overlap", "16"]),
        ({"tile_overlap": -4}, ["overlap", "-4"]),
    ],
)
def test_tiles_that_cannot_be_are_told_in_one_line(restorer, prompt, request_, words, one_line):
    with pytest.raises(EbrError) as error:
        restorer.restore(picture(), prompt=prompt, **request_)
    one_line(error, words)


@pytest.fixture
def fixed():
    """The shapes of a graph for 1 frame of 16 x 24 pixels."""
    return Geometry(SimpleNamespace(spec=spec("mini"), codec=LappedCodec(), multiple=8, patch=1, fixed=(1, 16, 24)))


def test_a_graph_of_one_size_takes_smaller_pictures_padded_and_larger_ones_in_tiles(fixed):
    assert fixed.padded(torch.rand(1, 3, 1, 16, 24)).shape == (1, 3, 1, 16, 24)
    assert fixed.tile_size(None, None) == (16, 8)
    tiles = fixed.tiles(32, 40, 16, 4)
    assert (tiles.tile_height, tiles.tile_width) == (2, 3)
    assert fixed.guide(torch.rand(1, 3, 1, 32, 40), 24).shape == (1, 3, 1, 16, 24)


def test_a_graph_of_one_size_refuses_other_ones(fixed, one_line):
    for wrong in (lambda: fixed.tile_size(16, None), lambda: fixed.padded(torch.rand(1, 3, 2, 16, 24))):
        with pytest.raises(EngineError) as error:
            wrong()
        one_line(error, ["this graph", "16"])


@pytest.mark.parametrize("few", [False, True])
def test_noise_fits_the_latent_and_does_not_depend_on_what_is_added(restorer, few):
    pixels, geometry = torch.rand(3, 3, 1, 37, 53), restorer.engine.geometry
    padded, noise = geometry.ready(pixels, 42, 0, 512, few)
    assert noise.shape == geometry.latent_shape(padded.shape)
    assert torch.equal(padded[:3, :, :, :37, :53], pixels)
    assert torch.equal(noise[0], noise[-1])
    assert torch.equal(noise[:3, :, :, :10, :14], geometry.ready(pixels, 42, 0, 512, False)[1])
