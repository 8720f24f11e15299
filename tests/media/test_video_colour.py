"""Planes to RGB and back: by the stream's own matrix, range and depth, exactly."""

import numpy as np
import pytest

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.video.colour import from_rgb, layout_of, matrix_for, to_rgb
from ebr_engine.media.video.info import Colour

av = pytest.importorskip("av")

BT601, BT709, BT2020 = 6, 1, 9
COEFFICIENTS = {BT601: (0.299, 0.114), BT709: (0.2126, 0.0722), BT2020: (0.2627, 0.0593)}
PLANAR = ["yuv420p", "yuv422p", "yuv444p", "yuv411p", "yuv440p", "yuv420p10le", "yuv422p10le", "yuv444p12le", "yuv420p10be"]
OTHERS = ["gray", "gray10le", "gbrp", "gbrp10le", "rgb24", "rgb48le", "yuva444p", "yuv410p"]
PACKED = {"nv12": "yuv420p", "p010le": "yuv420p10le", "yuyv422": "yuv422p", "nv24": "yuv444p", "xv36le": "yuv444p12le"}


def planes(frame):
    layout = layout_of(frame.format)
    frame = frame if frame.format.name == layout.name else frame.reformat(format=layout.name, threads=1)
    rows = [np.frombuffer(plane, layout.dtype).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes[:3]]
    return [row.astype(int) for row in rows]


def filled(name, *values, height=16, width=24):
    """A frame with constant planes."""
    frame = av.VideoFrame(width, height, name)
    dtype = layout_of(frame.format).dtype
    for plane, value in zip(frame.planes, values):
        np.frombuffer(plane, dtype)[...] = value
    return frame


@pytest.mark.parametrize("matrix", COEFFICIENTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("name", "bits"), [("yuv420p", 8), ("yuv444p", 8), ("yuv420p10le", 10), ("yuv422p12le", 12)])
def test_colours_follow_the_equations_of_the_standard(name, bits, full, matrix):
    """H.273: E'Y = Kr R + (1 - Kr - Kb) G + Kb B, E'PB = (B - E'Y) / (2 - 2 Kb), E'PR = (R - E'Y) / (2 - 2 Kr)."""
    kr, kb = COEFFICIENTS[matrix]
    unit, peak = 2 ** (bits - 8), 2**bits - 1
    for r, g, b in [(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.5, 0.7), (0.9, 0.3, 0.6)]:
        y = kr * r + (1 - kr - kb) * g + kb * b
        pb, pr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
        if full:
            stored = [peak * y, peak * pb + 128 * unit, peak * pr + 128 * unit]
        else:
            stored = [(219 * y + 16) * unit, (224 * pb + 128) * unit, (224 * pr + 128) * unit]
        stored = np.clip(np.rint(stored), 0, peak).astype(int)
        colour = Colour(matrix=matrix, full_range=full)
        rgb = to_rgb(filled(name, *stored), colour)
        np.testing.assert_allclose(rgb, np.broadcast_to(np.float32([r, g, b]), rgb.shape), atol=2.0 / 2**bits)
        back = planes(from_rgb(np.full((16, 24, 3), [r, g, b], np.float32), av.VideoFormat(name, 24, 16), colour))
        assert [abs(int(p.min()) - s) <= 1 and p.min() == p.max() for p, s in zip(back, stored)] == [True] * 3


@pytest.mark.parametrize("matrix", COEFFICIENTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", [*PLANAR, *PACKED, *OTHERS])
def test_reading_and_writing_again_changes_no_stored_value(name, full, matrix):
    colour = Colour(matrix=matrix, full_range=full)
    pixel_format = av.VideoFormat(name, 40, 32)
    rgb = np.random.default_rng(0).random((32, 40, 3), dtype=np.float32) * 0.2 + 0.4  # detail that stays within RGB
    first = from_rgb(rgb, pixel_format, colour)
    assert first.format.name == name
    for before, after in zip(planes(first), planes(from_rgb(to_rgb(first, colour), pixel_format, colour))):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["yuv420p", "yuv420p10le", "yuv444p", "gray"])
@pytest.mark.parametrize("full", [False, True])
def test_every_grey_value_survives(name, full):
    frame = filled(name, 0, *[2 ** (layout_of(av.VideoFormat(name)).bits - 1)] * 2, height=2, width=1024)
    layout = layout_of(frame.format)
    unit = 2 ** (layout.bits - 8)
    low, high = (0, 2**layout.bits - 1) if full else (16 * unit, 235 * unit)
    luma = np.frombuffer(frame.planes[0], layout.dtype).reshape(2, -1)[:, :1024]
    luma[...] = np.linspace(low, high, 1024).round()
    rgb = to_rgb(frame, Colour(full_range=full))
    np.testing.assert_array_equal(rgb[..., 0], rgb[..., 1])
    assert rgb.min() == 0
    assert rgb.max() == 1
    np.testing.assert_array_equal(planes(from_rgb(rgb, frame.format, Colour(full_range=full)))[0], luma)


def test_values_beyond_black_and_white_are_clipped():
    for stored, expected in ((3, 0), (250, 1)):
        assert (to_rgb(filled("yuv420p", stored, 128, 128), Colour()) == expected).all()


@pytest.mark.parametrize(("centred", "offset"), [(False, 0.0), (True, 0.5)])
def test_chroma_lies_where_the_standard_puts_it(centred, offset):
    """A ramp of chroma comes out as the same ramp over the pixels: sample i lies at pixel 2 i, or between 2 i and 2 i + 1."""
    frame = filled("yuv422p", 128, 128, 128, height=4, width=64)
    chroma = np.frombuffer(frame.planes[2], np.uint8).reshape(4, -1)[:, :32]
    chroma[...] = 100 + np.arange(32)
    rgb = to_rgb(frame, Colour(matrix=BT601), centred=centred)
    red = (rgb[0, 2:-2, 0] - (128 - 16) / 219) / (2 - 2 * 0.299) * 224 + 128
    np.testing.assert_allclose(red, 100 + (np.arange(2, 62) - offset) / 2, atol=1e-3)


def test_odd_sizes_keep_their_pixels():
    rgb = np.random.default_rng(0).random((33, 47, 3), dtype=np.float32)
    for name in ("yuv444p", "yuv420p", "gbrp16le"):
        back = to_rgb(from_rgb(rgb, av.VideoFormat(name, 47, 33), Colour()), Colour())
        assert back.shape == rgb.shape
    np.testing.assert_allclose(back, rgb, atol=0.5001 / 65535)


@pytest.mark.parametrize(("name", "planar"), PACKED.items())
def test_packed_layouts_have_a_planar_one_of_the_same_depth(name, planar):
    assert layout_of(av.VideoFormat(name)).name == planar


@pytest.mark.parametrize(
    ("width", "height", "matrix"), [(1920, 1080, 1), (1280, 536, 1), (1024, 768, 1), (720, 576, 5), (720, 480, 6), (64, 48, 6)]
)
def test_an_undeclared_matrix_is_guessed_by_size(width, height, matrix):
    assert matrix_for(2, width, height) == matrix


@pytest.mark.parametrize("declared", [8, 10, 14])
def test_what_is_no_plain_matrix_is_refused(declared):
    with pytest.raises(MediaError, match="not supported"):
        matrix_for(declared, 1920, 1080)
