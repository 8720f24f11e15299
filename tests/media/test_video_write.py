"""Writing videos: nothing lost between decode and encode, everything else copied, whole or not at all."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.video import Colour, VideoInfo, open_video, write_video
from ebr_engine.media.video.colour import from_rgb

av = pytest.importorskip("av")

SAMPLES = Path(__file__).parents[3] / "shared" / "samples"
SIZE = (40, 128)


def copy(source, target, read=None, **settings):
    """Decode and encode without a change in between; the reader, the writer, and the frames read."""
    with open_video(source, **(read or {})) as reader, write_video(target, reader, **settings) as writer:
        frames = list(reader)
        for frame in frames:
            writer.write(frame.pixels, frame)
    return reader, writer, frames


def planes(path):
    """The stored values of all frames: [frames][planes] integer arrays."""
    result = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            dtype = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
            rows = [np.frombuffer(p, dtype).reshape(p.height, -1)[:, : p.width] for p in frame.planes]
            result.append([row.astype(int) for row in rows])
    return result


def packets(path, kind):
    """(seconds, size) of the packets of a file's first stream of a kind."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return [(float(p.pts * p.time_base), p.size, bytes(p)) for p in container.demux(stream) if p.dts is not None]


def chart():
    """[40, 128, 3]: a grey ramp above, patches of colour of 16 × 24 pixels below."""
    picture = np.empty((*SIZE, 3), np.float32)
    picture[:16] = np.linspace(0, 1, 128, dtype=np.float32)[None, :, None]
    colours = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0.2, 0.5, 0.7), (0.8, 0.6, 0.5), (0, 0, 0), (1, 1, 1)]
    picture[16:] = np.repeat(np.float32(colours), 16, axis=0)[None]
    return picture


def inner(plane):
    """The plane without the borders of the chart's parts, where subsampled chroma leaves the colours that RGB can hold."""
    rows, columns = SIZE[0] // plane.shape[0], SIZE[1] // plane.shape[1]
    y, x = np.mgrid[: SIZE[0] : rows, : SIZE[1] : columns]
    return plane[((y < 12) | (y >= 20)) & ((y < 12) | ((x % 16 >= 4) & (x % 16 < 12)))]


@pytest.mark.parametrize("matrix", [1, 6, 9])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("pix_fmt", "codec"),
    [
        ("yuv420p", "libx264"),
        ("yuv444p", "libx264"),
        ("yuv420p10le", "libx265"),
        ("yuv422p10le", "ffv1"),
    ],
)
def test_ramps_and_patches_survive_lossless_encoding_within_one_value(make_clip, tmp_path, pix_fmt, codec, full, matrix):
    colour = Colour(matrix=matrix, full_range=full)
    picture = from_rgb(chart(), av.VideoFormat(pix_fmt, SIZE[1], SIZE[0]), colour)
    tags = {"colorspace": matrix, "color_range": 2 if full else 1, "color_primaries": 1, "color_trc": 1}
    source = make_clip("chart.mkv", pictures=[picture] * 2, codec="ffv1", pix_fmt=pix_fmt, context=tags)
    crf = {} if codec == "ffv1" else {"crf": 0}
    reader, _, _ = copy(source, tmp_path / "out.mkv", codec=codec, pix_fmt=pix_fmt, **crf)
    assert reader.info.colour == colour
    for before, after in zip(planes(source), planes(tmp_path / "out.mkv")):
        for a, b in zip(before, after):
            assert np.abs(inner(a) - inner(b)).max() <= 1
        np.testing.assert_array_equal(before[0][:12], after[0][:12])  # the grey ramp, to the value
    with open_video(tmp_path / "out.mkv") as again:
        assert again.info.colour == colour


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(
    ("colour", "pix_fmt"),
    [
        (Colour(9, 16, 9, False), "yuv420p10le"),  # BT.2020 with PQ
        (Colour(9, 18, 9, True), "yuv420p10le"),  # and with HLG
        (Colour(5, 4, 5, False), "yuv420p"),  # PAL
        (Colour(12, 13, 1, True), "yuv420p"),  # Display P3 with sRGB's curve
    ],
)
def test_primaries_curve_matrix_and_range_are_told_as_they_were(make_clip, tmp_path, suffix, colour, pix_fmt):
    tags = {"colorspace": colour.matrix, "color_range": 2 if colour.full_range else 1}
    tags |= {"color_primaries": colour.primaries, "color_trc": colour.transfer}
    source = make_clip("in.mkv", 2, codec="libx264", pix_fmt=pix_fmt, context=tags)
    reader, _, _ = copy(source, tmp_path / f"out{suffix}")
    assert reader.info.colour == colour
    with open_video(tmp_path / f"out{suffix}") as again:
        assert again.info.colour == colour


