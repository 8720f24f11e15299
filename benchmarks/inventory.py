"""What the inventory of a file costs: CPU milliseconds a picture and a clip, beside decoding the same file.

CPU time and not the clock's, so that other work on the machine does not count; files are in the system's cache.

python -m benchmarks.inventory --json benchmarks/results/inventory.json
"""

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import Benchmark, columns, spread

PICTURE_LIMIT, CLIP_LIMIT = 3.0, 50.0  # milliseconds that one may cost
HEIGHT, WIDTH = 3000, 4000  # a telephone's picture
REPEATS = 21


def photo() -> np.ndarray:
    """[H, W, 3] uint8 with the detail of a photograph, so that files are as large as those of cameras."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    base = np.stack([np.sin(x / (300 + 50 * k)) + np.cos(y / (200 + 40 * k)) for k in range(3)], -1)
    coarse = rng.normal(0, 0.5, (HEIGHT // 8, WIDTH // 8, 3)).repeat(8, 0).repeat(8, 1)
    fine = rng.normal(0, 0.04, (HEIGHT, WIDTH, 1))
    return (np.clip(base / 4 + coarse / 4 + fine + 0.5, 0, 1) * 255).astype(np.uint8)


def pictures(folder: Path) -> dict[str, Path]:
    """A large picture of every format, with a profile, EXIF, XMP and texts where the format has them."""
    from PIL import Image, ImageCms, PngImagePlugin

    image = Image.fromarray(photo())
    exif = Image.Exif()
    exif[0x010F], exif.get_ifd(0x8769)[0x829A] = "Maker", 0.01
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("parameters", "steps 20 " * 50)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    common = {"exif": exif.tobytes(), "icc_profile": profile}
    ways = {
        "jpeg": {"quality": 92, "xmp": b"<x/>", "subsampling": 2, **common},
        "png": {"compress_level": 1, "pnginfo": texts, **common},
        "webp": {"quality": 90, "method": 0, **common},
        "tiff": {"compression": "tiff_lzw", "icc_profile": profile},
        "avif": {"quality": 80, "speed": 10, **common},
        "gif": {},
    }
    found = {}
    for kind, options in ways.items():
        found[kind] = folder / f"a.{kind}"
        image.save(found[kind], kind.upper(), **options)
    behind = found["jpeg"].read_bytes() + b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + np.random.default_rng(1).bytes(4_000_000)
    found["jpeg, motion photo"] = folder / "motion.jpg"
    found["jpeg, motion photo"].write_bytes(behind)
    return found


def clips(folder: Path) -> dict[str, Path]:
    """Twenty seconds of 1280 × 720 in three containers."""
    import av

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (90, 160, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    found = {}
    for suffix in ("mp4", "mov", "mkv"):
        found[suffix] = folder / f"a.{suffix}"
        with av.open(str(found[suffix]), "w") as output:
            stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "30"})
            stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
            stream.time_base = Fraction(1, 25)
            for index in range(500):
                frame = av.VideoFrame.from_ndarray(np.roll(small, 4 * index, 1), "rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    return found


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    """CPU milliseconds of every call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        times.append((time.process_time() - began) * 1000)
    return times


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row a file: its size, what its inventory costs, and what reading it (a clip: its first frame) costs."""
    from ebr_engine.media.holdings import inventory
    from ebr_engine.media.images import read_image
    from ebr_engine.media.video import open_video

    def first_frame(path: Path) -> None:
        with open_video(path, frames=1) as reader:
            next(iter(reader))

    rows = []
    for files, read, limit in ((pictures(folder), read_image, PICTURE_LIMIT), (clips(folder), first_frame, CLIP_LIMIT)):
        for name, path in files.items():
            rows.append(
                {
                    "file": name,
                    "bytes": path.stat().st_size,
                    "inventory_ms": spread(timed(lambda path=path: inventory(path), REPEATS)),
                    "read_ms": spread(timed(lambda path=path, read=read: read(path), 3)),
                    "limit_ms": limit,
                }
            )
    return rows


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    cells = []
    for row in result["rows"]:
        low, high = row["inventory_ms"]["quartiles"]
        median = row["inventory_ms"]["median"]
        read = row["read_ms"]["median"]
        cells.append(
            (
                row["file"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{median:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{read:.0f}",
                f"{row['limit_ms']:g}",
            )
        )
    return columns(("file", "MB", "inventory, ms", "quartiles", "reading, ms", "limit, ms"), cells)


def options(parser: ArgumentParser) -> None:
    """None of its own."""


def measure(options: Namespace) -> dict[str, Any]:
    """What the inventory of every kind of file costs, beside reading it."""
    with tempfile.TemporaryDirectory() as folder:
        return {"rows": rows_of(Path(folder))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a row a file."""
    report.main("inventory", __doc__, Benchmark(options, measure, table), arguments)


if __name__ == "__main__":
    main()
