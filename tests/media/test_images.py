"""Image files survive a round trip: depth, alpha, grey, profile, EXIF; and bad ones are refused in one line."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms, ImageOps

from ebr_engine.media import images
from ebr_engine.media.decoding import MediaError
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(height=24, width=36, channels=3, top=255):
    """A picture that JPEG holds well, different in every channel and not symmetric."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(y / height + (k + 1) * x / width) / (k + 2) for k in range(channels)]
    return np.rint(np.stack(planes, -1) * top).astype(np.uint8 if top == 255 else np.uint16)


def save_vips(array, path, **options):
    """Write an integer array with libvips, for what Pillow cannot write (16-bit RGB)."""
    height, width, bands = array.shape
    image = pyvips.Image.new_from_memory(array.tobytes(), width, height, bands, "uchar" if array.dtype == np.uint8 else "ushort")
    deep = array.dtype == np.uint16
    space = {True: ("grey16", "rgb16"), False: ("b-w", "srgb")}[deep][bands > 2]
    image.copy(interpretation=space).write_to_file(str(path), **options)


def stored(picture):
    return np.rint(picture.pixels * (2**picture.bits - 1)).astype(int)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize("top", [255, 65535])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_lossless_formats_return_every_value(tmp_path, suffix, top, channels):
    array = smooth(channels=channels, top=top)
    save_vips(array, tmp_path / f"in{suffix}")
    picture = read_image(tmp_path / f"in{suffix}")
    assert picture.bits == (8 if top == 255 else 16)
    assert picture.grey == (channels < 3)
    assert (picture.alpha is not None) == (channels in (2, 4))
    assert picture.pixels.shape == (24, 36, 3)
    assert picture.pixels.dtype == np.float32
    colours = array[..., :1] if channels < 3 else array[..., :3]
    np.testing.assert_array_equal(stored(picture), np.broadcast_to(colours, (24, 36, 3)))
    write_image(tmp_path / f"out{suffix}", picture)
    again = pyvips.Image.new_from_file(str(tmp_path / f"out{suffix}")).numpy().reshape(array.shape)
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".avif"])
def test_lossy_formats_stay_close(tmp_path, suffix):
    source = smooth() / np.float32(255)
    write_image(tmp_path / f"a{suffix}", source, quality=95)
    picture = read_image(tmp_path / f"a{suffix}")
    assert picture.format == {".jpeg": ".jpg"}.get(suffix, suffix)
    assert np.abs(picture.pixels - source).max() < 12 / 255
    write_image(tmp_path / f"b{suffix}", source, quality=20)
    assert os.path.getsize(tmp_path / f"b{suffix}") < os.path.getsize(tmp_path / f"a{suffix}")


def test_jpeg_keeps_full_chroma_resolution(tmp_path):
    write_image(tmp_path / "a.jpg", smooth() / np.float32(255), quality=75)
    with Image.open(tmp_path / "a.jpg") as image:
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3


@pytest.mark.parametrize("suffix", [".webp", ".avif"])
def test_alpha_survives_in_lossy_formats(tmp_path, suffix):
    alpha = np.linspace(0, 1, 24 * 36, dtype=np.float32).reshape(24, 36)
    write_image(tmp_path / f"a{suffix}", Picture(smooth() / np.float32(255), alpha=alpha))
    assert np.abs(read_image(tmp_path / f"a{suffix}").alpha - alpha).max() < 6 / 255


def test_grey_jpeg_stays_grey(tmp_path):
    Image.fromarray(smooth(channels=1)[..., 0]).save(tmp_path / "in.jpg")
    picture = read_image(tmp_path / "in.jpg")
    assert picture.grey
    assert picture.pixels.shape == (24, 36, 3)
    write_image(tmp_path / "out.jpg", picture)
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.mode == "L"


def test_palette_and_one_bit_pngs_are_read_as_their_colours(tmp_path):
    paletted = Image.fromarray(smooth()).quantize(16)
    paletted.save(tmp_path / "p.png")
    np.testing.assert_array_equal(stored(read_image(tmp_path / "p.png")), np.asarray(paletted.convert("RGB")))
    Image.fromarray(smooth(channels=1)[..., 0] > 100).save(tmp_path / "one.png")
    assert set(np.unique(read_image(tmp_path / "one.png").pixels)) == {0.0, 1.0}


def test_palette_transparency_becomes_alpha(tmp_path):
    image = Image.fromarray(smooth()).quantize(4)
    image.save(tmp_path / "p.png", transparency=0)
    alpha = read_image(tmp_path / "p.png").alpha
    np.testing.assert_array_equal(alpha == 0, np.asarray(image) == 0)


