"""Every thing that a picture can hold, into every format: kept, converted or told, as the table of fates says; nothing else."""

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import FATES, fates_table, inventory, not_kept_line, xmp
from ebr_engine.media.holdings import icc as profiles
from ebr_engine.media.holdings.image_fates import IMAGE_FATES, IMAGE_FORMATS
from ebr_engine.media.holdings.images import kind_of_file, parts_of
from ebr_engine.media.holdings.parts import Window
from ebr_engine.media.holdings.types import Fate
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.kinds import ANIMATED
from ebr_engine.media.video import open_video, write_video
from tests.media.picture_maker import CLIP, FILES, IIM, SRGB, XMP, animation, smooth

SUFFIX = {"jpeg": ".jpg", "tiff": ".tif"}
ANIMATIONS = {("animation", kind): kind for kind in ("gif", "png", "webp")}
# What cannot be made without the encoder that this package reads with, and why its fate is sure nevertheless.
NOT_MADE = {"animation": "has tests of its own", "partial transparency": "found in the pixels, not in the container"}


def suffix_of(format):
    return SUFFIX.get(format, f".{format}")


@pytest.fixture
def made(tmp_path):
    def make(holding, format):
        path = tmp_path / f"in{suffix_of(format)}"
        path.write_bytes(FILES[holding, format]())
        return path

    return make


def parts(path):
    with Window(path) as window:
        return parts_of(window, kind_of_file(path))


def of_kind(path, kind):
    return [part for part in parts(path) if part.kind == kind]


def exif_of(path):
    """Tags of IFD0 and of EXIF's directory, by Pillow."""
    with Image.open(path) as image:
        found = image.getexif()
        return {**found, **found.get_ifd(0x8769)}


def xmp_of(path):
    return next((part.data for part in parts(path) if part.kind == "xmp"), b"").decode()


def equal(one, other):
    """Whether a part is there again with the same meaning."""
    if one.kind == "icc":
        return one.data == other.data
    if one.kind == "exif":
        with_ = [Image.Exif(), Image.Exif()]
        for found, part in zip(with_, (one, other)):
            found.load(b"Exif\0\0" + part.data)
        one_, other_ = (dict(found) for found in with_)
        return {t: v for t, v in one_.items() if t < 0x8000} == {t: v for t, v in other_.items() if t < 0x8000} and (
            dict(with_[0].get_ifd(0x8769)) == dict(with_[1].get_ifd(0x8769))
        )
    if one.kind in ("light level", "mastering display", "density", "pixel aspect", "gamma", "colour tags"):
        flat = [
            np.hstack([v for v in part.value if v is not None]) if part.kind != "colour tags" else part.value[:2]
            for part in (one, other)
        ]
        if one.kind == "pixel aspect":
            flat = [value[0] / value[1] for value in flat]
        return np.allclose(*flat, rtol=1e-3, atol=2e-5)
    if one.kind == "background":
        return np.allclose(one.value, other.value, atol=1 / 255)
    if one.kind == "private tags":
        return {t: e.data for t, e in one.value[1].items()} == {t: e.data for t, e in other.value[1].items()}
    if one.kind == "xmp":  # promises of what is not kept are taken out of it
        names = [name for name in ("Rating",) if name.encode() in one.data]
        return all(xmp.value(one.data, xmp.XMP, name) == xmp.value(other.data, xmp.XMP, name) for name in names)
    if one.kind in ("text", "caption text"):
        return one.value == other.value
    return one.data == other.data


def check_kept(part, path):
    if part.kind in ("16 bit", "10 or 12 bit", "lossless coding", "pages", "sRGB"):
        return  # looked at below, in the pixels
    found = of_kind(path, part.kind)
    assert any(equal(part, other) for other in found), (part, found)


