"""Protocols bring pictures to the sizes that they name, and say so."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ebr_engine.errors import EbrError
from ebr_engine.evaluation.choices import PROTOCOLS
from ebr_engine.evaluation.protocols import as_frame, protocol_for


@pytest.mark.parametrize(
    ("backbone", "clip", "size", "frames"),
    [
        ("wan", True, (480, 832), 33),
        ("wan", False, (480, 832), None),
        ("flux", False, (1024, 1024), None),
        ("flux", True, (1024, 1024), 33),
        (None, True, (480, 832), 33),
        (None, False, (1024, 1024), None),
    ],
)
def test_the_released_protocol_has_the_backbones_size(backbone, clip, size, frames):
    protocol = protocol_for("released", backbone, clip)
    assert (protocol.size, protocol.frames, protocol.side, protocol.rounded) == (size, frames, 512, False)
    assert f"{size[0]}x{size[1]}" in protocol.about
    assert "512x512" in protocol.about
    assert ("33 frames" in protocol.about) == clip


def test_every_protocol_says_what_it_is():
    for name in PROTOCOLS:
        assert protocol_for(name, None, False).about.startswith(name)
    with pytest.raises(EbrError, match=r"'ours'.*released, native, y-channel"):
        protocol_for("ours", None, False)


def test_native_leaves_pictures_as_they_are():
    picture = torch.rand(1, 3, 9, 14)
    protocol = protocol_for("native", "wan", False)
    assert protocol.prepared(picture) is protocol.compared(picture) is picture
    assert protocol.result(picture, (9, 14), "a.png") is picture


def test_released_inputs_are_resized_as_pillow_does():
    array = np.random.default_rng(0).integers(0, 256, (96, 130, 3), np.uint8)
    protocol = protocol_for("released", "wan", True)
    resized = protocol.prepared(as_frame(array.astype(np.float32) / 255))
    expected = np.asarray(Image.fromarray(array).resize((832, 480), Image.Resampling.BICUBIC))
    levels = resized[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    assert np.abs(levels - expected).max() <= 2.01
    assert np.abs(levels - expected).mean() < 0.01


def test_released_pictures_are_measured_at_512_without_antialiasing():
    protocol = protocol_for("released", "flux", False)
    picture = torch.rand(1, 3, 1024, 1024)
    measured = protocol.compared(picture)
    expected = F.interpolate(picture, (512, 512), mode="bicubic").clamp(0, 1)
    assert torch.equal(measured, expected)
    smooth = F.interpolate(picture, (512, 512), mode="bicubic", antialias=True)
    assert (measured - smooth).abs().mean() > 0.05


def test_results_may_have_the_files_size_or_the_protocols():
    protocol = protocol_for("released", "wan", False)
    fixed, native = torch.rand(1, 3, 480, 832), torch.rand(1, 3, 40, 50)
    assert protocol.result(fixed, (40, 50), "a.png") is fixed
    assert torch.equal(protocol.result(native, (40, 50), "a.png"), protocol.prepared(native))
    with pytest.raises(EbrError, match=r"a\.png: has 50 x 40 pixels, not 51 x 40 or 832 x 480"):
        protocol.result(native, (40, 51), "a.png")
    with pytest.raises(EbrError, match=r"a\.png: has 50 x 40 pixels, not 51 x 40 as"):
        protocol_for("native", None, False).result(native, (40, 51), "a.png")
