"""Every container × everything that a clip can hold beside its frames: it is kept, converted, or told. Nothing else."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import Fate, inventory
from ebr_engine.media.holdings.video_fates import CONTAINERS, VIDEO_FATES, clip_outcomes
from ebr_engine.media.images import read_image
from ebr_engine.media.video import open_video, write_video
from tests.media.clip_maker import CLIPS, RATE

FRAMES = ("png", "tiff", "webp", "avif")
TARGETS = (*CONTAINERS, *FRAMES)
_KEPT_CLIPS: dict[str, Path] = {}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(kind): a clip that holds it, made once."""

    def made(kind):
        if kind not in _KEPT_CLIPS:
            _KEPT_CLIPS[kind] = CLIPS[kind](tmp_path_factory.mktemp("clip"))
        return _KEPT_CLIPS[kind]

    return made


def restored(source, target, folder, **settings):
    """The clip written as `target`, without a change in between; the output, the writer and the frames that were read."""
    out = folder / (f"out.{target}" if target in CONTAINERS else f"%d.{target}")
    with open_video(source) as reader, write_video(out, reader, **settings) as writer:
        frames = list(reader)
        for frame in frames:
            writer.write(frame.pixels, frame)
    return out if target in CONTAINERS else folder / f"1.{target}", writer, frames


def kinds(path):
    return {holding.kind for holding in inventory(path)}


@pytest.mark.parametrize("kind", CLIPS)
def test_the_inventory_finds_what_a_clip_holds(source, kind):
    assert kind in kinds(source(kind))


def test_a_plain_clip_holds_nothing(tmp_path):
    from tests.media.clip_maker import write_clip

    for name in ("a.mp4", "a.mkv", "a.mov", "a.avi", "a.ts"):
        assert kinds(write_clip(tmp_path / name)) == set()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", CLIPS)
def test_it_is_kept_converted_or_told(source, tmp_path, kind, target):
    clip = source(kind)
    out, writer, before = restored(clip, target, tmp_path)
    by_table = {o.holding.kind: o for o in clip_outcomes(inventory(clip), target, writer.codec_id)}
    outcome = next((o for o in writer.fates.outcomes if o.holding.kind == kind), by_table[kind])
    if kind != "sound":  # which depends on its own codec
        assert outcome.fate is by_table[kind].fate
    told = " ".join(writer.warnings)
    if outcome.fate is Fate.NOT_KEPT:
        assert kind in told
        assert kind not in kinds(out)
        return
    assert f" {kind}" not in told
    if kind == "frame times":
        assert_same_times(before, out, target)
    elif kind == "edit list":
        assert len(before) == 5
        assert len(list(open_video(out))) == 5 if target in CONTAINERS else len(list(tmp_path.iterdir())) == 5
    elif kind == "alpha" and target in FRAMES:
        assert read_image(out).alpha is not None
    elif kind.startswith("timecode") and target == "mpg":
        with open_video(out) as reader:
            assert reader.timecode == "01:02:03:04"
    elif kind == "timecode message" or (kind == "colour tags" and target in FRAMES):
        assert {"timecode", "icc", "colour tags"} & kinds(out)
    else:
        assert kind in kinds(out)


def assert_same_times(before, out, target):
    if target in FRAMES:
        lines = (out.parent / "timestamps.txt").read_text().splitlines()[1:]
        assert [float(line) / 1000 for line in lines] == pytest.approx([float(f.time) for f in before] + [10 / RATE], abs=1e-6)
    else:
        with open_video(out) as reader:
            assert [float(frame.time) for frame in reader] == pytest.approx([float(f.time) for f in before], abs=0.001)


def test_every_fate_of_the_table_has_a_clip_that_shows_it():
    of_pictures = {kind for kind, fates in VIDEO_FATES.items() if set(fates) == {"clip"}}
    hard = {  # what nothing here can make: made by hand elsewhere, or too large a clip
        *("subtitles", "GPMF track", "data track", "registered message", "HDR Vivid", "enhancement layer", "icc"),
    }
    assert set(VIDEO_FATES) - of_pictures - hard == set(CLIPS)


