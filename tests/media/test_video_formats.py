"""What a clip is written as where nobody says: its own chroma, depth and codec; and the same bytes on every machine."""

import os
from fractions import Fraction

import numpy as np
import pytest

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.images import write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.video import Colour, open_video, write_video
from ebr_engine.media.video.colour import from_rgb
from tests.media.clip_maker import RATE, SIZE, picture, write_clip

av = pytest.importorskip("av")


def rewritten(source, target, **settings):
    with open_video(source) as reader, write_video(target, reader, **settings) as writer:
        frames = list(reader)
        for frame in frames:
            writer.write(frame.pixels, frame)
    with open_video(target) as reader:
        return reader.info, writer, frames, list(reader)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "target", "expected"),
    [
        ("a.mp4", "libx264", "yuv422p", ".mp4", ("h264", "yuv422p")),
        ("a.mp4", "libx264", "yuv444p", ".mkv", ("h264", "yuv444p")),
        ("a.mp4", "libx264", "yuv420p10le", ".mp4", ("hevc", "yuv420p10le")),
        ("a.mp4", "libx264", "yuv420p10le", ".avi", ("h264", "yuv420p10le")),
        ("a.mp4", "libx264", "yuv422p10le", ".mov", ("hevc", "yuv422p10le")),
        ("a.mp4", "libx264rgb", "rgb24", ".mp4", ("h264", "gbrp")),
        ("a.mp4", "libx265", "gbrp10le", ".mp4", ("hevc", "gbrp10le")),
        ("a.mp4", "libx265", "yuv444p12le", ".mkv", ("hevc", "yuv444p12le")),
        ("a.webm", "libvpx-vp9", "yuv444p", ".webm", ("vp9", "yuv444p")),
        ("a.mp4", "libx265", "yuv420p10le", ".webm", ("libdav1d", "yuv420p10le")),
        ("a.mkv", "ffv1", "yuv444p16le", ".mkv", ("ffv1", "yuv444p16le")),
        ("a.mkv", "ffv1", "gbrp14le", ".mkv", ("ffv1", "gbrp14le")),
        ("a.mkv", "ffv1", "bgra", ".mkv", ("ffv1", "bgra")),
        ("a.mov", "prores_ks", "yuv422p10le", ".mov", ("prores", "yuv422p10le")),
        ("a.mov", "prores_ks", "yuva444p10le", ".mov", ("prores", "yuva444p12le")),
        ("a.mov", "prores_ks", "yuv422p10le", ".mkv", ("prores", "yuv422p10le")),
        ("a.mov", "qtrle", "argb", ".mov", ("qtrle", "argb")),
        ("a.avi", "huffyuv", "yuv422p", ".avi", ("huffyuv", "yuv422p")),
        ("a.avi", "utvideo", "gbrp", ".avi", ("utvideo", "gbrp")),
        ("a.mp4", "mpeg4", "yuv420p", ".mp4", ("h264", "yuv420p")),
        ("a.mpg", "mpeg2video", "yuv422p", ".mpg", ("mpeg2video", "yuv422p")),
        ("a.mkv", "ffv1", "yuv411p", ".mp4", ("h264", "yuv422p")),
        ("a.mkv", "ffv1", "gray", ".mp4", ("h264", "yuvj420p")),
    ],
)
def test_chroma_depth_and_codec_stay(tmp_path, name, codec, pix_fmt, target, expected):
    source = write_clip(tmp_path / name, codec, pix_fmt=pix_fmt, options={"b": "9M"} if codec == "mpeg2video" else None)
    info, writer, before, after = rewritten(source, tmp_path / f"out{target}")
    assert (info.codec, info.pix_fmt) == expected
    assert len(before) == len(after) == 5
    assert max(np.abs(a.pixels - b.pixels).mean() for a, b in zip(before, after)) < 0.03
    told = ["12 bit are written as 10" in line for line in writer.warnings if "resolution" in line or "bit are" in line]
    assert told == ([True] if pix_fmt == "yuva444p10le" else [])  # FFmpeg reads 12 bit of ProRes 4444 and writes 10


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "target", "expected", "words"),
    [
        ("ffv1", "yuv444p16le", ".mp4", "yuv444p12le", ["FFV1 does not fit", "16 bit are written as 12; --codec ffv1"]),
        ("ffv1", "yuv422p10le", ".webm", "yuv420p10le", ["lower resolution (4:2:0); --codec ffv1 in an .mkv keeps it"]),
        ("ffv1", "yuv420p10le", ".mpg", "yuv420p", ["10 bit are written as 8"]),
        (
            "ffv1",
            "yuva444p16le",
            ".webm",
            "yuva420p",
            ["16 bit are written as 8 and its colour is written at a lower resolution"],
        ),
        ("ffv1", "bgra", ".webm", "yuva420p", ["lower resolution (4:2:0); --codec ffv1 in an .mkv keeps it"]),
        ("rawvideo", "yuv422p", ".mp4", "yuv422p", ["lossless video is written by libx264; --codec ffv1"]),
    ],
)
def test_what_an_encoder_cannot_hold_is_told_with_the_option_that_can(tmp_path, codec, pix_fmt, target, expected, words):
    source = write_clip(tmp_path / ("a.avi" if codec == "rawvideo" else "a.mkv"), codec, pix_fmt=pix_fmt)
    info, writer, _, _ = rewritten(source, tmp_path / f"out{target}")
    assert info.pix_fmt == expected
    for word in words:
        assert sum(word in line for line in writer.warnings) == 1