@pytest.mark.parametrize(
    ("suffix", "bits", "expected"),
    [
        (".mp4", 8, ("h264", "yuv420p")),
        (".mkv", 10, ("hevc", "yuv420p10le")),
        (".mov", 12, ("hevc", "yuv420p10le")),
        (".webm", 8, ("vp9", "yuv420p")),
        (".avi", 8, ("h264", "yuv420p")),
        (".ts", 8, ("h264", "yuv420p")),
    ],
)
def test_the_default_codec_follows_depth_and_container(tmp_path, suffix, bits, expected):
    info = VideoInfo(128, 40, Fraction(25), Fraction(1, 25), bits=bits)
    with write_video(tmp_path / f"out{suffix}", info) as writer:
        for _ in range(3):
            writer.write(chart())
    with open_video(tmp_path / f"out{suffix}") as reader:
        assert (reader.info.codec, reader.info.pix_fmt) == expected
        frames = list(reader)
    assert len(frames) == 3
    assert np.abs(frames[1].pixels - chart()).mean() < 0.03
    assert not writer.warnings


@pytest.mark.parametrize(
    ("codec", "suffix", "pix_fmt"),
    [
        ("prores_ks", ".mov", "yuv444p1"),
        ("ffv1", ".mkv", "gbrp12le"),
        ("mpeg2video", ".mpg", "yuv422p"),
        ("mjpeg", ".avi", "yuvj444p"),
    ],
)
def test_codecs_for_editors_get_the_format_nearest_to_the_source(make_clip, tmp_path, codec, suffix, pix_fmt):
    picture = from_rgb(chart(), av.VideoFormat("gbrp12le", SIZE[1], SIZE[0]), Colour(full_range=True))
    source = make_clip("deep.mkv", pictures=[picture] * 3, codec="ffv1", pix_fmt="gbrp12le", rate=25)
    copy(source, tmp_path / f"out{suffix}", codec=codec)
    with open_video(tmp_path / f"out{suffix}") as reader:
        (first, *_) = frames = list(reader)
        assert reader.info.pix_fmt.startswith(pix_fmt)
    assert len(frames) == 3
    np.testing.assert_allclose(first.pixels[4:12], chart()[4:12], atol=0.04)
    if codec == "ffv1":
        np.testing.assert_allclose(first.pixels, chart(), atol=0.5001 / 4095)