def test_sixteen_bit_rounds_to_eight_for_jpeg_and_webp(tmp_path):
    picture = Picture(np.full((16, 16, 3), 100.6 / 255, dtype=np.float32), bits=16)
    for name in ("a.jpg", "a.webp"):
        write_image(tmp_path / name, picture, quality=100)
        assert np.abs(stored(read_image(tmp_path / name)) - 101).max() <= (0 if name == "a.jpg" else 1)


def test_values_outside_the_range_are_clipped_not_wrapped(tmp_path):
    write_image(tmp_path / "a.png", np.array([[[-0.5, 0.5, 1.7]]], dtype=np.float32))
    np.testing.assert_array_equal(stored(read_image(tmp_path / "a.png")), [[[0, 128, 255]]])


def test_cmyk_jpeg_is_converted_to_srgb(tmp_path):
    colours = Image.new("RGB", (16, 16), (250, 20, 30))
    colours.convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    picture = read_image(tmp_path / "c.jpg")
    assert picture.pixels.shape == (16, 16, 3)
    red, green, blue = picture.pixels.mean((0, 1))
    assert red > 0.7
    assert max(green, blue) < 0.35
    write_image(tmp_path / "out.jpg", picture)
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.mode == "RGB"
        assert b"RGB " in image.info["icc_profile"][:32]  # sRGB's, not the CMYK one


def test_alpha_of_a_cmyk_tiff_is_not_taken_for_ink(tmp_path):
    inks = smooth(channels=5, top=65535)
    image = pyvips.Image.new_from_memory(inks.tobytes(), 36, 24, 5, "ushort").copy(interpretation="cmyk")
    image.write_to_file(str(tmp_path / "c.tif"))
    picture = read_image(tmp_path / "c.tif")
    assert picture.bits == 16
    np.testing.assert_array_equal(np.rint(picture.alpha * 65535), inks[..., 4])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_reset(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    Image.fromarray(smooth()).save(tmp_path / "in.jpg", exif=exif.tobytes(), quality=95)
    with Image.open(tmp_path / "in.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    picture = read_image(tmp_path / "in.jpg")
    assert np.abs(stored(picture) - upright).max() <= 2  # two JPEG decoders
    write_image(tmp_path / "out.jpg", picture)
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.size == (picture.width, picture.height)
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".avif", ".tif"])
def test_profile_exif_xmp_and_resolution_survive(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0x829A] = 0.01  # exposure time
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(smooth()).save(
        tmp_path / "in.jpg", icc_profile=SRGB, exif=exif.tobytes(), xmp=xmp, dpi=(300, 300), quality=95
    )
    write_image(tmp_path / f"out{suffix}", read_image(tmp_path / "in.jpg"))
    picture = read_image(tmp_path / f"out{suffix}")
    assert picture.icc == SRGB
    assert b'tiff:Orientation="1"' in picture.data("xmp")
    with Image.open(tmp_path / f"out{suffix}") as image:
        kept = image.getexif()
        assert kept[0x010F] == "Maker"
        assert kept.get_ifd(0x8769)[0x829A] == pytest.approx(0.01)
        assert kept.get_ifd(0x8825)[1] == "N"
    if suffix in (".jpg", ".png", ".tif"):
        with Image.open(tmp_path / f"out{suffix}") as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_the_thumbnail_of_the_damaged_picture_is_made_anew(tmp_path):
    thumbnail = io.BytesIO()
    Image.fromarray(smooth(8, 8)).save(thumbnail, "JPEG")
    image = pyvips.Image.new_from_memory(smooth().tobytes(), 36, 24, 3, "uchar").copy(interpretation="srgb")
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Make", "Maker (Maker, ASCII, 6 components, 6 bytes)")
    image.set_type(pyvips.GValue.blob_type, "jpeg-thumbnail-data", thumbnail.getvalue())
    image.write_to_file(str(tmp_path / "in.jpg"))
    assert thumbnail.getvalue() in (tmp_path / "in.jpg").read_bytes()
    write_image(tmp_path / "out.jpg", read_image(tmp_path / "in.jpg"))
    written = (tmp_path / "out.jpg").read_bytes()
    assert thumbnail.getvalue() not in written
    with Image.open(io.BytesIO(written[written.index(b"\xff\xd8\xff", 3) :])) as small:
        assert small.size == (36, 24)
        assert np.abs(np.asarray(small).astype(int) - smooth()).mean() < 12  # of the result, not of the grey 8 x 8 square
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.getexif()[0x010F] == "Maker"


