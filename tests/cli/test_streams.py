"""`ebr-engine restore` on clips with sound, subtitles, chapters and tags: they come out as they went in."""

from fractions import Fraction

import pytest

from tests.media.conftest import make_clip  # noqa: F401 (a fixture)

av = pytest.importorskip("av")

HOW = "--task haze --steps 1 --quiet"


@pytest.fixture
def source(make_clip):  # noqa: F811
    chapters = [(0, 500, "one"), (500, 1000, "two")]
    return make_clip("in.mkv", 12, audio="aac", subtitles=True, chapters=chapters, tags={"title": "The rain"}, language="fra")


def contents(path):
    """Of every stream but the picture its packets with their times; and what is said about the whole."""
    found = {}
    with av.open(str(path)) as container:
        for stream in container.streams:
            if stream.type == "video":
                continue
            packets = [
                (packet.pts * packet.time_base, bytes(packet)) for packet in container.demux(stream) if packet.dts is not None
            ]
            found[stream.type] = packets, stream.codec_context.name, stream.language
            container.seek(0)
        chapters = [
            (Fraction(c["start"]) * c["time_base"], Fraction(c["end"]) * c["time_base"], c["metadata"]["title"])
            for c in container.chapters()
        ]
        return found, chapters, container.metadata.get("title"), container.streams.video[0].language


def test_everything_but_the_picture_is_copied(cli, source):
    assert cli("restore", source, "-o", "out.mkv", *HOW.split())[0] == 0
    before, after = contents(source), contents("out.mkv")
    assert set(before[0]) == {"audio", "subtitle"}
    assert all(len(packets) > 1 for packets, *_ in before[0].values())
    assert after == before
    assert len(after[1]) == 2


@pytest.mark.parametrize(("option", "dropped"), [("--no-copy-audio", "audio"), ("--no-copy-subtitles", "subtitle")])
def test_what_is_not_wanted_is_left_out(cli, source, option, dropped):
    assert cli("restore", source, "-o", "out.mkv", *HOW.split(), option)[0] == 0
    assert set(contents(source)[0]) - set(contents("out.mkv")[0]) == {dropped}


def test_a_part_of_a_clip_has_its_part_of_the_sound(cli, source):
    assert cli("restore", source, "-o", "out.mkv", *HOW.split(), "--start", "0.5", "--frames", "3")[0] == 0
    before, after = contents(source), contents("out.mkv")
    sound = after[0]["audio"][0]
    assert 0 < len(sound) < len(before[0]["audio"][0])
    assert {data for _, data in sound} <= {data for _, data in before[0]["audio"][0]}
    assert [title for *_, title in after[1]] == ["two"]
