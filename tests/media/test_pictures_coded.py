"""How a file is coded stays with it, and content decides what a file is: quality, lossless kinds, folders, other readers."""

import os
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image, JpegImagePlugin

from ebr_engine.jobs.files import pair_inputs
from ebr_engine.media import decoding
from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import inventory, not_kept_line
from ebr_engine.media.holdings.images import kind_of_file, parts_of
from ebr_engine.media.holdings.jpeg_scan import coding
from ebr_engine.media.holdings.parts import Window
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.kinds import left_out_line
from ebr_engine.media.picture import Picture
from tests.media.picture_maker import (
    XMP,
    box,
    encoded,
    exif,
    jpeg_with,
    smooth,
)


def save(path, data):
    path.write_bytes(data)
    return path


def parts(path):
    with Window(path) as window:
        return parts_of(window, kind_of_file(path))


def of_kind(path, kind):
    return next((part for part in parts(path) if part.kind == kind), None)


# Coding.


@pytest.mark.parametrize("quality", [30, 75, 92, 100])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_keeps_its_quality_and_subsampling(tmp_path, quality, subsampling):
    source = save(tmp_path / "in.jpg", encoded("JPEG", quality=quality, subsampling=subsampling, progressive=quality == 75))
    with Window(source) as window:
        found = coding(window)
    assert found == (quality, subsampling == 2, quality == 75)
    write_image(tmp_path / "out.jpg", read_image(source))
    with Image.open(source) as before, Image.open(tmp_path / "out.jpg") as after:
        assert JpegImagePlugin.get_sampling(before) == JpegImagePlugin.get_sampling(after)
        assert before.quantization == after.quantization
        assert before.info.get("progressive") == after.info.get("progressive")
    write_image(tmp_path / "asked.jpg", read_image(source), quality=50)
    with Window(tmp_path / "asked.jpg") as window:
        assert coding(window).quality == 50


@pytest.mark.parametrize("alpha", [False, True])
def test_lossless_webp_stays_lossless(tmp_path, alpha):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (20, 30, 4 if alpha else 3), dtype=np.uint8)
    source = save(tmp_path / "in.webp", encoded("WEBP", array, lossless=True, exact=True))
    for suffix in (".webp", ".avif"):
        write_image(tmp_path / f"out{suffix}", read_image(source))
        with Image.open(tmp_path / f"out{suffix}") as image:
            np.testing.assert_array_equal(np.asarray(image), array)
    told = write_image(tmp_path / "out.webp", read_image(source), quality=80)
    assert any(each.holding.kind == "lossless coding" and each.fate.value == "not kept" for each in told)


