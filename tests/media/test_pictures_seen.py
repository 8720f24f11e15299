"""What is restored is what is seen, and a file's own way of being written stays: colours, coding, pages, other kinds."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import icc, inventory, jpeg, xmp
from ebr_engine.media.holdings.images import kind_of_file, parts_of
from ebr_engine.media.holdings.parts import Window
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from tests.media.picture_maker import (
    FILES,
    SRGB,
    XMP,
    avif_with,
    encoded,
    exif,
    jpeg_with,
    nclx,
    png_chunk,
    png_text,
    png_with,
    smooth,
    two_pages,
    ultra_hdr,
)

SHARED = Path(__file__).parents[3] / "shared" / "faults"
MINI = {  # name → the input, whatever is in it: each is read, and written as its own kind
    "png-colour-chunks/gama1.png",
    "png-colour-chunks/cicp_pq.png",
    "png-colour-chunks/chrm.png",
    "png-text/base_txt.png",
    "png-text/sd_utf8.png",
    "tags-across-formats/m.jpg",
    "tags-across-formats/sd.png",
    "ultrahdr-jpeg/ultrahdr_phone.jpg",
    "ultrahdr-jpeg/ultrahdr.jpg",
    "motion-photo/motion.jpg",
    "avif-nclx/p3nclx.avif",
    "lab8-tiff/lab.tif",
    "webp-lossless/ll_rgb.webp",
}


def save(path, data):
    path.write_bytes(data)
    return path


def parts(path):
    with Window(path) as window:
        return parts_of(window, kind_of_file(path))


def of_kind(path, kind):
    return next((part for part in parts(path) if part.kind == kind), None)


# Colour.


def test_a_linear_png_is_seen_as_a_viewer_shows_it_and_written_as_it_came(tmp_path):
    source = save(tmp_path / "in.png", png_with((b"gAMA", struct.pack(">I", 100000))))
    picture = read_image(source)
    light = smooth() / 255
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(picture.pixels, shown, atol=1e-6)
    write_image(tmp_path / "out.png", picture)
    with Image.open(tmp_path / "out.png") as image:
        np.testing.assert_array_equal(np.asarray(image), smooth())
        assert image.info["gamma"] == 1
    brighter = Picture(np.minimum(picture.pixels + 0.1, 1), parts=picture.parts, seen=picture.seen)
    write_image(tmp_path / "brighter.png", brighter)
    np.testing.assert_allclose(read_image(tmp_path / "brighter.png").pixels, np.minimum(shown + 0.1, 1), atol=0.02)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif", ".avif"])
def test_a_linear_png_is_seen_alike_in_other_formats(tmp_path, suffix):
    picture = read_image(save(tmp_path / "in.png", png_with((b"gAMA", struct.pack(">I", 100000)))))
    write_image(tmp_path / f"out{suffix}", picture, quality=100)
    again = read_image(tmp_path / f"out{suffix}")
    bright = smooth() > 60  # 8 bits of linear light are coarse in the dark
    assert np.abs(again.pixels - picture.pixels)[bright].max() < 0.06
    light = icc.tone(again.icc)
    np.testing.assert_allclose(light, np.linspace(0, 1, 1025), atol=1e-3)


def test_sixteen_bits_of_linear_light_return_exactly(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = pyvips.Image.new_from_memory(values.tobytes(), 256, 256, 1, "ushort").copy(interpretation="grey16")
    image.write_to_file(str(tmp_path / "a.png"))
    data = (tmp_path / "a.png").read_bytes()
    save(tmp_path / "in.png", data[:33] + png_chunk(b"gAMA", struct.pack(">I", 100000)) + data[33:])
    write_image(tmp_path / "out.png", read_image(tmp_path / "in.png"))
    again = pyvips.Image.new_from_file(str(tmp_path / "out.png")).numpy().reshape(256, 256)
    assert np.abs(again.astype(int) - values).max() <= 1  # float32 between


def test_a_linear_profile_is_seen_as_light_too(tmp_path):
    profile = icc.from_gamma(1.0, None)
    picture = read_image(save(tmp_path / "in.png", encoded("PNG", icc_profile=profile)))
    light = smooth() / 255
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(picture.pixels, shown, atol=2e-3)
    assert read_image(save(tmp_path / "s.png", encoded("PNG", icc_profile=SRGB))).seen is None


@pytest.mark.parametrize("transfer", [16, 18])
def test_pq_and_hlg_are_restored_in_their_own_values_and_tagged(tmp_path, transfer):
    picture = read_image(save(tmp_path / "in.png", png_with((b"cICP", bytes([9, transfer, 0, 1])))))
    np.testing.assert_allclose(picture.pixels, smooth() / 255, atol=1e-6)
    write_image(tmp_path / "out.avif", picture)
    assert of_kind(tmp_path / "out.avif", "colour tags").value[:2] == (9, transfer)
    write_image(tmp_path / "out.jpg", picture)
    assert icc.code_points(of_kind(tmp_path / "out.jpg", "icc").data) == (9, transfer)


def test_tags_of_an_avif_are_in_its_coded_picture_too(tmp_path):
    import av

    write_image(tmp_path / "out.avif", read_image(save(tmp_path / "in.avif", avif_with([nclx(12, 16)]))))
    with av.open(str(tmp_path / "out.avif")) as container:
        frame = next(container.decode(video=0))
    assert (frame.color_trc, frame.color_primaries) == (16, 12)


def test_colours_that_only_the_coded_picture_says_are_known(tmp_path):
    write_image(tmp_path / "in.avif", read_image(save(tmp_path / "a.avif", avif_with([nclx(9, 16)]))))
    data = (tmp_path / "in.avif").read_bytes()
    save(tmp_path / "bare.avif", data.replace(b"colrnclx", b"freenclx"))
    assert of_kind(tmp_path / "bare.avif", "colour tags").value[:2] == (9, 16)
    write_image(tmp_path / "out.png", read_image(tmp_path / "bare.avif"))
    assert of_kind(tmp_path / "out.png", "colour tags").value == (9, 16, 0, 1)


def test_a_made_profile_means_what_its_tags_say():
    from PIL import ImageCms

    display_p3 = ImageCms.ImageCmsProfile(io.BytesIO(icc.from_tags(12, 13)))
    srgb = ImageCms.createProfile("sRGB")
    red = ImageCms.profileToProfile(Image.new("RGB", (1, 1), (200, 100, 50)), display_p3, srgb).getpixel((0, 0))
    to_srgb = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    wanted = icc.linear_to_srgb(to_srgb @ icc.srgb_to_linear(np.array([200, 100, 50]) / 255)) * 255
    assert np.abs(np.array(red) - wanted).max() <= 1
    same = ImageCms.ImageCmsProfile(io.BytesIO(icc.from_tags(1, 13)))
    grey = ImageCms.profileToProfile(Image.new("RGB", (1, 1), (200, 100, 50)), same, srgb).getpixel((0, 0))
    assert np.abs(np.array(grey) - (200, 100, 50)).max() <= 1


def test_a_grey_picture_gets_a_grey_profile(tmp_path):
    data = encoded("PNG", smooth(channels=1)[..., 0])
    source = save(tmp_path / "in.png", data[:33] + png_chunk(b"gAMA", struct.pack(">I", 55556)) + data[33:])
    write_image(tmp_path / "out.jpg", read_image(source))
    assert of_kind(tmp_path / "out.jpg", "icc").data[16:20] == b"GRAY"


def test_white_of_a_ten_bit_avif_is_white(tmp_path):
    white = pyvips.Image.new_from_memory(np.full((16, 16, 3), 65535, np.uint16).tobytes(), 16, 16, 3, "ushort")
    white.copy(interpretation="rgb16").heifsave(str(tmp_path / "w.avif"), compression="av1", bitdepth=10)
    picture = read_image(tmp_path / "w.avif")
    assert picture.pixels.min() == 1
    write_image(tmp_path / "o.avif", picture)
    assert of_kind(tmp_path / "o.avif", "10 or 12 bit").value == 10


def test_eight_bit_lab_has_the_colours_that_pillow_sees(tmp_path):
    from PIL import ImageCms

    lab = Image.new("LAB", (8, 6), (150, 148, 98))  # Pillow adds 128: a 20, b -30
    lab.save(tmp_path / "in.tif")
    red, green, blue = read_image(tmp_path / "in.tif").pixels[0, 0] * 255
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    wanted = ImageCms.applyTransform(lab, transform).getpixel((0, 0))
    assert np.abs(np.array([red, green, blue]) - wanted).max() < 2.5


# Tags.


def test_exif_behind_the_picture_turns_it_and_stays(tmp_path):
    block = exif(t274=6)[6:]
    source = save(tmp_path / "in.png", png_with((b"eXIf", block), late=True))
    picture = read_image(source)
    np.testing.assert_allclose(picture.pixels, np.rot90(smooth(), -1) / 255, atol=1e-6)
    write_image(tmp_path / "out.png", picture)
    with Image.open(tmp_path / "out.png") as image:
        assert image.getexif()[0x010F] == "Maker"
        assert image.getexif()[0x0112] == 1


def test_texts_in_any_script_and_place_stay(tmp_path):
    source = png_text(parameters=("桜の木\nSteps: 20", "ja", "プロンプト"), Comment="hello")
    late = source[:-12] + png_chunk(b"tEXt", b"Title\0tt") + source[-12:]
    write_image(tmp_path / "out.png", read_image(save(tmp_path / "in.png", late)))
    with Image.open(tmp_path / "out.png") as image:
        assert dict(image.text) == {"parameters": "桜の木\nSteps: 20", "Comment": "hello", "Title": "tt"}
        assert image.text["parameters"].lang == "ja"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif", ".gif"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_nothing_is_invented_for_a_bare_file(tmp_path, kind, suffix):
    write_image(tmp_path / f"out{suffix}", read_image(save(tmp_path / "in", encoded(kind))))
    assert {each.kind for each in inventory(tmp_path / f"out{suffix}")} <= {"sRGB"}
    if suffix == ".jpg":
        with Image.open(tmp_path / "out.jpg") as image:
            assert image.info["jfif_unit"] == 0
            assert image.info["jfif_density"] == (1, 1)


def test_a_profile_behind_the_first_scan_is_found(tmp_path):
    data = encoded("JPEG", progressive=True, quality=90)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    content = b"ICC_PROFILE\0\1\1" + SRGB
    late = data[:second] + struct.pack(">BBH", 0xFF, 0xE2, len(content) + 2) + content + data[second:]
    assert read_image(save(tmp_path / "in.jpg", late)).icc == SRGB


def test_xmp_of_any_size_goes_into_a_jpeg_and_out_again(tmp_path):
    large = XMP.replace(b'xmp:Rating="4"', b'xmp:Rating="4" xmp:Label="' + b"x" * 200_000 + b'"')
    source = save(tmp_path / "in.png", png_text(**{"XML:com.adobe.xmp": (large.decode(),)}))
    write_image(tmp_path / "out.jpg", read_image(source))
    packet = of_kind(tmp_path / "out.jpg", "xmp").data
    assert xmp.value(packet, xmp.XMP, "Rating") == "4"
    assert len(xmp.value(packet, xmp.XMP, "Label")) == 200_000
    write_image(tmp_path / "again.png", read_image(tmp_path / "out.jpg"))
    assert xmp.value(of_kind(tmp_path / "again.png", "xmp").data, xmp.XMP, "Rating") == "4"


def test_maker_notes_stay_where_their_own_offsets_point(tmp_path):
    found = Image.Exif()
    found.get_ifd(0x8769)[0x927C] = b"MAKERNOTE with offsets" * 3
    block = found.tobytes()
    place = block.index(b"MAKERNOTE") - 6
    source = jpeg_with((0xE1, block), (0xFE, b"a comment"))
    write_image(tmp_path / "out.webp", read_image(save(tmp_path / "in.jpg", source)))
    kept = of_kind(tmp_path / "out.webp", "exif").data
    assert kept.index(b"MAKERNOTE") == place  # though a user comment was added


# More than one picture in a file.


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_gain_map_stays_with_its_picture_and_every_tag(tmp_path, orientation):
    source = save(tmp_path / "in.jpg", ultra_hdr(orientation))
    picture = read_image(source)
    assert (picture.width, picture.height) == ((36, 24) if orientation == 1 else (24, 36))
    assert write_image(tmp_path / "out.jpg", picture)
    packet = of_kind(tmp_path / "out.jpg", "xmp").data
    assert xmp.value(packet, xmp.XMP, "Rating") == "4"
    assert b"Town" in of_kind(tmp_path / "out.jpg", "iptc").data
    extra = of_kind(tmp_path / "out.jpg", "gain map")
    with Image.open(io.BytesIO(extra.data)) as image:
        assert image.size == ((9, 6) if orientation == 1 else (6, 9))
    assert dict(xmp.item_lengths(packet))["GainMap"] == len(extra.data)
    gain = next(p.data for p in jpeg.parts(Window(extra.data)) if p.kind == "xmp")
    assert xmp.value(gain, xmp.GAIN_MAP, "GainMapMax") == "2"
    written = (tmp_path / "out.jpg").read_bytes()
    with Image.open(tmp_path / "out.jpg") as image:  # Pillow reads the list of pictures by itself
        first, second = image._getmp()[0xB002]
    begin = written.index(b"MPF\0") + 4 + second["DataOffset"]
    assert written[begin : begin + second["Size"]] == extra.data
    assert first["Size"] == begin
    loaded = pyvips.Image.uhdrload(str(tmp_path / "out.jpg")) if orientation == 1 else None
    assert loaded is None or (loaded.width, loaded.height) == (36, 24)


def test_without_its_gain_map_a_picture_promises_none(tmp_path):
    write_image(tmp_path / "out.png", read_image(save(tmp_path / "in.jpg", ultra_hdr())))
    packet = of_kind(tmp_path / "out.png", "xmp").data
    assert b"hdr-gain-map" not in packet.replace(b'xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/"', b"")
    assert xmp.item_lengths(packet) == []
    assert xmp.value(packet, xmp.XMP, "Rating") == "4"


def test_a_gain_map_that_the_library_cannot_read_is_no_damage(tmp_path):
    broken = bytearray(ultra_hdr())
    place = broken.rindex(b"\xff\xda") + 20
    broken[place : place + 30] = bytes(30)
    packet = broken.rindex(b'hdrgm:GainMapMax="2"')
    broken[packet : packet + 20] = b'hdrgm:GainMapMax="x"'
    picture = read_image(save(tmp_path / "in.jpg", bytes(broken)))
    assert np.abs(picture.pixels - smooth() / 255).max() < 0.1


def test_a_motion_photo_keeps_its_clip_or_stops_promising_it(tmp_path):
    source = save(tmp_path / "in.jpg", FILES["motion clip", "jpeg"]())
    picture = read_image(source)
    write_image(tmp_path / "out.jpg", picture)
    packet = of_kind(tmp_path / "out.jpg", "xmp").data
    offset = int(xmp.value(packet, xmp.CAMERA, "MicroVideoOffset"))
    assert (tmp_path / "out.jpg").read_bytes()[-offset:][4:8] == b"ftyp"
    write_image(tmp_path / "out.webp", picture)
    packet = of_kind(tmp_path / "out.webp", "xmp").data
    assert xmp.value(packet, xmp.CAMERA, "MotionPhoto") is None
    assert xmp.value(packet, xmp.CAMERA, "MicroVideoOffset") is None


def test_pages_of_any_size_follow_each_other(tmp_path):
    picture = read_image(save(tmp_path / "in.tif", two_pages()), all_pages=True)
    assert [(page.height, page.width) for page in (picture, *picture.more)] == [(24, 36), (20, 30)]
    write_image(tmp_path / "out.tif", picture)
    with Image.open(tmp_path / "out.tif") as image:
        assert image.n_frames == 2
        np.testing.assert_array_equal(np.asarray(image), smooth())
        image.seek(1)
        np.testing.assert_array_equal(np.asarray(image), 255 - smooth(20, 30))
    with pytest.raises(MediaError, match="2 pages"):
        read_image(tmp_path / "in.tif")


# The files of public reports.


@pytest.mark.parametrize("name", sorted(MINI))
def test_reported_files_keep_or_tell(tmp_path, name):
    source = SHARED / name
    if not source.exists():
        pytest.skip("the reported files are not here")
    before = parts(source)
    target = tmp_path / source.name
    outcomes = write_image(target, read_image(source))
    after = {part.kind for part in parts(target)}
    for part in before:
        fate = next(each.fate.value for each in outcomes if each.holding.kind == part.kind)
        assert fate in ("kept", "converted")
        assert fate == "converted" or part.kind in after


def test_reported_values(tmp_path):
    if not SHARED.exists():
        pytest.skip("the reported files are not here")
    gamma = read_image(SHARED / "png-colour-chunks/gama1.png").pixels
    assert gamma.mean() * 255 == pytest.approx(169.3, abs=0.6)
    colours = np.rint(read_image(SHARED / "lab8-tiff/lab.tif").pixels[10, [10, 45, 80, 110]] * 255)
    assert np.abs(colours - [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]).max() <= 12  # of 8-bit Lab
    write_image(tmp_path / "m.jpg", read_image(SHARED / "tags-across-formats/m.jpg"))
    with Image.open(tmp_path / "m.jpg") as image:
        assert image.info["comment"].startswith(b"hello")
        assert image.info["jfif_unit"] == 0
    write_image(tmp_path / "u.jpg", read_image(SHARED / "ultrahdr-jpeg/ultrahdr_phone.jpg"))
    assert xmp.value(of_kind(tmp_path / "u.jpg", "xmp").data, xmp.XMP, "Rating") == "4"
    assert b"Town" in of_kind(tmp_path / "u.jpg", "iptc").data
