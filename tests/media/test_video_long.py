"""Long films: after an hour sound and picture are as far apart as they were, and memory is that of a short clip."""

import os
import sys
from fractions import Fraction
from pathlib import Path
from subprocess import run

import numpy as np
import pytest

from ebr_engine.media.video import Frame, VideoInfo, open_video, write_video

av = pytest.importorskip("av")

HOUR = 3600
NTSC = Fraction(30000, 1001)
NO_PIXELS = np.empty((0, 0, 3), np.float32)


@pytest.fixture
def hour(tmp_path):
    """A clip of an hour with sound: a picture of 16 × 16 pixels every four seconds."""
    path = tmp_path / "hour.mkv"
    with av.open(str(path), "w") as output:
        video = output.add_stream("mpeg4", rate=Fraction(1, 4))
        video.width = video.height = 16
        video.pix_fmt = "yuv420p"
        audio = output.add_stream("flac", rate=8000, layout="mono")
        for index in range(HOUR // 4):
            picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), index % 250, np.uint8), "rgb24")
            picture.pts, picture.time_base = index, Fraction(4)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.int16), "s16", "mono")
            sound.sample_rate, sound.pts, sound.time_base = 8000, index * 32000, Fraction(1, 8000)
            output.mux([*video.encode(picture), *audio.encode(sound)])
        output.mux([*video.encode(None), *audio.encode(None)])
    return path


def times(path, kind):
    """Seconds of all packets of a file's first stream of a kind, in the order they are shown in."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return sorted(packet.pts * packet.time_base for packet in container.demux(stream) if packet.pts is not None)


def test_after_an_hour_sound_and_picture_are_as_they_were(hour, tmp_path):
    out = tmp_path / "out.mp4"
    with open_video(hour) as reader, write_video(out, reader, codec="mpeg4") as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
    for kind, tolerance in (("video", Fraction(1, 1000)), ("audio", Fraction(1, 500))):
        before, after = times(hour, kind), times(out, kind)
        assert len(before) == len(after)
        assert before[-1] > HOUR - 9
        assert max(abs(a - b) for a, b in zip(before, after)) <= tolerance  # where a frame is four seconds


@pytest.mark.parametrize(("suffix", "base"), [(".mp4", 1 / NTSC), (".mkv", Fraction(1, 1000))])
def test_a_rate_that_is_no_whole_number_does_not_drift(tmp_path, suffix, base):
    """At 30000/1001 frames a second: two thousand in a row, and then some up to the end of two hours."""
    path = tmp_path / f"out{suffix}"
    info = VideoInfo(16, 16, NTSC, base)
    indices = [*range(2000), *range(2000, round(7200 * NTSC), 997)]
    with write_video(path, info, options={"preset": "ultrafast", "threads": "1"}) as writer:
        pixels = np.zeros((16, 16, 3), np.float32)
        for index in indices:
            ticks = round(index / NTSC / base)
            writer.write_prepared(writer.prepare(pixels), Frame(NO_PIXELS, ticks, base))
    found = times(path, "video")
    assert len(found) == len(indices)
    rounding = base / 2 if suffix == ".mkv" else 0  # Matroska counts milliseconds
    assert max(abs(time - index / NTSC) for time, index in zip(found, indices)) <= rounding


LENGTHS = """
import sys, types, weakref
from fractions import Fraction
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
import conftest
fake = types.ModuleType("ebr_engine.engine.restorer")
fake.Restorer = conftest.FakeRestorer
sys.modules["ebr_engine.engine.restorer"] = fake
from ebr_engine.cli import app
from ebr_engine.media.video import VideoInfo, info, parts, write_video

parts.SECONDS, parts.MOST_BYTES = 0.0, 2**20
alive, most, made = set(), 0, info.Frame.__init__

def counted(self, *values, **named):
    global most
    made(self, *values, **named)
    alive.add(key := object())
    most = max(most, len(alive))
    weakref.finalize(self, alive.discard, key).atexit = False

info.Frame.__init__ = counted

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def restore(name, count):
    global most
    picture = np.random.default_rng(0).random((96, 160, 3), np.float32)
    with write_video(name, VideoInfo(160, 96, Fraction(25), Fraction(1, 25)), options={{"preset": "ultrafast"}}) as writer:
        for index in range(count):
            writer.write(np.roll(picture, index, axis=1))
    most = 0
    how = "--task haze --chunk-frames 9 --chunk-overlap 2 -e preset=ultrafast -e threads=1 --device cpu --quiet"
    app(["restore", name, "-o", "out-" + name, *how.split()], standalone_mode=False)
    return most, peak()

print(*restore("warm.mp4", 40), *restore("short.mp4", 100), *restore("long.mp4", 1000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_ten_times_the_frames_take_no_more_memory(tmp_path):
    """Through decoder, chunks, encoder and parts on the disk; only the transformer is a stand-in."""
    tests = Path(__file__).parents[1] / "cli"
    command = [sys.executable, "-c", LENGTHS.format(tests=str(tests))]
    settings = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else every thread's own arena grows by chance
    result = run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=settings)
    assert result.returncode == 0, result.stderr
    _, _, few, before, many, after = map(int, result.stdout.split()[-6:])
    # One chunk of nine each is read, waits, is restored and goes to the encoder; which of them at once is the threads' affair.
    assert max(few, many) <= 4 * 9 + 2 + 2  # with the last fade, and what looking for cuts reads ahead
    assert after - before < 900 * 96 * 160 * 3 / 2  # half of what the nine hundred more would take, a byte a value
    with open_video(tmp_path / "out-long.mp4") as reader:
        assert sum(1 for _ in reader) == 1000