def check_converted(part, path, format):
    """The same meaning in another form."""
    if part.kind in ("colour tags", "gamma"):
        profile = next(p.data for p in parts(path) if p.kind == "icc")
        with Image.open(path) as image:
            assert format == "gif" or image.info["icc_profile"] == profile
        curve = profiles.tone(profile)
        if part.kind == "gamma" and part.value.gamma:
            assert curve[512] == pytest.approx(0.5 ** (1 / part.value.gamma), abs=1e-3)
        if part.kind == "colour tags":
            assert profiles.code_points(profile) == part.value[:2]
    elif part.kind == "iptc":
        assert "Town" in xmp_of(path)
        assert "<rdf:li>cat</rdf:li><rdf:li>déj</rdf:li>" in xmp_of(path)
    elif part.kind == "exif":
        block = Image.Exif()
        block.load(b"Exif\0\0" + part.data)
        found = exif_of(path)
        assert all(found[tag] == text for tag, text in block.items() if isinstance(text, str))
    elif part.kind == "comment":
        if format == "png":
            with Image.open(path) as image:
                assert image.text["Comment"] == "héllo"
        else:
            assert exif_of(path)[0x9286].decode("utf-16-le")[4:] == "héllo"
    elif part.kind == "caption text":
        where = xmp_of(path)
        if part.value.name == "parameters" and format != "gif":
            where = exif_of(path)[0x9286].decode("utf-16-le")
        assert part.value.text in where
    elif part.kind == "time of change":
        assert exif_of(path)[0x0132] == "2024:02:03 04:05:06"
    elif part.kind == "density":
        found = exif_of(path)
        assert (float(found[0x011A]), float(found[0x011B]), found[0x0128]) == pytest.approx((300, 150, 2), abs=0.1)
    elif part.kind == "CMYK or Lab profile":
        with Image.open(path) as image:
            assert image.mode in ("RGB", "P")
    elif part.kind == "thumbnail":
        small = of_kind(path, "thumbnail")
        assert small or format != "jpeg"
    else:  # what is meant without: nothing may say otherwise
        kinds = {"sRGB", "second colour description", "coded colour tags", "significant bits", "10 or 12 bit", "16 bit"}
        assert part.kind in kinds


@pytest.mark.parametrize("format", IMAGE_FORMATS)
@pytest.mark.parametrize(("holding", "source"), FILES, ids=lambda value: value.replace(" ", "-"))
def test_every_holding_is_kept_converted_or_told(made, tmp_path, holding, source, format):
    path = made(holding, source)
    before = parts(path)
    assert holding in {part.kind for part in before}
    target = tmp_path / f"out{suffix_of(format)}"
    picture = read_image(path, all_pages=True)
    outcomes = write_image(target, picture)
    for part in before:
        (outcome, *_) = [each for each in outcomes if each.holding.kind == part.kind]
        fate = IMAGE_FATES[part.kind][format]
        assert (outcome.fate, outcome.how) == fate
        if outcome.fate is Fate.KEPT:
            check_kept(part, target)
        elif outcome.fate is Fate.CONVERTED:
            check_converted(part, target, format)
        else:
            assert part.kind in not_kept_line(outcomes)
            assert part.kind not in {each.kind for each in parts(target)}
    # and nothing is there that was not: no resolution, no EXIF, no profile out of nothing
    invented = {p.kind for p in parts(target)} - {p.kind for p in before}
    allowed = {
        "exif": {"comment", "caption text", "time of change", "density", "thumbnail"},
        "xmp": {"iptc", "caption text"},
        "icc": {"colour tags", "gamma", "CMYK or Lab profile"},
        "caption text": {"comment"},
        "sRGB": IMAGE_FATES if format == "avif" else {"CMYK or Lab profile"},
        "coded colour tags": {"icc"},
        "10 or 12 bit": {"16 bit"},
        "16 bit": {"10 or 12 bit"},
        "gain map": set(),
    }
    for kind in invented:
        assert {p.kind for p in before} & set(allowed[kind]), (kind, before)


def test_there_are_enough_cases():
    assert len(FILES) * len(IMAGE_FORMATS) >= 150


def test_the_table_has_every_kind_in_every_format_and_every_kind_is_tried():
    for kind, fates in IMAGE_FATES.items():
        assert set(fates) == set(IMAGE_FORMATS), kind
        assert all(how for fate, how in fates.values() if fate is not Fate.KEPT), kind
    assert {kind for kind, _ in FILES} | set(NOT_MADE) == set(IMAGE_FATES)


def test_the_table_is_written_as_markdown():
    lines = fates_table(IMAGE_FORMATS).splitlines()
    assert lines[0] == "| holding | png | jpeg | webp | tiff | avif | gif |"
    assert len(lines) == 2 + sum(1 for fates in FATES.values() if set(fates) & set(IMAGE_FORMATS))
    assert all(line.count("|") == 8 for line in lines)
    assert "| exif | kept | kept | kept | converted: to the page's tags | kept | not kept: GIF cannot hold it |" in lines
    whole = fates_table()
    for kind, fates in FATES.items():
        for fate, how in fates.values():
            assert f"| {kind} |" in whole
            assert (f"{fate.value}: {how}" if how else fate.value) in whole


def test_strict_refuses_what_would_be_lost_and_writes_nothing(made, tmp_path):
    picture = read_image(made("text", "png"))
    with pytest.raises(MediaError, match=r"strict.*text"):
        write_image(tmp_path / "out.jpg", picture, strict=True)
    assert not (tmp_path / "out.jpg").exists()
    write_image(tmp_path / "out.png", picture, strict=True)