@pytest.mark.parametrize(
    ("codec", "name", "pix_fmt", "target", "asked", "expected"),
    [
        ("libx264rgb", "a.mp4", "rgb24", ".mp4", {"pix_fmt": "yuv444p"}, ("h264", "yuv444p")),
        ("libx264rgb", "a.mp4", "rgb24", ".mp4", {"crf": 20}, ("h264", "gbrp")),
        ("prores_ks", "a.mov", "yuv422p10le", ".mov", {"crf": 20}, ("hevc", "yuv422p10le")),
        ("prores_ks", "a.mov", "yuv422p10le", ".mov", {"pix_fmt": "yuv420p"}, ("hevc", "yuv420p")),
        ("prores_ks", "a.mov", "yuv422p10le", ".mov", {"pix_fmt": "yuv444p10le"}, ("prores", "yuv444p12le")),
        ("ffv1", "a.mkv", "yuv444p16le", ".mkv", {"crf": 20}, ("hevc", "yuv444p12le")),
        ("ffv1", "a.mkv", "yuva444p", ".mov", {"crf": 20}, ("h264", "yuv444p")),
    ],
)
def test_what_is_asked_for_decides_the_encoder(tmp_path, codec, name, pix_fmt, target, asked, expected):
    source = write_clip(tmp_path / name, codec, pix_fmt=pix_fmt)
    info, _, _, _ = rewritten(source, tmp_path / f"out{target}", **asked)
    assert (info.codec, info.pix_fmt) == expected


def test_prores_keeps_its_profile_or_becomes_what_is_named(tmp_path):
    source = write_clip(tmp_path / "a.mov", "prores_ks", pix_fmt="yuv422p10le", options={"profile": "lt"})
    assert rewritten(source, tmp_path / "out.mov")[0].profile == "LT"
    info, writer, _, _ = rewritten(source, tmp_path / "out.mp4")
    assert (info.codec, info.pix_fmt) == ("hevc", "yuv422p10le")
    assert [line.partition(": ")[2] for line in writer.warnings] == [
        "ProRes does not fit into mp4: written by libx265; .mov or .mkv keeps it"
    ]


