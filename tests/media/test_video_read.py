"""Reading videos: upright, exact in time, bounded, and one clear line for what is no video."""

import os
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.video import Colour, open_video, video_suffixes
from ebr_engine.media.video.colour import from_rgb

av = pytest.importorskip("av")

SAMPLES = Path(__file__).parents[3] / "shared" / "samples"


def read(path, **settings):
    with open_video(path, **settings) as reader:
        frames = list(reader)
    return reader, frames


def stored(path, count=None):
    """The first frames as the decoder gives them, converted by FFmpeg: [H, W, 3] in [0, 1]."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") / 255 for frame in islice(container.decode(video=0), count)]


def test_what_a_clip_is(make_clip):
    path = make_clip("clip.mkv", 12, audio="aac", subtitles=True, chapters=[(0, 500, "one"), (500, 1000, "two")])
    with open_video(path) as reader:
        info = reader.info
    assert (info.width, info.height, info.fps, info.bits, info.pix_fmt, info.codec) == (64, 48, 12, 8, "yuv420p", "h264")
    assert (info.has_audio, info.has_subtitles, info.chapters, info.variable_rate) == (True, True, 2, False)
    assert (info.frames, info.expected_frames) == (None, 12)  # Matroska does not count
    assert info.colour.matrix == 6  # undeclared, and small


def test_frames_have_the_colours_and_times_of_the_stream(make_clip):
    path = make_clip(frames=7, pix_fmt="yuv444p", options={"crf": "0"})
    reader, frames = read(path)
    assert reader.info.frames == len(frames) == 7
    assert [frame.time for frame in frames] == [Fraction(i, 12) for i in range(7)]
    assert [frame.duration * frame.time_base for frame in frames] == [Fraction(1, 12)] * 7
    for frame, expected in zip(frames, stored(path)):
        assert frame.pixels.dtype == np.float32
        np.testing.assert_allclose(frame.pixels, expected, atol=2.5 / 255)  # FFmpeg rounds to 8 bit on the way
    assert reader.exhausted
    assert not reader.warnings


@pytest.mark.parametrize("sides", [(48, 64), (37, 51)])
@pytest.mark.parametrize(("pix_fmt", "bits"), [("yuv444p10le", 10), ("gbrp12le", 12), ("gray16le", 16)])
def test_more_than_eight_bits_arrive(make_clip, pix_fmt, bits, sides):
    rgb = np.repeat(np.linspace(0, 1, sides[0] * sides[1], dtype=np.float32).reshape(*sides, 1), 3, axis=2)
    picture = from_rgb(rgb, av.VideoFormat(pix_fmt, sides[1], sides[0]), Colour(matrix=6, full_range="gray" in pix_fmt))
    reader, (frame,) = read(make_clip("deep.mkv", pictures=[picture], codec="ffv1", pix_fmt=pix_fmt))
    assert reader.info.bits == bits
    np.testing.assert_allclose(frame.pixels, rgb, atol=0.51 / (2**bits * 219 / 255))


@pytest.mark.parametrize(
    ("rotate", "turned", "degrees"),
    [
        ((90,), lambda p: np.rot90(p), 270),
        ((180,), lambda p: np.rot90(p, 2), 180),
        ((270,), lambda p: np.rot90(p, -1), 90),
        ((0, True), lambda p: p[:, ::-1], 0),
        ((0, False, True), lambda p: p[::-1], 0),
        ((90, True), lambda p: p[::-1, ::-1].transpose(1, 0, 2), 90),
    ],
)
def test_rotation_and_mirroring_are_applied(make_clip, rotate, turned, degrees):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a display matrix")
    path = make_clip(frames=2, pix_fmt="yuv444p", rotate=rotate, context={"sample_aspect_ratio": Fraction(4, 3)})
    reader, frames = read(path)
    expected = turned(stored(path)[0])
    assert (reader.info.height, reader.info.width) == frames[0].pixels.shape[:2] == expected.shape[:2]
    np.testing.assert_allclose(frames[0].pixels, expected, atol=2.5 / 255)
    assert reader.info.rotation == degrees
    assert reader.info.pixel_aspect == (Fraction(3, 4) if rotate[0] in (90, 270) else Fraction(4, 3))


def test_a_variable_rate_is_kept_to_the_tick(make_clip):
    ticks = [0, 512, 3000, 3100, 9000, 9001]
    reader, frames = read(make_clip(frames=6, ticks=ticks, time_base=Fraction(1, 12288)))
    assert [frame.pts for frame in frames] == ticks
    assert reader.info.time_base == Fraction(1, 12288)
    assert reader.info.variable_rate


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
@pytest.mark.parametrize("start", [0, 0.5, 0.51, 2.0])
def test_start_and_frames_cut_exactly(make_clip, suffix, start):
    path = make_clip(f"long{suffix}", 30, options={"crf": "10", "g": "10", "bf": "0" if suffix == ".avi" else "2"})
    _, whole = read(path)
    expected = [frame for frame in whole if frame.time >= start][:4]
    reader, part = read(path, start=start, frames=4)
    assert [frame.time for frame in part] == [frame.time - expected[0].time for frame in expected]
    assert abs(expected[0].time - start) <= Fraction(1, 12)
    for before, frame in zip(expected, part):
        np.testing.assert_array_equal(frame.pixels, before.pixels)
    assert not reader.exhausted


def test_a_start_after_the_end_is_refused(make_clip):
    with pytest.raises(MediaError, match="no frame at or after 9 s"):
        open_video(make_clip(), start=9)


def interlaced_pictures(count=4):
    """Fields of a bar that moves by four pixels a field, woven together and flagged."""
    for index in range(count):
        luma = np.full((48, 64), 60, np.uint8)
        for field in (0, 1):
            left = 4 + 4 * (2 * index + field)
            luma[field::2, left : left + 16] = 200
        yield luma


def test_interlaced_video_is_refused_or_deinterlaced(make_clip):
    woven = list(interlaced_pictures())
    pictures = [av.VideoFrame.from_ndarray(luma, "gray").reformat(format="yuv420p") for luma in woven]
    options = {"flags": "+ildct+ilme", "b": "4M"}
    path = make_clip("f.mkv", pictures=pictures, codec="mpeg2video", rate=25, time_base=Fraction(1, 25), options=options)
    with pytest.raises(MediaError, match=r"interlaced.*--deinterlace"):
        open_video(path)
    reader, frames = read(path, deinterlace=True)
    assert len(frames) == len(woven)
    assert [frame.time for frame in frames] == [Fraction(i, 25) for i in range(4)]
    combs = [np.abs(np.diff(f.pixels[..., 0], 2, axis=0)).mean() for f in frames]
    assert max(combs) < 0.3 * np.abs(np.diff(woven[1] / 255.0, 2, axis=0)).mean()
    assert reader.info.interlaced


def test_memory_does_not_grow_with_the_film(make_clip):
    import tracemalloc

    path = make_clip("long.mp4", 150)
    tracemalloc.start()
    with open_video(path) as reader:
        count = sum(1 for _ in reader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 150
    assert peak < 30 * 48 * 64 * 3 * 4  # thirty frames, of a hundred and fifty; tracemalloc sees numpy's memory


def test_broken_packets_are_left_out_and_counted(make_clip):
    path = make_clip("whole.mkv", 30, options={"crf": "10", "g": "5"})
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for position in rng.integers(len(data) // 4, len(data) * 3 // 4, 60):
        data[position] ^= 0xFF
    path.write_bytes(data)
    reader, frames = read(path)
    assert 5 < len(frames) <= 30
    assert any("damaged" in line for line in reader.warnings)


def test_a_film_that_ends_early_says_so(make_clip):
    path = make_clip("cut.mp4", 30, options={"g": "5", "crf": "5"}, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: (data.find(b"mdat") + len(data)) // 2])
    reader, frames = read(path)
    assert 5 <= len(frames) < 30
    assert f"{path}: ends after {len(frames)} of 30 frames" in reader.warnings


def test_a_change_of_size_names_the_frame(make_clip):
    data = make_clip("a.h264", 4).read_bytes() + make_clip("b.h264", 4, size=(32, 48)).read_bytes()
    path = make_clip("both.h264")
    path.write_bytes(data)
    with open_video(path) as reader, pytest.raises(MediaError, match="changes from 64 x 48 to 48 x 32 pixels at frame 5"):
        list(reader)


def test_sizes_are_checked_before_decoding(make_clip, tmp_path):
    with pytest.raises(MediaError, match=r"64 x 48 pixels are 0 megapixels, more than the limit of 0.001"):
        open_video(make_clip(), max_megapixels=0.001)
    bomb = tmp_path / "bomb.y4m"
    bomb.write_bytes(b"YUV4MPEG2 W60000 H60000 F25:1 C420jpeg\nFRAME\n" + bytes(100))
    with pytest.raises(MediaError, match=r"bomb\.y4m"):
        open_video(bomb)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.mp4", b"", "is empty"),
        ("noise.mp4", bytes(range(256)) * 40, "not a video|no video|no frame"),
        ("lines.srt", b"1\n00:00:00,100 --> 00:00:00,400\nhello\n", "has no video stream"),
        ("text.txt", b"just a few words\n", "a text|not a video"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n#EXT-X-ENDLIST\n", "m3u8"),
    ],
)
def test_what_is_no_video_is_refused_in_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(MediaError, match=message) as caught:
        open_video(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_truncated_sound_only_pictures_and_odd_files_are_refused(make_clip, tmp_path):
    whole = make_clip("whole.mp4", audio="aac").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match="not a video, or damaged"):
        open_video(tmp_path / "half.mp4")
    with av.open(str(tmp_path / "sound.mka"), "w", format="matroska") as output:
        stream = output.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        output.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(MediaError, match="has no video stream"):
        open_video(tmp_path / "sound.mka")
    av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), "rgb24").save(str(tmp_path / "picture.png"))
    with pytest.raises(MediaError, match="a single picture"):
        open_video(tmp_path / "picture.png")
    with pytest.raises(MediaError, match="No such file"):
        open_video(tmp_path / "none.mp4")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.mp4")
        with pytest.raises(MediaError, match="not a regular file"):
            open_video(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("name", ["ein Film: ü 東京 %d [1].mp4", "x" * 240 + ".mp4", "-.mp4", "http:host.mp4"])
def test_odd_names_are_names_of_files(make_clip, tmp_path, name):
    path = tmp_path / name
    os.replace(make_clip(frames=3), path)
    assert len(read(path)[1]) == 3


@pytest.mark.parametrize("settings", [{"start": -1}, {"start": float("nan")}, {"frames": 0}])
def test_impossible_ranges_are_refused(make_clip, settings):
    with pytest.raises(MediaError, match="must be"):
        open_video(make_clip(), **settings)


def test_without_pyav_the_way_to_install_it_is_told(make_clip, monkeypatch):
    path = make_clip()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"pip install av$"):
        open_video(path)


def test_suffixes_for_planning():
    assert {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".ts"} <= set(video_suffixes())
    assert set(video_suffixes(writable=True)) < set(video_suffixes())


@pytest.mark.parametrize("name", ["aau_in.mp4", "rhvd_in.mp4"])
def test_real_clips(name):
    if not (SAMPLES / name).exists():
        pytest.skip("the sample clips are not here")
    reader, frames = read(SAMPLES / name, frames=3)
    assert (reader.info.width, reader.info.height, reader.info.fps, reader.info.pix_fmt) == (512, 512, 15, "yuv444p")
    for frame, expected in zip(frames, stored(SAMPLES / name, 3)):
        np.testing.assert_allclose(frame.pixels, expected, atol=2.5 / 255)
