"""Readers of what clips hold: bounded, fast, never fatal; and clips that people lost something of."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import Fate, fates_table, inventory
from ebr_engine.media.holdings.boxes import add_to_video_track, boxes, read_header
from ebr_engine.media.holdings.coded import header_messages, messages
from ebr_engine.media.holdings.dolby import dolby_vision, parse_record
from ebr_engine.media.holdings.matroska import read_tracks
from ebr_engine.media.holdings.video_fates import CONTAINERS, VIDEO_FATES
from ebr_engine.media.images import read_image
from ebr_engine.media.video import open_video, write_video
from tests.media.clip_maker import CLIPS, write_clip

pytest.importorskip("av")

FAULTS = Path(__file__).parents[3] / "shared" / "faults"
shared = pytest.mark.skipif(not FAULTS.exists(), reason="the clips that something was lost of are not here")


def rewritten(source, target, change=None, **settings):
    """The reader, the writer and the frames of a clip that is read and written."""
    with open_video(source) as reader, write_video(target, reader, **settings) as writer:
        frames = list(reader)
        for frame in frames:
            writer.write(frame.pixels, frame)
    return reader, writer, frames


def kinds(path):
    return {holding.kind for holding in inventory(path)}


@pytest.mark.parametrize("kind", ["spherical", "alpha", "KLV track", "captions", "mastering display", "attachment"])
def test_a_damaged_clip_is_told_or_refused_and_nothing_else(tmp_path, kind):
    data = CLIPS[kind](tmp_path).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.bin"
    for turn in range(60):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 1 + turn):
            broken[position] = rng.integers(256)
        path.write_bytes(broken[: rng.integers(8, len(data))] if turn % 3 == 0 else broken)
        try:
            inventory(path)
            dolby_vision(path)
        except MediaError:
            pass
        read_tracks(path)


@pytest.mark.parametrize("seed", range(20))
def test_readers_of_bytes_take_anything(tmp_path, seed):
    data = np.random.default_rng(seed).bytes(4000)
    for codec in ("h264", "hevc", "mpeg2video", "av1", "vp9"):
        for extradata in (b"", b"\1" + data[:30]):
            list(messages(codec, data, extradata))
            list(messages(codec, b"\0\0\1\x06" + data, extradata))
            list(messages(codec, b"\0\0\1\x4e\1" + data, extradata))
    list(boxes(data))
    parse_record(data[: seed % 7])
    (tmp_path / "a").write_bytes(b"\x1a\x45\xdf\xa3" + data)
    read_tracks(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + (len(data) + 8).to_bytes(4, "big") + b"moov" + data)
    assert read_header(tmp_path / "b") == data
    assert not add_to_video_track(tmp_path / "b", in_entry=b"\0\0\0\x08free")


def test_lengths_are_not_believed():
    assert [box.kind for box in boxes(b"\0\0\0\x08free\xff\xff\xff\xffmoov")] == [b"free"]
    assert [box.kind for box in boxes(b"\0\0\0\x02free")] == []
    assert [(box.kind, box.end) for box in boxes(b"\0\0\0\0free12345")] == [(b"free", 13)]


@pytest.mark.parametrize("kind", ["captions", "chapters", "KLV track", "phone tags"])
def test_the_inventory_of_a_clip_takes_little_time(tmp_path, kind):
    clip = CLIPS[kind](tmp_path)
    inventory(clip)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        inventory(clip)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.05


def test_every_container_has_a_fate_for_everything_that_a_clip_holds():
    for kind, fates in VIDEO_FATES.items():
        if set(fates) != {"clip"}:
            assert set(CONTAINERS) <= set(fates), kind
    table = fates_table(("mp4", "mkv"))
    assert "| captions | kept" in table
    assert all(how for fates in VIDEO_FATES.values() for fate, how in fates.values() if fate is Fate.NOT_KEPT)


def test_an_alpha_layer_that_is_not_decoded_is_told(tmp_path):
    from tests.media.clip_maker import sei

    layer = b"\0\0\0\1\x02\x09\xd0\x10\x20\x30"  # a slice of layer 1
    clip = write_clip(tmp_path / "a.mov", "libx265", inserted=sei(165, b"\0\x10", hevc=True) + layer)
    assert kinds(clip) == {"alpha"}
    reader, writer, _ = rewritten(clip, tmp_path / "out.mov")
    assert reader.info.alpha or any("alpha: there is no decoder" in line for line in writer.warnings)


def test_a_message_in_the_header_of_a_stream_is_found():
    unit = b"\x4e\x01" + bytes([165, 2]) + b"\0\x10\x80"
    header = b"\1" + bytes(21) + b"\1" + b"\x27\0\1" + len(unit).to_bytes(2, "big") + unit
    assert [kind for kind, _ in header_messages("hevc", header)] == ["alpha"]
    for end in range(len(header)):
        list(header_messages("hevc", header[:end]))


def test_hlg_that_only_a_message_tells_of_is_hlg(tmp_path):
    from tests.media.clip_maker import sei

    tags = {"color_primaries": 9, "color_trc": 14, "colorspace": 9}
    clip = write_clip(tmp_path / "a.ts", "libx265", pix_fmt="yuv420p10le", context=tags, inserted=sei(147, b"\x12", hevc=True))
    rewritten(clip, tmp_path / "out.mp4")
    with open_video(tmp_path / "out.mp4") as reader:
        assert (reader.info.colour.primaries, reader.info.colour.transfer) == (9, 18)


@shared
def test_avi_with_b_frames_is_steady(tmp_path):
    with open_video(FAULTS / "avi-bframes" / "h264c.avi") as reader:
        assert [float(frame.time) for frame in reader] == pytest.approx([0.08 + 0.04 * i for i in range(30)])


@shared
@pytest.mark.parametrize(("name", "pix_fmt", "least"), [("srgb.mp4", "gbrp", 36.1), ("s444.mp4", "yuv444p", 33)])
def test_colour_stays_at_full_resolution(tmp_path, name, pix_fmt, least):
    _, writer, before = rewritten(FAULTS / "chroma-and-depth" / name, tmp_path / "out.mp4")
    with open_video(tmp_path / "out.mp4") as reader:
        after = list(reader)
    assert reader.info.pix_fmt == pix_fmt
    error = np.mean([np.square(a.pixels - b.pixels).mean() for a, b in zip(before, after)])
    assert -10 * np.log10(error) >= least
    assert not writer.warnings


@shared
def test_sixteen_bit_stay_or_are_told(tmp_path):
    rewritten(FAULTS / "chroma-and-depth" / "s16.mkv", tmp_path / "out.mkv")
    with open_video(tmp_path / "out.mkv") as reader:
        assert (reader.info.pix_fmt, reader.info.codec) == ("yuv444p16le", "ffv1")
    _, writer, _ = rewritten(FAULTS / "chroma-and-depth" / "s16.mkv", tmp_path / "out.mp4")
    assert sum("--codec ffv1" in line for line in writer.warnings) == 1


@shared
def test_a_clip_as_frames_says_what_it_said(tmp_path):
    for name in ("sar", "vfr", "hdr"):
        (tmp_path / name).mkdir()
        _, writer, _ = rewritten(FAULTS / "clip-to-frames" / f"{name}.mp4", tmp_path / name / "%03d.png")
        assert not writer.warnings
    details = {holding.kind: holding.detail for holding in inventory(tmp_path / "sar" / "001.png")}
    assert details["pixel aspect"] == "4:3"
    assert {"colour tags": "BT.2020, PQ"}.items() <= {h.kind: h.detail for h in inventory(tmp_path / "hdr" / "001.png")}.items()
    lines = (tmp_path / "vfr" / "timestamps.txt").read_text().splitlines()
    assert [float(line) for line in lines[1:]] == [0, 40, 80, 120, 160, 200, 320, 440, 560, 680, 800]


@shared
@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.ts", "out.mov", "out.mpg"])
def test_captions_still_say_hello(tmp_path, target):
    rewritten(FAULTS / "closed-captions" / "cc.mp4", tmp_path / target)
    with open_video(tmp_path / target) as reader:
        pairs = [frame.messages.get("captions", b"") for frame in reader]
    text = "".join(chr(byte & 0x7F) for pair in pairs for byte in pair[1:3] if byte & 0x7F >= 0x20)
    assert "HELLO" in text


@shared
def test_dolby_vision_5_is_refused(tmp_path):
    with pytest.raises(MediaError, match="profile 5"):
        open_video(FAULTS / "dolby-vision-5" / "dv5.mp4")


@shared
def test_a_trimmed_clip_is_whole(tmp_path):
    reader, writer, frames = rewritten(FAULTS / "edit-list" / "edit.mp4", tmp_path / "out.mp4")
    assert reader.info.expected_frames == len(frames) == 12
    assert not [*reader.warnings, *writer.warnings]


@shared
def test_frames_keep_alpha_and_profile_as_a_clip(tmp_path):
    source = FAULTS / "frames-alpha-icc"
    _, writer, _ = rewritten(source / "fr_alpha", f"{tmp_path}/alpha/")
    before, after = (read_image(folder / "f000.png") for folder in (source / "fr_alpha", tmp_path / "alpha"))
    np.testing.assert_array_equal(before.alpha, after.alpha)
    assert not writer.warnings
    _, writer, _ = rewritten(source / "fr_icc", f"{tmp_path}/icc/")
    before, after = (read_image(folder / "f000.png") for folder in (source / "fr_icc", tmp_path / "icc"))
    assert before.icc == after.icc
    assert [part.kind for part in before.parts] == [part.kind for part in after.parts]
    _, writer, _ = rewritten(source / "fr_alpha", tmp_path / "out.mp4")
    assert sum("alpha" in line.partition("not kept")[2] for line in writer.warnings) == 1


@shared
def test_an_attachment_that_does_not_fit_is_told(tmp_path):
    _, writer, _ = rewritten(FAULTS / "mkv-attachments" / "att.mkv", tmp_path / "out.mp4")
    assert len(writer.warnings) == 1
    assert "attachment (f.ttf)" in writer.warnings[0]


@shared
@pytest.mark.parametrize("target", ["out.mov", "out.mp4", "out.mkv"])
def test_a_phones_tags_stay(tmp_path, target):
    source = FAULTS / "phone-mov-tags" / "phone.mov"
    _, writer, _ = rewritten(source, tmp_path / target)
    with open_video(source) as before, open_video(tmp_path / target) as after:
        kept = {key.lower(): value for key, value in after.container_tags.items()}
        wanted = {key.lower(): value for key, value in before.container_tags.items() if key.startswith("com.")}
    assert len(wanted) == 3
    assert wanted.items() <= kept.items()
    assert not writer.warnings


@shared
@pytest.mark.parametrize("target", ["out.mov", "out.mp4", "out.mkv", "out.webm"])
def test_a_sphere_stays_one(tmp_path, target):
    source = FAULTS / "spherical-360" / "v360.mp4"
    reader, writer, _ = rewritten(source, tmp_path / target)
    with open_video(tmp_path / target) as after:
        assert after.view.projection == reader.view.projection
        assert after.view.stereo_mode == reader.view.stereo_mode == "top_bottom"
    if target in ("out.mov", "out.mp4"):
        assert b"GSpherical:ProjectionType" in (tmp_path / target).read_bytes()
    assert not writer.warnings


@shared
@pytest.mark.parametrize(("target", "alpha"), [("out.webm", True), ("out.mov", True), ("out.mkv", True), ("out.mp4", False)])
def test_vp9_keeps_its_alpha_or_says_so_and_never_claims_one(tmp_path, target, alpha):
    _, writer, before = rewritten(FAULTS / "vp9-alpha" / "alpha.webm", tmp_path / target)
    with open_video(tmp_path / target) as reader:
        after = list(reader)
        claims = any("alpha" in key.lower() for key in reader.tags)
    assert reader.info.alpha == alpha
    assert claims == (alpha and target != "out.mov")
    assert any("alpha" in line.partition("not kept")[2] for line in writer.warnings) == (not alpha)
    if alpha:
        assert max(np.abs(a.alpha - b.alpha).mean() for a, b in zip(before, after)) < 0.02


def test_nothing_is_left_open(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs a list of open files")
    clip = write_clip(tmp_path / "a.mp4")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        inventory(clip)
    assert len(os.listdir("/proc/self/fd")) == before
