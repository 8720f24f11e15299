"""Small pictures with one thing beside their pixels each, made by Pillow and a few bytes by hand, not by the engine."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"/></rdf:RDF></x:xmpmeta>'
)
IIM = b"\x1c\x02\x5a\x00\x04Town\x1c\x02\x19\x00\x03cat\x1c\x02\x19\x00\x04d\xc3\xa9j"  # City, and two keywords
PATH = b"8BIM\x07\xd0\x00\x00\x00\x00\x00\x06\x00\x06\x00\x00\x00\x00"  # a clipping path
PHOTOSHOP = b"Photoshop 3.0\0"
CAMERA = "http://ns.google.com/photos/1.0/camera/"
GAIN = "http://ns.adobe.com/hdr-gain-map/1.0/"
CLIP = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(range(256)) * 8


def smooth(height=24, width=36, channels=3):
    """A picture that JPEG holds well, different in every channel and not symmetric."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(y / height + (k + 1) * x / width) / (k + 2) for k in range(channels)]
    return np.rint(np.stack(planes, -1) * 255).astype(np.uint8)


def encoded(kind, array=None, **options):
    """A plain file of a kind."""
    buffer = io.BytesIO()
    Image.fromarray(smooth() if array is None else array).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(**tags):
    found = Image.Exif()
    found[0x010F] = "Maker"
    found.get_ifd(0x8769)[0x829A] = 0.01  # exposure time
    found.get_ifd(0x8825)[1] = "N"
    for tag, value in tags.items():
        found[int(tag[1:])] = value
    return found.tobytes()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks, late=False, file=None):
    """A PNG with chunks behind its header, or behind its picture."""
    data = file or encoded("PNG")
    place = len(data) - 12 if late else 33
    return data[:place] + b"".join(png_chunk(*each) for each in chunks) + data[place:]


def jpeg_with(*segments, behind=b"", file=None):
    """A JPEG with markers behind its first one, and bytes behind its end."""
    data = file or encoded("JPEG", quality=90)
    place = 4 + int.from_bytes(data[4:6], "big")
    made = b"".join(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content for marker, content in segments)
    return data[:place] + made + data[place:] + behind


def xmp_segment(packet):
    return 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet


def description(properties, inside=""):
    """A packet with these attributes of one description."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {properties}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def gain_map():
    """A small grey JPEG that says that it is a gain map."""
    values = {"Version": "1.0", "GainMapMin": 0, "GainMapMax": 2, "Gamma": 1, "OffsetSDR": 0.015625, "OffsetHDR": 0.015625}
    values |= {"HDRCapacityMin": 0, "HDRCapacityMax": 2, "BaseRenditionIsHDR": "False"}
    packet = description(f'xmlns:hdrgm="{GAIN}" ' + " ".join(f'hdrgm:{name}="{value}"' for name, value in values.items()))
    return jpeg_with(xmp_segment(packet), file=encoded("JPEG", smooth(6, 9, 1)[..., 0]))


def ultra_hdr(orientation=1):
    """A JPEG with a gain map, as phones write it, and a rating."""
    extra = gain_map()
    item = "http://ns.google.com/photos/1.0/container/item/"
    names = f'xmlns:hdrgm="{GAIN}" xmlns:C="http://ns.google.com/photos/1.0/container/" xmlns:I="{item}"'
    names += ' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4" hdrgm:Version="1.0"'
    li = '<rdf:li rdf:parseType="Resource"><C:Item I:Semantic="{}" I:Mime="image/jpeg"{}/></rdf:li>'
    items = li.format("Primary", "") + li.format("GainMap", f' I:Length="{len(extra)}"')
    packet = description(names, f"<C:Directory><rdf:Seq>{items}</rdf:Seq></C:Directory>")
    segments = [(0xE1, exif(t274=orientation)), xmp_segment(packet), (0xED, PHOTOSHOP + iptc_block())]
    first = jpeg_with(*segments)
    head = struct.pack(">2sHIH", b"MM", 42, 8, 3) + struct.pack(">HHI4s", 0xB000, 7, 4, b"0100")
    head += struct.pack(">HHIIHHIII", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50, 0)
    mpf_size = 4 + 4 + len(head) + 32
    total = len(first) + mpf_size
    place = 4 + int.from_bytes(first[4:6], "big")
    entries = struct.pack(">IIIHH", 0x030000, total, 0, 0, 0) + struct.pack(">IIIHH", 0, len(extra), total - place - 8, 0, 0)
    return jpeg_with((0xE2, b"MPF\0" + head + entries), file=first) + extra


def motion_photo():
    """A JPEG with a clip behind it, and the XMP that promises it."""
    names = f'xmlns:G="{CAMERA}" G:MicroVideo="1" G:MicroVideoOffset="{len(CLIP)}" G:MotionPhoto="1"'
    return jpeg_with(xmp_segment(description(names)), behind=CLIP)


def iptc_block(iim=IIM):
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iim)) + iim + b"\0" * (len(iim) % 2)


def with_thumbnail():
    """EXIF whose thumbnail is a small JPEG."""
    small = encoded("JPEG", np.full((8, 8, 3), 200, np.uint8))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHI4s", 0x010F, 2, 2, b"M\0\0\0") + struct.pack("<I", 26)
    head += struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(small), 0)
    return b"Exif\0\0" + head + small


def tiff_with(**tags):
    """A TIFF with tags: t700=(type, value)."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, (kind, value) in tags.items():
        info[int(name[1:])] = value
        info.tagtype[int(name[1:])] = kind
    return encoded("TIFF", tiffinfo=info)


