"""Builders of bad and odd files: each writes one, and says what has to become of it."""

import gzip
import io
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

RGB = np.random.default_rng(1).integers(0, 256, (12, 18, 3), np.uint8)
CASES = {}


def case(name, out="out.png", **expected):
    """Register a builder for a file of this name. `expected`: `shape`, `bits`, `alpha` of the result, or `refused` words."""

    def register(build):
        CASES[build.__name__ if build.__name__ != "_" else name] = (name, out, build, expected)
        return build

    return register


def encoded(kind="PNG", pixels=RGB, **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colour=2, data=b"", extra=b"", interlace=0):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def raw(label, name, content, out="out.png", **expected):
    """A file of these bytes (or of what a function of no arguments gives)."""
    CASES[label] = (name, out, lambda path: Path(path).write_bytes(content() if callable(content) else content), expected)


def tiff(*pages, **options):
    def build():
        import tifffile

        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("byteorder", "<")) as file:
            for page in pages:
                file.write(page, **{"photometric": "rgb" if page.ndim == 3 else "minisblack", "metadata": None, **options})
        return buffer.getvalue()

    return build


def flipped(content, at, value=0xFF):
    content = bytearray(content)
    content[at] ^= value
    return bytes(content)


def sized_jpeg(height, width):
    content = bytearray(encoded("JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


raw("zero bytes", "x.png", b"", refused=["x.png", "empty"])
raw("one byte", "x.png", b"\x89", refused=["not a PNG"])
raw("text", "x.png", b"hello\n" * 50, refused=["not a PNG"])
raw("web page", "x.jpg", b"<!doctype html><html></html>", refused=["not a PNG"])
raw("signature only", "x.png", b"\x89PNG\r\n\x1a\n", refused=["PNG", "damaged"])
for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif"), ("AVIF", "avif")):
    raw(f"half a {kind}", f"x.{suffix}", lambda kind=kind: (c := encoded(kind))[: len(c) // 2], refused=["damaged"])
    raw(f"first 40 bytes of a {kind}", f"x.{suffix}", lambda kind=kind: encoded(kind)[:40], refused=["damaged"])
raw("PNG with a wrong checksum", "x.png", lambda: flipped(encoded(), encoded().index(b"IDAT") + 60), refused=["damaged"])
raw(
    "PNG of 400 megapixels that would unpack",
    "x.png",
    lambda: png(20000, 20000, 1, 0, zlib.compress(bytes(2501) * 20000)),
    refused=["400 megapixels", "limit"],
)
raw("PNG that declares 16k", "x.png", lambda: png(16384, 20000, data=zlib.compress(b"\0" * 99)), refused=["megapixels"])
raw("PNG that declares everything", "x.png", lambda: png(2**31 - 1, 2**31 - 1), refused=["x.png"])
raw("PNG without width", "x.png", lambda: png(0, 5), refused=["damaged"])
raw("JPEG that declares 65500", "x.jpg", lambda: sized_jpeg(65500, 65500), refused=["megapixels"])
raw("JPEG that declares no height", "x.jpg", lambda: sized_jpeg(0, 18), refused=["damaged"])
raw(
    "PNG whose text unpacks to 50 MB",
    "x.png",
    lambda: png(1, 1, data=zlib.compress(b"\0\1\2\3"), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9))),
    shape=(1, 1),
)
raw("animated GIF", "x.gif", lambda: encoded("GIF", save_all=True, append_images=[Image.fromarray(255 - RGB)]), frames=2)
raw(
    "animated WebP",
    "x.webp",
    lambda: encoded("WEBP", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
    frames=2,
)
raw("animated PNG", "x.png", lambda: encoded(save_all=True, append_images=[Image.fromarray(255 - RGB)]), frames=2)
raw("TIFF of two pages", "x.tif", tiff(RGB, RGB), shape=(12, 18))
raw("float TIFF", "x.tif", tiff(RGB.astype(np.float32)), refused=["float", "8 or 16 bits"])
raw("TIFF with NaN", "x.tif", tiff(np.full((4, 4, 3), np.nan, np.float32)), refused=["float"])
raw("double TIFF", "x.tif", tiff(np.ones((4, 4))), refused=["TIFF", "not read"])
raw("32-bit TIFF", "x.tif", tiff(np.ones((4, 4), np.uint32)), refused=["uint"])
raw("complex TIFF", "x.tif", tiff(np.ones((4, 4), np.complex64)), refused=["TIFF", "not read"])
raw(
    "TIFF of seven channels",
    "x.tif",
    tiff(np.ones((4, 4, 7), np.uint8), photometric="minisblack", planarconfig="contig"),
    refused=["7 channels"],
)
raw("OpenEXR", "x.exr", b"\x76\x2f\x31\x01\2\0\0\0" + bytes(300), refused=["not a PNG"])
raw("HEIC", "x.heic", struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(200), refused=["HEIC"])
raw("AVIF without anything", "x.avif", struct.pack(">I", 24) + b"ftypavif\0\0\0\0avifmif1" + bytes(200), refused=["damaged"])
raw("AVIF sequence header", "x.avif", struct.pack(">I", 24) + b"ftypavis\0\0\0\0avifmif1" + bytes(200), refused=["x.avif"])
raw("Photoshop", "x.png", b"8BPS\0\1" + bytes(100), refused=["not a PNG"])
raw(
    "SVG that names itself a PNG",
    "x.png",
    b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    refused=["not a PNG"],
)
raw(
    "XML that grows",
    "x.png",
    b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;">]><svg>&c;</svg>',
    refused=["not a PNG"],
)
raw("PDF", "x.jpg", b"%PDF-1.7\n" + bytes(100), refused=["not a PNG"])
raw("BMP", "x.png", lambda: encoded("BMP"), shape=(12, 18), exact=True)
raw("icon", "x.png", lambda: encoded("ICO"), refused=["not a PNG"])
raw("gzip", "x.png", lambda: gzip.compress(encoded()), refused=["not a PNG"])
raw("script", "x.png", b"#!/bin/sh\necho\n", refused=["not a PNG"])
raw("RIFF without WebP", "x.webp", b"RIFF\x24\0\0\0WAVEfmt ", refused=["is sound"])

raw("one pixel", "x.png", lambda: encoded(pixels=RGB[:1, :1]), shape=(1, 1))
raw("one column", "x.png", lambda: encoded(pixels=np.zeros((20000, 1, 3), np.uint8)), shape=(20000, 1))
raw("one row", "x.png", lambda: encoded(pixels=np.zeros((1, 20000, 3), np.uint8)), shape=(1, 20000))
raw("JPEG that names itself a PNG", "x.png", lambda: encoded("JPEG"), shape=(12, 18))
raw("PNG that names itself a JPEG", "x.jpg", encoded, shape=(12, 18), exact=True)
raw("upper-case name", "X.PNG", encoded, shape=(12, 18), exact=True)
raw("palette", "x.png", lambda: encoded(pixels=Image.fromarray(RGB).quantize(16)), shape=(12, 18))
raw(
    "palette with a transparent colour",
    "x.png",
    lambda: encoded(pixels=Image.fromarray(RGB).quantize(16), transparency=3),
    shape=(12, 18),
    alpha=True,
)
raw("one bit", "x.png", lambda: encoded(pixels=Image.fromarray(RGB).convert("1")), shape=(12, 18))
raw("two bits of grey", "x.png", lambda: png(4, 1, 2, 0, zlib.compress(b"\0\x1b")), shape=(1, 4))
raw(
    "sixteen bits of grey and alpha",
    "x.png",
    lambda: png(2, 1, 16, 4, zlib.compress(b"\0" + bytes(range(8)))),
    shape=(1, 2),
    bits=16,
    alpha=True,
)
raw("interlaced PNG", "x.png", lambda: png(1, 1, 8, 2, zlib.compress(b"\0\1\2\3"), interlace=1), shape=(1, 1))
raw("RGB and alpha", "x.png", lambda: encoded(pixels=np.dstack([RGB, RGB[..., 0]])), shape=(12, 18), alpha=True)
raw("CMYK JPEG", "x.jpg", lambda: encoded("JPEG", Image.fromarray(RGB).convert("CMYK")), shape=(12, 18))
raw("CMYK TIFF", "x.tif", lambda: encoded("TIFF", Image.fromarray(RGB).convert("CMYK")), shape=(12, 18))
raw("Lab TIFF", "x.tif", lambda: encoded("TIFF", Image.new("LAB", (8, 6), (128, 10, 240))), shape=(6, 8))
raw("progressive JPEG", "x.jpg", lambda: encoded("JPEG", progressive=True), shape=(12, 18))
raw("grey JPEG", "x.jpg", lambda: encoded("JPEG", RGB[..., 0]), shape=(12, 18))
raw("still GIF", "x.gif", lambda: encoded("GIF"), shape=(12, 18))
raw("JPEG on its side", "x.jpg", lambda: encoded("JPEG", exif=(e := Image.Exif(), e.__setitem__(0x0112, 8))[0]), shape=(18, 12))
raw("big-endian TIFF", "x.tif", tiff(RGB, byteorder=">"), shape=(12, 18), exact=True)
raw("TIFF of 64 bits", "x.tif", tiff(RGB, bigtiff=True), shape=(12, 18), exact=True)
raw("TIFF in tiles", "x.tif", tiff(np.tile(RGB, (2, 2, 1)), tile=(16, 16)), shape=(24, 36))
raw(
    "TIFF in planes",
    "x.tif",
    tiff(np.ascontiguousarray(RGB.transpose(2, 0, 1)), planarconfig="separate"),
    shape=(12, 18),
    exact=True,
)
raw("TIFF of 16 bits", "x.tif", tiff(RGB.astype(np.uint16) * 257), shape=(12, 18), bits=16)
raw(
    "lossless WebP with alpha",
    "x.webp",
    lambda: encoded("WEBP", np.dstack([RGB, RGB[..., 0]]), lossless=True),
    shape=(12, 18),
    alpha=True,
)
raw("AVIF", "x.avif", lambda: encoded("AVIF"), shape=(12, 18))
raw(
    "colour profile that is none",
    "x.png",
    lambda: png(1, 1, data=zlib.compress(b"\0\1\2\3"), extra=chunk(b"iCCP", b"p\0\0" + zlib.compress(b"junk"))),
    shape=(1, 1),
)
raw("EXIF that is none", "x.jpg", lambda: encoded("JPEG", exif=b"Exif\0\0junkjunkjunk"), shape=(12, 18))
raw("JPEG and more after it", "x.jpg", lambda: encoded("JPEG") + b"more" * 99, shape=(12, 18))
raw("PNG and more after it", "x.png", lambda: encoded() + b"more" * 99, shape=(12, 18), exact=True)

for label, name in {
    "Unicode name": "ünïcødé 画像 🌧.png",
    "long name": "n" * 251 + ".png",
    "name with a line break": "a\nb.png",
    "name that looks like an option": "--task.png",
    "name that looks like markup": "[red]a[bold].png",
    "name with quotes and spaces": " a 'b' \"c\" .png",
    "name that looks like a pattern": "a*[1]?.png",
    "name that is a number format": "a%d%s%n.png",
}.items():
    raw(label, name, encoded, shape=(12, 18), exact=True, out="out/")


@case("x.png", refused=["x.png"])
def folder_with_a_pictures_name(path):
    os.mkdir(path)


@case("x.png", refused=["not a regular file"])
def fifo(path):
    os.mkfifo(path)


@case("x.mp4", out="out.mp4", refused=["not a regular file"])
def video_fifo(path):
    os.mkfifo(path)


@case("x.png", refused=["not a regular file"])
def device(path):
    os.symlink("/dev/zero", path)


@case("x.png", refused=["no such file"])
def link_to_itself(path):
    os.symlink(path, path)


@case("x.png", refused=["no such file"])
def link_to_nothing(path):
    os.symlink("gone", path)


@case("x.png", refused=["Permission denied"])
def without_permission(path):
    Path(path).write_bytes(encoded())
    os.chmod(path, 0)


def video(path, sizes=((16, 24),), frames=4, codec="ffv1", pix_fmt="yuv420p", format=None, sound=False):
    import av

    with av.open(str(path), "w", format=format) as file:
        stream = file.add_stream(codec, rate=10)
        (stream.height, stream.width), stream.pix_fmt = sizes[0], pix_fmt
        for index in range(frames):
            picture = np.full((*sizes[0], 3), 20 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def of_video(change=lambda content: content, **options):
    def build():
        video("made.mkv", **options)
        content = Path("made.mkv").read_bytes()
        os.unlink("made.mkv")
        return change(content)

    return build


def damaged(content):
    content = bytearray(content)
    for at in range(len(content) // 3, len(content) - 200, 97):
        content[at] ^= 0x5A
    return bytes(content)


raw("empty video", "x.mp4", b"", "out.mp4", refused=["empty"])
raw("text as a video", "x.mp4", b"hello world\n" * 20, "out.mp4", refused=["x.mp4"])
raw("picture as a video", "x.mp4", encoded, "out.mp4", refused=["cannot write .mp4"])
raw("list of addresses", "x.mp4", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "out.mp4", refused=["x.mp4"])
raw("list of files", "x.mkv", b"ffconcat version 1.0\nfile /etc/passwd\n", "out.mkv", refused=["x.mkv"])
raw("first bytes of a video", "x.mkv", of_video(lambda content: content[:300]), "out.mkv", refused=["x.mkv"])
raw(
    "video without frames",
    "x.mkv",
    of_video(lambda content: content[: content.index(b"\x1f\x43\xb6\x75")]),
    "out.mkv",
    refused=["x.mkv", "damaged"],
)
raw("video with broken packets", "x.mkv", of_video(damaged, frames=12, codec="libx264"), "out.mkv", odd=True)
raw(
    "half a video",
    "x.ts",
    of_video(lambda content: content[: len(content) // 2], frames=12, codec="mpeg2video", format="mpegts"),
    "out.mkv",
    odd=True,
)
raw("video of one frame", "x.mkv", of_video(frames=1), "out.mkv", frames=1)
raw("video of one pixel", "x.mkv", of_video(sizes=((1, 1),), pix_fmt="yuv444p"), "out.mkv", frames=4)
raw("video with odd sides", "x.mkv", of_video(sizes=((15, 21),), pix_fmt="yuv444p"), "out.mkv", frames=4)
raw("grey video", "x.mkv", of_video(pix_fmt="gray"), "out.mkv", frames=4)
raw(
    "video that grows",
    "x.ts",
    lambda: (
        of_video(codec="mpeg2video", format="mpegts", sizes=((32, 48),))()
        + of_video(codec="mpeg2video", format="mpegts", sizes=((48, 64),))()
    ),
    "out.mkv",
    refused=["the picture changes from 48 x 32 to 64 x 48"],
)
raw(
    "video with pictures of 400 megapixels",
    "x.mkv",
    of_video(lambda content: content.replace(b"\xb0\x81\x18\xba\x81\x10", b"\xb0\x82\x4e\x20\xba\x82\x4e\x20")),
    "out.mkv",
    refused=["x.mkv"],
)


@case("x.mp4", out="out.mp4", refused=["no video stream"])
def sound_only(path):
    import av

    with av.open(path, "w") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        for index in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, index * 1024, Fraction(1, 44100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