def test_lossless_avif_stays_lossless(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = pyvips.Image.new_from_memory(array.tobytes(), 30, 20, 3, "uchar").copy(interpretation="srgb")
    image.heifsave(str(tmp_path / "in.avif"), compression="av1", lossless=True)
    write_image(tmp_path / "out.avif", read_image(tmp_path / "in.avif"))
    np.testing.assert_array_equal(pyvips.Image.new_from_file(str(tmp_path / "out.avif")).numpy(), array)


def test_half_transparent_pixels_are_told_of_gif(tmp_path):
    alpha = np.full((24, 36), 1, np.float32)
    picture = Picture(smooth() / np.float32(255), alpha=alpha)
    assert not_kept_line(write_image(tmp_path / "a.gif", picture)) is None
    alpha[:4] = 0.5
    assert "partial transparency" in not_kept_line(write_image(tmp_path / "a.gif", picture))
    assert not_kept_line(write_image(tmp_path / "a.png", picture)) is None


def test_a_second_exif_is_told(tmp_path):
    source = save(tmp_path / "in.jpg", jpeg_with((0xE1, exif()), (0xE1, exif())))
    assert "a second one" in not_kept_line(write_image(tmp_path / "out.jpg", read_image(source)))


def test_boxes_of_jpeg_xl_are_read(tmp_path):
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n" + box(b"ftyp", b"jxl \0\0\0\0jxl ")
    boxes += box(b"Exif", bytes(4) + exif()[6:]) + box(b"xml ", XMP) + box(b"brob", b"xml " + bytes(9)) + box(b"jxlc", b"")
    found = {each.kind: each.detail for each in inventory(save(tmp_path / "a.jxl", boxes))}
    assert found == {"exif": "", "xmp": "", "unknown item": "xml, compressed"}


@pytest.mark.parametrize("bits", [10, 12])
def test_lossless_deep_avif_stays_lossless(tmp_path, bits):
    array = np.random.default_rng(0).integers(0, 2**bits, (20, 30, 3)).astype(np.uint16) << (16 - bits)
    image = pyvips.Image.new_from_memory(array.tobytes(), 30, 20, 3, "ushort").copy(interpretation="rgb16")
    image.heifsave(str(tmp_path / "in.avif"), compression="av1", bitdepth=bits, lossless=True)
    write_image(tmp_path / "out.avif", read_image(tmp_path / "in.avif"))
    np.testing.assert_array_equal(pyvips.Image.new_from_file(str(tmp_path / "out.avif")).numpy(), array)


# Folders.


def test_content_decides_in_a_folder_and_the_rest_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    for name, kind in (
        ("a.jpg", "JPEG"),
        ("b.jfif", "JPEG"),
        ("e", "JPEG"),
        ("d.bmp", "BMP"),
        ("f.gif", "GIF"),
        ("g.dat", "PNG"),
    ):
        Path("in", name).write_bytes(encoded(kind))
    Path("in/h.qt").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    Path("in/c.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    Path("in/z.dng").write_bytes(encoded("TIFF"))
    Path("in/notes.txt").write_text("hello")
    Path("in/README").write_text("hello")
    Path("in/more.txt").write_text("hello")
    monkeypatch.setattr("ebr_engine.media.kinds.reader_of", lambda kind: None if kind == "heic" else "libvips")
    left_out = []
    jobs = pair_inputs([Path("in")], "out", left_out=left_out)
    assert {str(job.source): str(job.target) for job in jobs} == {
        "in/a.jpg": "out/a.jpg",
        "in/b.jfif": "out/b.jfif",
        "in/e": "out/e.jpg",
        "in/d.bmp": "out/d.bmp.png",
        "in/f.gif": "out/f.gif",
        "in/g.dat": "out/g.dat.png",
        "in/h.qt": "out/h.qt.mov",
    }
    line = left_out_line(left_out)
    assert line.startswith("5 files of other kinds left out (txt 2, ")
    assert "heic 1" in line
    assert "raw pictures are not developed" in line
    assert "no suffix 1" in line
    assert "HEIC is not read by the libraries here; pip install pillow-heif" in line
    assert left_out_line([]) is None


def test_a_picture_named_as_a_video_is_a_picture(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encoded("PNG"))
    (job,) = pair_inputs([tmp_path / "a.mp4"], str(tmp_path / "out") + "/")
    assert not job.is_clip
    assert job.target.name == "a.mp4.png"


def test_bmp_is_read_with_alpha_and_without(tmp_path):
    np.testing.assert_allclose(read_image(save(tmp_path / "a.bmp", encoded("BMP"))).pixels, smooth() / 255, atol=1e-6)
    assert read_image(save(tmp_path / "g.bmp", encoded("BMP", smooth(channels=1)[..., 0]))).width == 36
    with pytest.raises(MediaError, match="BMP data is damaged"):
        read_image(save(tmp_path / "cut.bmp", encoded("BMP")[:200]))


@pytest.mark.parametrize("kind", ["heic", "jxl"])
def test_kinds_without_a_library_say_which_one_reads_them(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(decoding, "reader_of", lambda _: None)
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" if kind == "heic" else b"\xff\x0a"
    with pytest.raises(MediaError, match="pip install pillow-"):
        read_image(save(tmp_path / f"a.{kind}", head + bytes(100)))


def test_heic_is_read_where_pillow_heif_is(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(smooth())).save(tmp_path / "a.heic", quality=95)
    assert np.abs(read_image(tmp_path / "a.heic").pixels - smooth() / 255).mean() < 0.02


def test_jpeg_xl_is_read_where_its_plugin_is(tmp_path):
    pytest.importorskip("pillow_jxl")
    Image.fromarray(smooth()).save(tmp_path / "a.jxl", lossless=True)
    np.testing.assert_allclose(read_image(tmp_path / "a.jxl").pixels, smooth() / 255, atol=1e-6)