def gif_with(extension):
    """A GIF with an extension before its picture."""
    data = encoded("GIF")
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    return data[:place] + extension + data[place:]


def blocks(data):
    return b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)) + b"\0"


def gif_xmp(packet):
    return gif_with(b"\x21\xff\x0bXMP DataXMP" + packet + b"\x01" + bytes(range(255, -1, -1)) + b"\0")


def webp_with(*chunks):
    """A WebP in the extended form with more chunks."""
    plain = encoded("WEBP", quality=90)[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<II", 10, 0x0C) + (35).to_bytes(3, "little") + (23).to_bytes(3, "little") + plain
    for kind, content in chunks:
        body += kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def avif_with(properties=(), items=()):
    """An AVIF with more properties and items of its picture."""
    from ebr_engine.media.holdings.heif_write import with_parts

    return with_parts(encoded("AVIF", quality=90), properties, items)


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def nclx(primaries, transfer):
    return box(b"colr", b"nclx" + struct.pack(">HHHB", primaries, transfer, 6, 0x80))


def png_text(**texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        if isinstance(text, tuple):
            info.add_itxt(name, *text)
        else:
            info.add_text(name, text)
    return encoded("PNG", pnginfo=info)


def deep_png():
    array = (smooth().astype(np.uint16) * 257).astype(">u2")
    header = struct.pack(">IIBBBBB", 36, 24, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def deep_avif(bits):
    import pyvips

    array = smooth().astype(np.uint16) << 8
    image = pyvips.Image.new_from_memory(array.tobytes(), 36, 24, 3, "ushort").copy(interpretation="rgb16")
    return image.heifsave_buffer(compression="av1", bitdepth=bits, Q=95, subsample_mode="off")


def two_pages():
    buffer = io.BytesIO()
    pages = [Image.fromarray(smooth()), Image.fromarray(255 - smooth(20, 30))]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


def animation(kind, **options):
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.roll(smooth(), 3 * k, 1)) for k in range(3)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=[100, 250, 40], loop=2, **options)
    return buffer.getvalue()


def preview():
    """A JPEG whose multi-picture list names a large thumbnail behind it."""
    small = encoded("JPEG", smooth(8, 12))
    head = struct.pack(">2sHIH", b"MM", 42, 8, 3) + struct.pack(">HHI4s", 0xB000, 7, 4, b"0100")
    head += struct.pack(">HHIIHHIII", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50, 0)
    plain = encoded("JPEG", quality=90)
    place = 4 + int.from_bytes(plain[4:6], "big")
    total = len(plain) + 4 + 4 + len(head) + 32
    entries = struct.pack(">IIIHH", 0x030000, total, 0, 0, 0)
    entries += struct.pack(">IIIHH", 0x010001, len(small), total - place - 8, 0, 0)
    return jpeg_with((0xE2, b"MPF\0" + head + entries)) + small


LIGHT = struct.pack(">II", 10_000_000, 2_000_000)
DISPLAY = struct.pack(">8H2I", 34000, 16000, 13250, 34500, 7500, 3000, 15635, 16450, 10_000_000, 50)
DISPLAY_HEIF = struct.pack(">8H2I", 13250, 34500, 7500, 3000, 34000, 16000, 15635, 16450, 10_000_000, 50)
TIFF_EXIF = {"t271": (2, "Maker"), "t315": (2, "Artist")}

# (holding, format) → the file's bytes.
FILES = {
    ("icc", "png"): lambda: encoded("PNG", icc_profile=SRGB),
    ("icc", "jpeg"): lambda: encoded("JPEG", icc_profile=SRGB, quality=90),
    ("icc", "webp"): lambda: encoded("WEBP", icc_profile=SRGB, quality=90),
    ("icc", "tiff"): lambda: encoded("TIFF", icc_profile=SRGB),
    ("icc", "avif"): lambda: encoded("AVIF", icc_profile=SRGB, quality=90),
    ("icc", "gif"): lambda: gif_with(b"\x21\xff\x0bICCRGBG1012" + blocks(SRGB)),
    ("CMYK or Lab profile", "jpeg"): lambda: _cmyk(),
    ("CMYK or Lab profile", "tiff"): lambda: _lab(),
    ("exif", "png"): lambda: encoded("PNG", exif=exif()),
    ("exif", "jpeg"): lambda: encoded("JPEG", exif=exif(), quality=90),
    ("exif", "webp"): lambda: encoded("WEBP", exif=exif(), quality=90),
    ("exif", "tiff"): lambda: tiff_with(**TIFF_EXIF),
    ("exif", "avif"): lambda: encoded("AVIF", exif=exif(), quality=90),
    ("xmp", "png"): lambda: png_text(**{"XML:com.adobe.xmp": (XMP.decode(),)}),
    ("xmp", "jpeg"): lambda: encoded("JPEG", xmp=XMP, quality=90),
    ("xmp", "webp"): lambda: encoded("WEBP", xmp=XMP, quality=90),
    ("xmp", "tiff"): lambda: tiff_with(t700=(1, XMP)),
    ("xmp", "avif"): lambda: encoded("AVIF", xmp=XMP, quality=90),
    ("xmp", "gif"): lambda: gif_xmp(XMP),
    ("iptc", "jpeg"): lambda: jpeg_with((0xED, PHOTOSHOP + iptc_block())),
    ("iptc", "tiff"): lambda: tiff_with(t33723=(7, IIM)),
    ("iptc", "png"): lambda: png_with((b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(raw_profile("iptc", iptc_block())))),
    ("photoshop resources", "jpeg"): lambda: jpeg_with((0xED, PHOTOSHOP + PATH)),
    ("photoshop resources", "tiff"): lambda: tiff_with(t34377=(7, PATH)),
    ("comment", "jpeg"): lambda: jpeg_with((0xFE, "héllo".encode())),
    ("comment", "gif"): lambda: gif_with(b"\x21\xfe" + blocks("héllo".encode())),
    ("caption text", "png"): lambda: png_text(Title="tt", Author="me", parameters=("桜 steps 20",)),
    ("text", "png"): lambda: png_text(workflow="{}" * 50, other=("桜",)),
    ("plain text", "gif"): lambda: gif_with(b"\x21\x01\x0c" + bytes(12) + blocks(b"hi")),
    ("time of change", "png"): lambda: png_with((b"tIME", struct.pack(">HBBBBB", 2024, 2, 3, 4, 5, 6))),
    ("density", "png"): lambda: encoded("PNG", dpi=(300, 150)),
    ("density", "jpeg"): lambda: encoded("JPEG", dpi=(300, 150), quality=90),
    ("density", "tiff"): lambda: encoded("TIFF", dpi=(300, 150)),
    ("density", "bmp"): lambda: encoded("BMP", dpi=(300, 150)),
    ("pixel aspect", "png"): lambda: png_with((b"pHYs", struct.pack(">IIB", 4, 3, 0))),
    ("pixel aspect", "jpeg"): lambda: _aspect_jpeg(),
    ("pixel aspect", "tiff"): lambda: tiff_with(t282=(5, 4.0), t283=(5, 3.0), t296=(3, 1)),
    ("pixel aspect", "avif"): lambda: avif_with([box(b"pasp", struct.pack(">II", 3, 4))]),
    ("background", "png"): lambda: png_with((b"bKGD", struct.pack(">3H", 10, 20, 30))),
    ("significant bits", "png"): lambda: png_with((b"sBIT", b"\5\6\5")),
    ("palette hints", "png"): lambda: png_with((b"sPLT", b"name\0\x08" + bytes(6))),
    ("stereo", "png"): lambda: png_with((b"sTER", b"\1")),
    ("provenance", "png"): lambda: png_with((b"caBX", b"jumb" * 4)),
    ("provenance", "jpeg"): lambda: jpeg_with((0xEB, b"JP\0\1\0\0\0\1" + b"jumb" * 4)),
    ("provenance", "webp"): lambda: webp_with((b"C2PA", b"jumb" * 4)),
    ("private tags", "tiff"): lambda: tiff_with(t33550=(12, (1.0, 2.0, 0.0)), t65000=(2, "mine")),
    ("application data", "jpeg"): lambda: jpeg_with((0xE5, b"Ranger\0\0" + bytes(range(100)))),
    ("application extension", "gif"): lambda: gif_with(b"\x21\xff\x0bMYPROGRAM10" + blocks(b"settings")),
    ("unknown chunk", "png"): lambda: png_with((b"orNt", b"whatever")),
    ("unsafe chunk", "png"): lambda: png_with((b"vpAG", b"whatever")),
    ("unknown WebP chunk", "webp"): lambda: webp_with((b"MINE", b"whatever")),
    ("unknown item", "avif"): lambda: avif_with(items=[(b"mime", b"text/plain", b"hello")]),
    ("colour tags", "png"): lambda: png_with((b"cICP", b"\x09\x10\x00\x01")),
    ("colour tags", "avif"): lambda: avif_with([nclx(12, 13)]),
    ("coded colour tags", "avif"): lambda: avif_with([nclx(12, 13), box(b"colr", b"prof" + SRGB)]),
    ("gamma", "png"): lambda: png_with(
        (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000))
    ),
    ("gamma", "tiff"): lambda: tiff_with(t318=(5, (0.3127, 0.329)), t319=(5, (0.64, 0.33, 0.21, 0.71, 0.15, 0.06))),
    ("sRGB", "png"): lambda: png_with((b"sRGB", b"\1")),
    ("sRGB", "avif"): lambda: avif_with([nclx(1, 13)]),
    ("second colour description", "png"): lambda: png_with(
        (b"gAMA", struct.pack(">I", 45455)), file=encoded("PNG", icc_profile=SRGB)
    ),
    ("light level", "png"): lambda: png_with((b"cICP", b"\x09\x10\x00\x01"), (b"cLLI", LIGHT)),
    ("light level", "avif"): lambda: avif_with([box(b"clli", struct.pack(">HH", 1000, 200))]),
    ("mastering display", "png"): lambda: png_with((b"mDCV", DISPLAY)),
    ("mastering display", "avif"): lambda: avif_with([box(b"mdcv", DISPLAY_HEIF)]),
    ("viewing hints", "avif"): lambda: avif_with([box(b"amve", struct.pack(">IHH", 3140000, 15635, 16450))]),
    ("16 bit", "png"): deep_png,
    ("10 or 12 bit", "avif"): lambda: deep_avif(10),
    ("lossless coding", "webp"): lambda: encoded("WEBP", lossless=True),
    ("thumbnail", "jpeg"): lambda: jpeg_with((0xE1, with_thumbnail())),
    ("thumbnail", "webp"): lambda: webp_with((b"EXIF", with_thumbnail())),
    ("preview", "jpeg"): preview,
    ("gain map", "jpeg"): ultra_hdr,
    ("HEIF gain map", "avif"): lambda: avif_with(items=[(b"tmap", b"", bytes(20))]),
    ("motion clip", "jpeg"): motion_photo,
    ("second picture", "jpeg"): lambda: jpeg_with(behind=encoded("JPEG", smooth(8, 12))),
    ("inner picture", "tiff"): lambda: tiff_with(t330=(4, (8,))),
    ("pages", "tiff"): two_pages,
    ("data behind the picture", "jpeg"): lambda: jpeg_with(behind=b"SAMSUNG data of its own"),
    ("data behind the picture", "png"): lambda: encoded("PNG") + b"PK archive",
    ("data behind the picture", "webp"): lambda: encoded("WEBP", quality=90) + b"PK archive",
    ("data behind the picture", "gif"): lambda: encoded("GIF") + b"PK archive",
    ("damaged part", "png"): lambda: png_with((b"eXIf", b"nonsense")),
    ("damaged part", "jpeg"): lambda: jpeg_with((0xE1, b"Exif\0\0nonsense")),
    ("damaged part", "webp"): lambda: webp_with((b"EXIF", b"nonsense")),
}  # fmt: skip


def raw_profile(name, data):
    """ImageMagick's form of a profile as text."""
    return f"\n{name}\n{len(data):8}\n{data.hex()}\n".encode()


def _cmyk():
    """A CMYK JPEG with a profile that says so; its curves are of no importance."""
    buffer = io.BytesIO()
    Image.fromarray(smooth()).convert("CMYK").save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    profile = bytearray(SRGB)
    profile[16:20] = b"CMYK"
    return data[:2] + struct.pack(">BBH", 0xFF, 0xE2, len(profile) + 16) + b"ICC_PROFILE\0\1\1" + bytes(profile) + data[2:]


def _lab():
    buffer = io.BytesIO()
    Image.new("LAB", (36, 24), (128, 10, 240)).save(buffer, "TIFF", icc_profile=SRGB)
    return buffer.getvalue()


def _aspect_jpeg():
    data = bytearray(encoded("JPEG", quality=90))
    data[13:18] = b"\0" + struct.pack(">HH", 4, 3)
    return bytes(data)