def test_content_decides_not_the_suffix(tmp_path):
    save_vips(smooth(), tmp_path / "a.png")
    os.rename(tmp_path / "a.png", tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").format == ".png"


def test_awkward_names_are_only_names(tmp_path):
    for name in ("a[page=1].png", "ünï çødé 雨.png", "-o.png", "50%.png"):
        write_image(tmp_path / name, smooth() / np.float32(255))
        np.testing.assert_array_equal(stored(read_image(tmp_path / name)), smooth())


def refused(path, *words, **options):
    with pytest.raises(MediaError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("kept", [0.5, 0.97])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_truncated_files_are_refused(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_vips(noise, tmp_path / f"whole{suffix}")
    data = (tmp_path / f"whole{suffix}").read_bytes()
    read_image(tmp_path / f"whole{suffix}")
    (tmp_path / f"cut{suffix}").write_bytes(data[: int(len(data) * kept)])
    refused(tmp_path / f"cut{suffix}", "damaged or cut short")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".avif"])
def test_corrupt_data_is_refused_not_shown_as_grey_rows(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_vips(noise, tmp_path / f"a{suffix}", **({"compression": "deflate"} if suffix == ".tif" else {}))
    data = bytearray((tmp_path / f"a{suffix}").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    (tmp_path / f"a{suffix}").write_bytes(data)
    refused(tmp_path / f"a{suffix}", "damaged")


def test_what_is_no_picture_is_refused(tmp_path):
    refused(tmp_path / "missing.png", "No such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "zero.png").touch()
    refused(tmp_path / "zero.png", "the file is empty")
    (tmp_path / "text.png").write_text("hello " * 100)
    refused(tmp_path / "text.png", "not a PNG, JPEG, WebP, TIFF or AVIF")
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    refused(tmp_path / "a.svg", "not a PNG")
    (tmp_path / "head.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(tmp_path / "head.png", "damaged")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    refused(tmp_path / "fifo.png", "not a regular file")


def test_a_file_without_permission_is_refused(tmp_path):
    save_vips(smooth(), tmp_path / "a.png")
    os.chmod(tmp_path / "a.png", 0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("this user may read everything")
    refused(tmp_path / "a.png", "Permission denied")


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_huge_declared_size_is_refused_before_decoding(tmp_path):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    started = time.perf_counter()
    refused(tmp_path / "bomb.png", "60000 x 60000", "3600 megapixels", "300")
    assert time.perf_counter() - started < 5
    save_vips(smooth(100, 100), tmp_path / "a.png")
    refused(tmp_path / "a.png", "megapixels", max_megapixels=0.009)
    assert read_image(tmp_path / "a.png", max_megapixels=0.01).width == 100


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_animations_and_pages_are_refused_with_their_number(tmp_path, name):
    frames = [Image.fromarray(np.roll(smooth(), k, 1)) for k in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    refused(tmp_path / name, "3 pages" if name == "a.tif" else "3 frames")


def test_floating_point_tiffs_are_refused(tmp_path):
    image = pyvips.Image.new_from_memory(np.ones((8, 8, 3), np.float32).tobytes(), 8, 8, 3, "float")
    image.write_to_file(str(tmp_path / "f.tif"))
    refused(tmp_path / "f.tif", "float values")


def test_what_a_format_cannot_hold_is_refused_before_writing(tmp_path):
    clear = Picture(smooth() / np.float32(255), alpha=np.zeros((24, 36), np.float32))
    with pytest.raises(MediaError, match=r"a\.jpg.*transparency"):
        write_image(tmp_path / "a.jpg", clear)
    with pytest.raises(MediaError, match=r"cannot write \.bmp"):
        write_image(tmp_path / "a.bmp", clear)
    with pytest.raises(MediaError, match="16383"):
        write_image(tmp_path / "a.webp", np.zeros((1, 16384, 3), np.float32))
    with pytest.raises(MediaError, match="finite"):
        write_image(tmp_path / "a.png", np.full((2, 2, 3), np.nan, np.float32))
    assert os.listdir(tmp_path) == []


def test_opaque_alpha_may_be_written_as_jpeg(tmp_path):
    write_image(tmp_path / "a.jpg", Picture(smooth() / np.float32(255), alpha=np.ones((24, 36), np.float32)))
    assert read_image(tmp_path / "a.jpg").alpha is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", smooth() / np.float32(255))
    before = (tmp_path / "a.png").read_bytes()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(images.os, "replace", fail)
        with pytest.raises(type(error)):
            write_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.float32))
        assert os.listdir(tmp_path) == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_outputs_have_the_permissions_the_umask_asks_for(tmp_path):
    old = os.umask(0o027)
    try:
        write_image(tmp_path / "a.png", smooth() / np.float32(255))
    finally:
        os.umask(old)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_every_supported_suffix_is_written_and_read(tmp_path):
    for suffix in images.SUFFIXES:
        write_image(tmp_path / f"a{suffix.upper()}", smooth() / np.float32(255))
        assert read_image(tmp_path / f"a{suffix.upper()}").pixels.shape == (24, 36, 3)