@pytest.mark.parametrize("kind", ["captions", "attachment", "alpha", "phone tags"])
def test_strict_refuses_what_would_be_lost_and_leaves_nothing(source, tmp_path, kind):
    target = {"captions": "webm", "attachment": "mp4", "alpha": "mp4", "phone tags": "ts"}[kind]
    with pytest.raises(MediaError, match=rf"not written.*{kind}"):
        restored(source(kind), target, tmp_path, strict=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "mpeg2video"])
def test_captions_are_put_back_frame_by_frame(source, tmp_path, codec):
    out = tmp_path / ("out.mpg" if codec == "mpeg2video" else "out.mp4")
    with open_video(source("captions")) as reader, write_video(out, reader, codec=codec) as writer:
        before = list(reader)
        for frame in before:
            writer.write(frame.pixels, frame)
    with open_video(out) as reader:
        after = list(reader)
    assert [frame.messages["captions"] for frame in after] == [frame.messages["captions"] for frame in before]
    assert not writer.warnings


@pytest.mark.parametrize(
    ("target", "codec"),
    [
        ("out.mov", "prores_ks"),
        ("out.webm", "libvpx-vp9"),
        ("out.mkv", "ffv1"),
        ("out.webm", "libvpx"),
        ("out.mkv", "libvpx-vp9"),
    ],
)
def test_alpha_comes_out_as_it_went_in(source, tmp_path, target, codec):
    with open_video(source("alpha")) as reader, write_video(tmp_path / target, reader, codec=codec, crf=None) as writer:
        before = list(reader)
        for frame in before:
            writer.write(1 - frame.pixels, frame)
    with open_video(tmp_path / target) as reader:
        after = list(reader)
    assert reader.info.codec == {"prores_ks": "prores", "libvpx": "vp8"}.get(codec, codec.removeprefix("libvpx-"))
    for a, b in zip(before, after):
        np.testing.assert_allclose(a.alpha, b.alpha, atol=0.03)
        assert np.abs(1 - a.pixels - b.pixels).mean() < 0.05
    assert after[0].alpha[:, -4:].mean() > 0.95
    assert after[0].alpha[:, :2].mean() < 0.05


def test_an_alpha_that_is_opaque_everywhere_is_not_missed(tmp_path):
    from tests.media.clip_maker import write_clip

    clip = write_clip(tmp_path / "a.mkv", "ffv1", pix_fmt="bgra")
    _, writer, _ = restored(clip, "mp4", tmp_path)
    assert not any(" alpha" in line for line in writer.warnings)


def test_phone_tags_survive_matroska_and_back(source, tmp_path):
    mkv, _, _ = restored(source("phone tags"), "mkv", tmp_path)
    mov, _, _ = restored(mkv, "mov", tmp_path)
    with open_video(source("phone tags")) as before, open_video(mov) as after:
        for key, value in before.container_tags.items():
            if key.startswith("com."):
                assert after.container_tags[key] == value


def test_the_timecode_of_a_part_is_that_of_its_first_frame(source, tmp_path):
    with open_video(source("timecode"), start=2 / RATE) as reader, write_video(tmp_path / "out.mov", reader) as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
    with open_video(tmp_path / "out.mov") as reader:
        assert reader.timecode == "01:02:03:06"


@pytest.mark.parametrize(
    ("text", "seconds", "rate", "expected"),
    [
        ("01:02:03:04", Fraction(1), Fraction(25), "01:02:04:04"),
        ("00:00:59;29", Fraction(1001, 30000), Fraction(30000, 1001), "00:01:00;02"),
        ("00:09:59;29", Fraction(1001, 30000), Fraction(30000, 1001), "00:10:00;00"),
        ("00:00:00;00", Fraction(3600), Fraction(30000, 1001), "01:00:00;00"),
        ("23:59:59:24", Fraction(1, 25), Fraction(25), "00:00:00:00"),
        ("noon", Fraction(1), Fraction(25), None),
        (None, Fraction(1), Fraction(25), None),
    ],
)
def test_timecodes_count_on_with_dropped_numbers_too(text, seconds, rate, expected):
    from ebr_engine.media.video.messages import timecode_after

    assert timecode_after(text, seconds, rate) == expected


