"""Weights that wait in main memory: the same result, and never more than two blocks on the device."""

import pytest
import torch
from torch import nn

from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.engine.offload import BlockOffload, OffloadedCodec


def test_blocks_come_and_go_in_turn_and_give_the_same():
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU()).requires_grad_(False) for _ in range(5)]
    x = torch.randn(3, 8)

    def run(value):
        for block in blocks:
            value = block(value)
        return value

    expected = run(x)
    places = [[id(weight) for weight in block.parameters()] for block in blocks]
    held = BlockOffload(blocks, torch.device("cpu"))
    there = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: there.append(sorted(held.there)))
    for _ in range(2):
        assert torch.equal(run(x), expected)
    assert there == [[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]] * 2  # its own, and the next one's on its way
    assert held.most == 2
    assert [[id(weight) for weight in block.parameters()] for block in blocks] == places


def test_a_block_computes_with_copies_and_hands_its_host_weights_back():
    block = nn.Linear(4, 4).requires_grad_(False)
    address = block.weight.data_ptr()
    BlockOffload([block, nn.Linear(4, 4)], torch.device("cpu"))
    seen = []
    block.register_forward_pre_hook(lambda module, _: seen.append(module.weight.data_ptr()))
    block(torch.randn(2, 4))
    assert seen[0] != address
    assert block.weight.data_ptr() == address


def test_a_codec_is_on_the_cpu_unless_it_works():
    moves = []

    class Watched(LappedCodec):
        def to(self, device):
            moves.append(str(device))
            return super().to(device)

    codec = OffloadedCodec(Watched(), torch.device("cpu", 0))
    pixels = torch.rand(1, 3, 1, 8, 16)
    torch.testing.assert_close(codec.decode(codec.encode(pixels)), pixels)
    assert moves == ["cpu", "cpu:0", "cpu", "cpu:0", "cpu"]


def test_a_codecs_weights_are_not_copied_back():
    class Scaled(LappedCodec):
        """Its copies are new memory, as on a device."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((), 2.0), requires_grad=False)
            self.seen = []

        def to(self, device):
            if str(device) != "cpu":
                self.gain.data = self.gain.data.clone()
            return super().to(device)

        def encode(self, pixels):
            self.seen.append(self.gain.data_ptr())
            if pixels.isnan().any():
                raise ValueError("no pixels")
            return super().encode(pixels) * self.gain

    inside = Scaled()
    address = inside.gain.data_ptr()
    codec = OffloadedCodec(inside, torch.device("cpu", 0))
    pixels = torch.rand(1, 3, 1, 8, 16)
    torch.testing.assert_close(codec.encode(pixels), 2 * LappedCodec().encode(pixels))
    assert address not in inside.seen
    assert inside.gain.data_ptr() == address
    with pytest.raises(ValueError, match="no pixels"):
        codec.encode(pixels * torch.nan)
    assert inside.gain.data_ptr() == address