def test_rgb_keeps_its_colours_at_full_resolution(tmp_path):
    rng = np.random.default_rng(0)
    noise = [av.VideoFrame.from_ndarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8), "rgb24") for _ in range(3)]
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        stream = output.add_stream("ffv1", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "bgr0"
        for index, frame in enumerate(noise):
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    _, _, before, after = rewritten(tmp_path / "a.mkv", tmp_path / "out.mp4")
    error = np.mean([np.square(a.pixels - b.pixels).mean() for a, b in zip(before, after)])
    assert -10 * np.log10(error) > 33  # 4:2:0 reaches 12 on noise


def test_pictures_become_what_every_player_shows_and_are_told_so(tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(3):
        write_image(tmp_path / "in" / f"{index}.png", Picture(picture(index) / np.float32(255)))
    info, writer, _, _ = rewritten(tmp_path / "in", tmp_path / "out.mp4")
    assert info.pix_fmt == "yuv420p"
    assert ["--pix-fmt yuv444p keeps it" in line for line in writer.warnings] == [True]
    info, writer, _, _ = rewritten(tmp_path / "in", tmp_path / "out2.mp4", pix_fmt="yuv444p")
    assert (info.pix_fmt, writer.warnings) == ("yuv444p", [])


def slices(path):
    """The greatest number of slices that a picture of an H.264 file has."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        most = 0
        for packet in container.demux(stream):
            data, at, count = bytes(packet), 0, 0
            while at + 4 < len(data):
                size = int.from_bytes(data[at : at + 4], "big")
                count += 1 <= data[at + 4] & 31 <= 5
                at += 4 + size
            most = max(most, count)
    return most


@pytest.mark.parametrize(
    ("codec", "name", "bits"),
    [
        ("libx264", "out.mp4", 8),
        ("libx265", "out.mp4", 10),
        ("libvpx-vp9", "out.webm", 8),
        ("libsvtav1", "out.mkv", 8),
        ("mpeg2video", "out.mpg", 8),
        ("ffv1", "out.mkv", 8),
        ("prores_ks", "out.mov", 10),
    ],
)
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a choice of processors")
def test_the_same_bytes_come_out_on_one_core_and_on_all(tmp_path, codec, name, bits):
    from ebr_engine.media.video import VideoInfo

    info = VideoInfo(320, 192, Fraction(RATE), Fraction(1, RATE), bits=bits)
    rng = np.random.default_rng(0)
    frames = [np.kron(rng.random((24, 40, 3), dtype=np.float32), np.ones((8, 8, 1), np.float32)) for _ in range(6)]
    cores = os.sched_getaffinity(0)
    made = []
    try:
        for chosen in (cores, {min(cores)}):
            os.sched_setaffinity(0, chosen)
            with write_video(tmp_path / name, info, codec=codec) as writer:
                for frame in frames:
                    writer.write(frame)
            made.append((tmp_path / name).read_bytes())
    finally:
        os.sched_setaffinity(0, cores)
    assert made[0] == made[1]
    if codec == "libx264":
        assert slices(tmp_path / name) == 1


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_what_a_thread_did_before_does_not_change_the_bytes(tmp_path, codec):
    from ebr_engine.media.video import VideoInfo

    info = VideoInfo(320, 192, Fraction(RATE), Fraction(1, RATE), bits=8 if codec == "libx264" else 10)
    rng = np.random.default_rng(0)
    frames = [np.kron(rng.random((24, 40, 3), dtype=np.float32), np.ones((8, 8, 1), np.float32)) for _ in range(6)]
    made = set()
    for between in (lambda frame: None, lambda frame: np.clip(frame, 0, 1), lambda frame: frame @ frame[0, :3].T):
        with write_video(tmp_path / "out.mp4", info, codec=codec) as writer:
            for prepared, frame in zip([writer.prepare(frame) for frame in frames], frames):
                between(frame)
                writer.write_prepared(prepared)
        made.add((tmp_path / "out.mp4").read_bytes())
    assert len(made) == 1


def avi_with_b_frames(path, codec, options):
    """An AVI whose pictures are stored in the order of decoding, one a tick, as other programs write it."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.max_b_frames = 2
        count = 0
        for index in [*range(20), None]:
            frame = None
            if index is not None:
                frame = av.VideoFrame.from_ndarray(picture(index), "rgb24").reformat(format="yuv420p", threads=1)
                frame.pts, frame.time_base = index, Fraction(1, RATE)
            for packet in stream.encode(frame):
                packet.pts = packet.dts = count
                packet.time_base = Fraction(1, RATE)
                count += 1
                output.mux_one(packet)
    return path


@pytest.mark.parametrize("threads", [None, 1, 4])
@pytest.mark.parametrize(("codec", "options"), [("libx264", {"crf": "1"}), ("mpeg4", {"b": "2M"})])
def test_avi_with_b_frames_has_steady_times_and_pictures_in_order(tmp_path, codec, options, threads, monkeypatch):
    from ebr_engine.media.video import read

    source = avi_with_b_frames(tmp_path / "b.avi", codec, options)

    def decoder(stream):
        stream.codec_context.thread_count = threads or 0
        return stream.codec_context

    monkeypatch.setattr(read, "decoder_for", decoder)
    with open_video(source) as reader:
        frames = list(reader)
    assert len(frames) == 20
    steps = {b.time - a.time for a, b in zip(frames, frames[1:])}
    assert steps == {Fraction(1, RATE)}
    for index, frame in enumerate(frames):
        assert np.abs(frame.pixels - picture(index) / 255).mean() < 0.05


def test_hidden_frames_of_an_edit_list_are_not_counted(tmp_path):
    from tests.media.clip_maker import CLIPS

    with open_video(CLIPS["edit list"](tmp_path)) as reader:
        assert reader.info.expected_frames == reader.info.frames == 5
        assert len(list(reader)) == 5
    assert not reader.warnings


@pytest.mark.parametrize(
    ("profile", "compatibility", "outcome"),
    [(5, 0, "refused"), (10, 0, "refused"), (8, 1, (9, 16)), (8, 4, (9, 18)), (8, 2, (1, 1)), (7, 6, (9, 16))],
)
@pytest.mark.parametrize("tags", [{}, {"color_primaries": 9, "color_trc": 16, "colorspace": 9}])
def test_dolby_vision_is_what_its_record_says(tmp_path, profile, compatibility, outcome, tags):
    from tests.media.clip_maker import add_box, dolby_record

    clip = write_clip(tmp_path / "a.mp4", "libx265", pix_fmt="yuv420p10le", context=tags)
    add_box(clip, "entry", dolby_record(profile, compatibility))
    if outcome == "refused":
        with pytest.raises(MediaError, match=rf"Dolby Vision of profile {profile}.*without a base layer.*ffmpeg") as caught:
            open_video(clip)
        assert "\n" not in str(caught.value)
        return
    with open_video(clip) as reader, write_video(tmp_path / "out.mp4", reader) as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
    assert (reader.info.colour.primaries, reader.info.colour.transfer) == outcome
    assert any("not those of its Dolby Vision base layer" in line for line in reader.warnings) == (
        bool(tags) and outcome != (9, 16)
    )
    assert sum("Dolby Vision" in line and "base layer is" in line for line in writer.warnings) == 1


def test_frames_with_a_colour_profile_become_a_clip_of_srgb(tmp_path):
    pyvips = pytest.importorskip("pyvips")
    from ebr_engine.media.holdings.parts import Part

    profile = (
        pyvips.Image.black(1, 1, bands=3).copy(interpretation="srgb").icc_export(output_profile="p3").get("icc-profile-data")
    )
    (tmp_path / "in").mkdir()
    green = np.zeros((*SIZE, 3), np.float32)
    green[..., 1] = 0.5
    for index in range(2):
        write_image(tmp_path / "in" / f"{index}.png", Picture(green, parts=(Part("icc", "iCCP", profile),)))
    _, writer, _, after = rewritten(tmp_path / "in", tmp_path / "out.mkv", codec="ffv1")
    assert after[0].pixels[5, 5] == pytest.approx([0, 0.508, 0], abs=0.006)  # a green beyond sRGB's, clipped
    assert not any("icc" in line for line in writer.warnings)
    with open_video(tmp_path / "in") as reader, write_video(f"{tmp_path}/back/", reader) as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
    from ebr_engine.media.images import read_image

    assert read_image(tmp_path / "back" / "0.png").icc == profile


def test_grey_frames_with_a_profile_become_a_clip_of_srgb(tmp_path):
    from ebr_engine.media.holdings import icc
    from ebr_engine.media.holdings.parts import Part

    profile = icc.from_gamma(1 / 1.8, None, True)
    (tmp_path / "in").mkdir()
    grey = Picture(np.full((*SIZE, 3), 0.5, np.float32), grey=True, parts=(Part("icc", "iCCP", profile),))
    write_image(tmp_path / "in" / "0.png", grey)
    _, _, _, after = rewritten(tmp_path / "in", tmp_path / "out.mkv", codec="ffv1")
    light = 0.5**1.8
    assert after[0].pixels[5, 5] == pytest.approx([1.055 * light ** (1 / 2.4) - 0.055] * 3, abs=0.004)


def test_hdr_frames_become_the_clip_that_they_came_from(tmp_path):
    from tests.media.clip_maker import CLIPS

    clip = CLIPS["mastering display"](tmp_path)
    with open_video(clip) as reader, write_video(f"{tmp_path}/frames/", reader) as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
    assert not writer.warnings
    info, _, _, _ = rewritten(tmp_path / "frames", tmp_path / "out.mp4")
    assert info.light == reader.info.light
    assert info.colour == Colour(9, 16, 9)


def test_a_timestamps_file_gives_frames_their_times(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", ticks=[0, 1, 5, 6, 9])
    with open_video(clip) as reader, write_video(f"{tmp_path}/frames/", reader) as writer:
        before = list(reader)
        for frame in before:
            writer.write(frame.pixels, frame)
    with open_video(tmp_path / "frames", fps=99) as reader:
        assert [frame.time for frame in reader] == [frame.time for frame in before]
    with open_video(tmp_path / "frames", start=0.2) as reader:
        assert [(frame.name, frame.time) for frame in reader] == [
            ("000003", 0),
            ("000004", Fraction(1, 25)),
            ("000005", Fraction(4, 25)),
        ]
    (tmp_path / "frames" / "timestamps.txt").write_text("# timestamp format v2\n0\nnonsense\n")
    with open_video(tmp_path / "frames", fps=10) as reader:
        assert reader.info.fps == 10


def test_from_rgb_takes_alpha_where_the_format_has_it():
    alpha = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(48, axis=0)
    frame = from_rgb(np.zeros((48, 64, 3), np.float32), av.VideoFormat("yuva444p10le", 64, 48), Colour(), alpha=alpha)
    rows = np.frombuffer(frame.planes[3], np.uint16).reshape(48, -1)[:, :64]
    np.testing.assert_array_equal(rows[0], np.rint(alpha[0] * 1023))


@pytest.mark.parametrize("pix_fmt", ["yuva420p", "yuva444p10le", "bgra", "ya8"])
@pytest.mark.parametrize("target", [".webm", ".mov", ".mkv", ".mp4"])
def test_every_alpha_is_written_or_told(tmp_path, pix_fmt, target):
    source = write_clip(tmp_path / "a.mkv", "ffv1", pix_fmt=pix_fmt, alpha=True)
    info, writer, before, after = rewritten(source, tmp_path / f"out{target}")
    assert info.alpha == (target != ".mp4")
    assert any("alpha" in line.partition("not kept")[2] for line in writer.warnings) == (target == ".mp4")
    if info.alpha:
        assert max(np.abs(a.alpha - b.alpha).mean() for a, b in zip(before, after)) < 0.01


@pytest.mark.parametrize("name", ["x.png", "x.gif", "x.webp"])
def test_a_transparent_animation_becomes_a_clip_with_alpha(tmp_path, name):
    pillow = pytest.importorskip("PIL.Image")
    frames = []
    for index in range(3):
        rgba = np.zeros((*SIZE, 4), np.uint8)
        rgba[..., index], rgba[8:40, 8 + 4 * index : 40 + 4 * index, 3] = 200, 255
        frames.append(pillow.fromarray(rgba, "RGBA"))
    how = {"x.gif": {"disposal": 2}, "x.webp": {"lossless": True}}.get(name, {})
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **how)
    info, _, before, after = rewritten(tmp_path / name, tmp_path / "out.webm")
    assert (info.codec, info.pix_fmt) == ("vp9", "yuva420p")
    for a, b in zip(before, after):
        assert np.abs(a.alpha - b.alpha).mean() < 0.01