def test_one_line_names_everything_by_its_reason(made, tmp_path):
    line = not_kept_line(write_image(tmp_path / "out.jpg", read_image(made("text", "png"))))
    assert line.count("only PNG has texts of any name") == 1
    assert "workflow" in line
    assert "other" in line
    assert "\n" not in line


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in ANIMATED for b in ANIMATED])
def test_animations_keep_frames_times_loops_and_alpha(tmp_path, source, target):
    frames = []
    for k in range(4):
        array = np.zeros((20, 26, 4), np.uint8)
        array[..., :3] = smooth(20, 26) if k != 2 else frames[-1][..., :3]
        array[0, k if k != 2 else 1] = 255
        array[..., 3] = np.where(np.arange(26) > 3 * k if k != 2 else frames[-1][0, :, 3] > 0, 255, 0)
        frames.append(array)
    pictures = [Image.fromarray(f) for f in frames]
    first = tmp_path / f"in{source}"
    options = {".gif": {"disposal": 2}, ".webp": {"lossless": True, "exact": True, "minimize_size": False}}.get(source, {})
    pictures[0].save(first, save_all=True, append_images=pictures[1:], duration=[100, 50, 250, 40], loop=3, **options)
    out = tmp_path / f"out{target}"
    with open_video(first) as reader, write_video(out, reader) as writer:
        held = list(reader)
        for frame in held:
            writer.write(frame.pixels, frame)
    with open_video(out) as reader:
        again = list(reader)
        assert reader.loop == AnimationLoop(first)
    assert [(f.pts, f.duration) for f in again] == [(f.pts, f.duration) for f in held]
    lossy = target == ".gif" or (source, target) in ((".gif", ".webp"), (".png", ".webp"))
    for one, other in zip(held, again):
        np.testing.assert_array_equal(one.alpha > 0.5, other.alpha > 0.5)
        shown = one.alpha > 0.5
        error = np.abs(one.pixels - other.pixels)[shown]
        assert error.mean() < (0.05 if lossy else 1e-6)


def AnimationLoop(path):
    with open_video(path) as reader:
        return reader.loop


@pytest.mark.parametrize("suffix", ANIMATED)
def test_equal_neighbours_stay_two_frames(tmp_path, suffix):
    (tmp_path / "in.png").write_bytes(animation("PNG"))
    with open_video(tmp_path / "in.png") as reader, write_video(tmp_path / f"out{suffix}", reader) as writer:
        still = next(iter(reader))
        for _ in range(3):
            writer.write(still.pixels, still)
    with open_video(tmp_path / f"out{suffix}") as reader:
        assert reader.info.frames == 3


def test_a_half_written_animation_leaves_nothing(tmp_path):
    (tmp_path / "in.gif").write_bytes(animation("GIF"))

    def stopped():
        with open_video(tmp_path / "in.gif") as reader, write_video(tmp_path / "o.gif", reader) as writer:
            frame = next(iter(reader))
            writer.write(frame.pixels, frame)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        stopped()
    assert [path.name for path in tmp_path.iterdir()] == ["in.gif"]


def test_damaged_containers_are_told_not_fatal(made, tmp_path):
    rng = np.random.default_rng(0)
    for (holding, format), build in FILES.items():
        data = bytearray(build())
        for _ in range(4):
            place = int(rng.integers(0, len(data)))
            data[place : place + 8] = rng.bytes(8)
            path = tmp_path / "damaged"
            path.write_bytes(data[: int(rng.integers(40, len(data) + 1))])
            kind = kind_of_file(path)
            assert kind is None or isinstance(inventory(path), list), (holding, format)


def test_lengths_are_not_trusted(tmp_path):
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 0xFFFFFFF0) + b"tEXtabc"
    heif = struct.pack(">I", 24) + b"ftypavif\0\0\0\0avifmif1" + struct.pack(">I4sQ", 1, b"meta", 1 << 60) + bytes(40)
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 700, 7, 0xFFFFFFFF, 8, 8)
    webp = b"RIFF\xff\xff\xff\xffWEBPEXIF\xff\xff\xff\x7f" + bytes(30)
    for data in (huge, heif, tiff, webp, b"GIF89a" + bytes(6) + b"\xf7\0\0"):
        path = tmp_path / "lying"
        path.write_bytes(data.ljust(60, b"\0"))
        began = time.perf_counter()
        inventory(path)
        assert time.perf_counter() - began < 0.5


def test_the_parts_are_read_as_other_libraries_wrote_them(made):
    assert of_kind(made("icc", "jpeg"), "icc")[0].data == SRGB
    assert of_kind(made("xmp", "avif"), "xmp")[0].data == XMP
    assert of_kind(made("iptc", "jpeg"), "iptc")[0].data == IIM
    assert of_kind(made("motion clip", "jpeg"), "motion clip")[0].data == CLIP
    with Image.open(io.BytesIO(FILES["density", "png"]())) as image:
        assert image.info["dpi"] == pytest.approx((300, 150), abs=0.1)
    assert of_kind(made("density", "png"), "density")[0].value[:2] == pytest.approx((300 / 0.0254, 150 / 0.0254), abs=1)