def test_odd_sizes_are_kept_and_said(make_clip, tmp_path):
    source = make_clip("odd.mkv", 2, size=(37, 51), codec="ffv1", pix_fmt="yuv420p")
    _, writer, _ = copy(source, tmp_path / "out.mp4")
    with open_video(tmp_path / "out.mp4") as reader:
        assert (reader.info.width, reader.info.height, reader.info.pix_fmt) == (51, 37, "yuv444p")
    assert any("4:4:4" in line for line in writer.warnings)
    with pytest.raises(MediaError, match="even sides"):
        copy(source, tmp_path / "other.mp4", pix_fmt="yuv420p")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_very_short_clips_have_sound_times(tmp_path, suffix, bits, count):
    info = VideoInfo(128, 40, Fraction(25), Fraction(1, 25), bits=bits)
    with write_video(tmp_path / f"out{suffix}", info) as writer:
        for _ in range(count):
            writer.write(chart())
    with open_video(tmp_path / f"out{suffix}") as reader:
        assert [frame.time for frame in reader] == [Fraction(i, 25) for i in range(count)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_variable_rate_comes_out_as_it_went_in(make_clip, tmp_path, suffix):
    ticks = [0, 512, 3000, 3100, 9000, 9800, 12288]
    source = make_clip(f"vfr{suffix}", frames=7, ticks=ticks, time_base=Fraction(1, 12288))
    _, _, before = copy(source, tmp_path / f"out{suffix}")
    with open_video(tmp_path / f"out{suffix}") as reader:
        after = list(reader)
    assert [frame.time for frame in after] == [frame.time for frame in before]


@pytest.mark.parametrize(
    ("suffix", "target"), [(".mkv", ".mkv"), (".mkv", ".mp4"), (".mp4", ".mov"), (".ts", ".mp4"), (".mp4", ".ts")]
)
def test_sound_is_copied_untouched_and_stays_in_time(make_clip, tmp_path, suffix, target):
    source = make_clip(f"in{suffix}", 36, audio="aac")
    _, writer, frames = copy(source, tmp_path / f"out{target}")
    with open_video(tmp_path / f"out{target}") as reader:
        after = list(reader)
    assert len(after) == len(frames) == 36
    assert not writer.warnings
    before, copied = packets(source, "audio"), packets(tmp_path / f"out{target}", "audio")
    assert len(before) == len(copied)
    assert {suffix, target} & {".ts"} or [data for _, _, data in before] == [data for _, _, data in copied]  # TS adds headers
    video = [packets(path, "video") for path in (source, tmp_path / f"out{target}")]
    for sound, pictures in ((before, video[0]), (copied, video[1])):
        lag = max(t for t, *_ in sound) - max(t for t, *_ in pictures)
        assert abs(lag - (before[-1][0] - max(t for t, *_ in video[0]))) < 1 / 12


def test_subtitles_chapters_fonts_and_tags_are_kept(make_clip, tmp_path):
    chapters = [(0, 400, "one"), (400, 1000, "two")]
    source = make_clip(
        "in.mkv", audio="aac", subtitles=True, chapters=chapters, tags={"title": "A film"}, language="fra", attachment=True
    )
    copy(source, tmp_path / "out.mkv")
    assert packets(source, "subtitles") == packets(tmp_path / "out.mkv", "subtitles")
    with av.open(str(tmp_path / "out.mkv")) as out:
        assert out.metadata["title"] == "A film"
        assert (out.streams.video[0].language, out.streams.audio[0].language) == ("fra", "deu")
        starts = [(float(c["start"] * c["time_base"]), c["metadata"]["title"]) for c in out.chapters()]
        assert starts == [(0, "one"), (0.4, "two")]
        assert [s.type for s in out.streams] == ["video", "audio", "subtitle", "attachment"]


def test_copying_can_be_left_out(make_clip, tmp_path):
    source = make_clip("in.mkv", audio="aac", subtitles=True)
    copy(source, tmp_path / "out.mkv", copy_audio=False, copy_subtitles=False)
    with open_video(tmp_path / "out.mkv") as reader:
        assert not reader.info.has_audio
        assert not reader.info.has_subtitles


@pytest.mark.parametrize(
    ("suffix", "lost"), [(".mp4", ["subtitles"]), (".webm", ["sound", "subtitles"]), (".mpg", ["sound", "subtitles"])]
)
def test_what_a_container_cannot_hold_is_warned_of_and_the_rest_goes_on(make_clip, tmp_path, suffix, lost):
    source = make_clip("in.mkv", audio="aac", subtitles=True, rate=25)
    _, writer, frames = copy(source, tmp_path / f"out{suffix}")
    (line,) = writer.warnings
    assert [word for word in ("sound", "subtitles") if word in line] == lost
    with open_video(tmp_path / f"out{suffix}") as reader:
        assert len(list(reader)) == len(frames)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_part_has_its_own_sound_lines_and_chapters(make_clip, tmp_path, suffix):
    chapters = [(0, 400, "one"), (400, 3000, "two")]
    source = make_clip("in.mkv", 36, audio="aac", subtitles=True, chapters=chapters, options={"g": "6", "crf": "10"})
    reader, _, frames = copy(source, tmp_path / f"out{suffix}", read={"start": 0.5, "frames": 7})
    assert reader.origin == Fraction(1, 2)
    assert frames[0].pts == 0
    sound = packets(tmp_path / f"out{suffix}", "audio")
    original = {data: time for time, _, data in packets(source, "audio")}
    assert all(abs(original[data] - 0.5 - time) < 0.002 for time, _, data in sound)
    assert 0 <= min(t for t, *_ in sound) < 0.05
    assert 0.5 < max(t for t, *_ in sound) < 7 / 12
    with av.open(str(tmp_path / f"out{suffix}")) as out:
        assert [(c["start"], c["metadata"]["title"]) for c in out.chapters()] == [(0, "two")]
    if suffix == ".mkv":
        assert [time for time, *_ in packets(tmp_path / "out.mkv", "subtitles")] == [0.1]


def test_turned_pictures_are_written_upright_without_the_mark(make_clip, tmp_path):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a display matrix")
    source = make_clip(frames=2, rotate=(90,), context={"sample_aspect_ratio": Fraction(4, 3)})
    _, _, before = copy(source, tmp_path / "out.mp4")
    with open_video(tmp_path / "out.mp4") as reader:
        assert (reader.info.rotation, reader.info.width, reader.info.height) == (0, 48, 64)
        assert reader.info.pixel_aspect == Fraction(3, 4)
        assert np.abs(next(iter(reader)).pixels - before[0].pixels).mean() < 0.02


def test_memory_does_not_grow_with_the_film(tmp_path):
    import resource

    info = VideoInfo(320, 180, Fraction(25), Fraction(1, 25))
    picture = np.full((180, 320, 3), 0.5, np.float32)
    with write_video(tmp_path / "out.mp4", info, options={"preset": "ultrafast"}) as writer:
        for index in range(300):
            writer.write(picture)
            if index == 100:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100 * picture.nbytes  # of two hundred frames


def write_and_fail(source, out, pixels, error):
    with open_video(source) as reader, write_video(out, reader) as writer:
        for picture in pixels:
            writer.write(picture)
        if error:
            raise error


def test_a_failure_leaves_nothing_and_keeps_what_was_there(make_clip, tmp_path):
    out = tmp_path / "out.mp4"
    out.write_bytes(b"older")
    source = make_clip(audio="aac")
    files = sorted(os.listdir(tmp_path))
    good = np.zeros((48, 64, 3), np.float32)
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(source, out, [good], KeyboardInterrupt())
    with pytest.raises(MediaError, match="frame 2 has values that are not finite"):
        write_and_fail(source, out, [good, good * np.nan], None)
    with pytest.raises(MediaError, match="no frames"):
        write_and_fail(source, out, [], None)
    assert sorted(os.listdir(tmp_path)) == files
    assert out.read_bytes() == b"older"
    write_and_fail(source, out, [good], None)
    assert len(packets(out, "video")) == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("out.gif", {}, "cannot write .gif; choose from .mp4"),
        ("out", {}, "cannot write a file without suffix"),
        ("out.mp4", {"codec": "libx999"}, "unknown video encoder 'libx999'"),
        ("out.mp4", {"codec": "aac"}, "aac is no video encoder"),
        ("out.webm", {"codec": "libx264"}, "webm cannot hold libx264"),
        ("out.mp4", {"pix_fmt": "yuv999"}, "unknown pixel format"),
        ("out.mp4", {"pix_fmt": "gbrp12le"}, "does not take gbrp12le; choose from"),
        ("out.mov", {"codec": "prores_ks", "crf": 20}, "prores_ks has no option crf"),
        ("out.mp4", {"options": {"presett": "fast"}}, "libx264 has no option presett"),
        ("out.mp4", {"options": {"preset": "warp"}}, "libx264 refuses"),
        ("none/out.mp4", {}, "cannot write there: No such file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_first_frame(tmp_path, name, settings, message):
    info = VideoInfo(128, 40, Fraction(25), Fraction(1, 25))
    with pytest.raises(MediaError, match=message) as caught, write_video(tmp_path / name, info, **settings):
        pass
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_another_size_can_be_written(make_clip, tmp_path):
    with open_video(make_clip()) as reader, write_video(tmp_path / "wide.mp4", reader, size=(48, 128)) as writer:
        for frame in reader:
            writer.write(np.concatenate([frame.pixels, frame.pixels], axis=1), frame)
    with open_video(tmp_path / "wide.mp4") as reader:
        assert (reader.info.width, reader.info.height) == (128, 48)
    with write_video(tmp_path / "x.mp4", reader.info) as writer:
        writer.write(np.zeros((48, 128, 3), np.float32))
        with pytest.raises(ValueError, match="made for"):
            writer.write(np.zeros((48, 64, 3), np.float32))


@pytest.mark.parametrize("name", ["aau_in.mp4", "rhvd_in.mp4"])
def test_real_clips_keep_their_frames_and_times(tmp_path, name):
    if not (SAMPLES / name).exists():
        pytest.skip("the sample clips are not here")
    _, writer, before = copy(SAMPLES / name, tmp_path / name, read={"frames": 5}, options={"preset": "veryfast"})
    with open_video(tmp_path / name) as reader:
        after = list(reader)
    assert [frame.time for frame in after] == [frame.time for frame in before]
    assert max(np.abs(a.pixels - b.pixels).mean() for a, b in zip(after, before)) < 0.015
    assert not writer.warnings