@pytest.mark.parametrize("mode", ["right_left", "anaglyph_cyan_red", "checkerboard_lr"])
def test_eyes_in_an_arrangement_that_mp4_has_no_word_for(tmp_path, mode):
    from tests.media.clip_maker import write_clip

    clip = write_clip(tmp_path / "a.mkv", stream_tags={"stereo_mode": mode})
    mkv, writer, _ = restored(clip, "mkv", tmp_path)
    with open_video(mkv) as reader:
        assert reader.tags["stereo_mode"] == mode
    assert not writer.warnings
    _, writer, _ = restored(clip, "mp4", tmp_path)
    assert ["stereo view" in line for line in writer.warnings] == [True]


def test_several_messages_of_a_kind_stay(tmp_path):
    from tests.media.clip_maker import UNREGISTERED, sei, write_clip

    words = [UNREGISTERED, bytes(range(16, 32)) + b"and others"]
    clip = write_clip(tmp_path / "a.mp4", inserted=b"".join(sei(5, each) for each in words))
    out, _, _ = restored(clip, "mov", tmp_path)
    with open_video(out) as reader:
        for frame in reader:
            assert sorted(frame.messages.values()) == sorted(words)


def test_a_bare_stream_of_dolby_vision_without_colours_is_refused(tmp_path):
    from tests.media.clip_maker import HDR, write_clip

    with pytest.raises(MediaError, match="is Dolby Vision without a base layer"):
        open_video(
            write_clip(tmp_path / "a.ts", "libx265", pix_fmt="yuv420p10le", appended=b"\0\0\0\1\x7c\1" + bytes(range(8, 40)))
        )
    clip = write_clip(
        tmp_path / "b.ts", "libx265", pix_fmt="yuv420p10le", context=HDR, appended=b"\0\0\0\1\x7c\1" + bytes(range(8, 40))
    )
    _, writer, _ = restored(clip, "mp4", tmp_path)
    assert any("Dolby Vision" in line for line in writer.warnings)


def test_a_timecode_that_does_not_fit_the_rate_is_told(tmp_path):
    from tests.media.clip_maker import write_clip

    clip = write_clip(tmp_path / "a.mkv", stream_tags={"timecode": "01:02:03;04"})
    _, writer, _ = restored(clip, "mov", tmp_path)
    assert ["timecode (01:02:03;04)" in line for line in writer.warnings] == [True]


@pytest.mark.parametrize("title", ["", "Main"])
@pytest.mark.parametrize("target", ["mkv", "webm"])
def test_the_header_of_matroska_stays_sound_with_what_is_added(source, tmp_path, title, target):
    import zlib

    import av

    from tests.media.clip_maker import SV3D, add_box, write_clip

    clip = add_box(write_clip(tmp_path / "a.mp4", context={"sample_aspect_ratio": Fraction(5, 3)}), "entry", SV3D)
    with open_video(clip) as reader:
        reader.tags["title"] = title
        out = tmp_path / f"out.{target}"
        with write_video(out, reader) as writer:
            for frame in reader:
                writer.write(frame.pixels, frame)
    with av.open(str(out)) as container:
        (stream,) = container.streams
        assert stream.metadata.get("title", "") == title
        assert stream.sample_aspect_ratio == Fraction(5, 3)
    data = out.read_bytes()
    assert b"~~~" not in data
    at = data.rindex(b"\x16\x54\xae\x6b") + 4  # behind the index at the beginning, which names it too
    length = 9 - data[at].bit_length()
    size = int.from_bytes(data[at : at + length], "big") & (1 << 7 * length) - 1
    content = data[at + length : at + length + size]
    assert (content[:2] == b"\xbf\x84") == (target == "mkv")  # WebM has no checksums
    assert target == "webm" or int.from_bytes(content[2:6], "little") == zlib.crc32(content[6:])


@pytest.mark.parametrize(("target", "start", "expected"), [("mov", None, "01:02:03:04"), ("mkv", 0.08, "01:02:03:06")])
def test_the_timecode_of_groups_of_pictures_stays(tmp_path, target, start, expected):
    from tests.media.clip_maker import write_clip

    clip = write_clip(tmp_path / "a.mpg", "mpeg2video", options={"gop_timecode": "01:02:03:04", "g": "3"})
    assert "timecode message" in kinds(clip)
    with open_video(clip, start=start) as reader, write_video(tmp_path / f"out.{target}", reader) as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
    with open_video(tmp_path / f"out.{target}") as reader:
        assert reader.timecode == expected
    _, writer, _ = restored(clip, "ts", tmp_path)
    assert ["timecode message" in line for line in writer.warnings] == [True]
