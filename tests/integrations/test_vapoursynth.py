"""The filter for VapourSynth, with the real VapourSynth and a stand-in restorer that tells what it was given."""

from types import SimpleNamespace

import numpy as np
import pytest

from ebr_engine.errors import EbrError

vs = pytest.importorskip("vapoursynth")

from ebr_engine.integrations.vapoursynth import pixels_of, restore  # noqa: E402

FORMATS = [vs.RGB24, vs.RGB48, vs.RGBS]


class Inverts:
    """Turns pixels into their negative, a chunk at a time; knows time, as wan does."""

    asks_per_frame = False
    released_size = None
    backbone = SimpleNamespace(name="wan")

    def __init__(self, length=4, overlap=1):
        self.length, self.overlap, self.chunks = length, overlap, []
        self.codec = SimpleNamespace(frames=lambda count: count)

    def plan(self, task=None, prompt=None, **options):
        if task not in (None, "haze", "rain"):
            raise EbrError(f"unknown task {task!r}")
        return task

    def tile_size(self, *sizes):
        return 0, 0

    def chunk_size(self, frames, overlap, size=None, **tiling):
        return frames or self.length, self.overlap if overlap is None else overlap

    def begin(self):
        pass

    def diagnose(self, pictures):
        assert all(picture.shape[0] == 3 for picture in pictures)
        self.looked = len(pictures)
        return SimpleNamespace(tasks=("rain",), probability={"rain": 0.9})

    def run(self, clip, *, plan, first, callback, **how):
        self.chunks.append((first, clip.shape[2], plan))
        return 1 - clip


def clip_of(format, frames=10, width=6, height=4):
    """A clip whose frame n has value n/20, and what was asked for of it."""
    asked = []
    blank = vs.core.std.BlankClip(format=format, width=width, height=height, length=frames, fpsnum=24, fpsden=1)
    top = {vs.RGB24: 255, vs.RGB48: 65535, vs.RGBS: 1}[format]

    def fill(n, f):
        asked.append(n)
        made = f.copy()
        for plane in range(3):
            np.asarray(made[plane])[...] = round(min(n, 20) / 20 * top) if top > 1 else n / 20
        made.props["number"] = n
        made.props["_Matrix"] = 0
        return made

    return blank.std.ModifyFrame(blank, fill), asked


@pytest.mark.parametrize("format", FORMATS)
def test_frames_come_out_restored_in_their_format_with_their_properties(format):
    clip, _ = clip_of(format)
    made = restore(clip, task="haze", restorer=Inverts())
    assert (made.format.id, made.width, made.height, made.num_frames, made.fps) == (format, 6, 4, 10, clip.fps)
    for number, frame in enumerate(made.frames()):
        np.testing.assert_allclose(pixels_of(frame, made.format.name), 1 - number / 20, atol=1 / 255)
        assert frame.props["number"] == number
        assert frame.props["_Matrix"] == 0


def test_each_frame_is_asked_for_once_and_chunks_are_the_engines():
    clip, asked = clip_of(vs.RGBS)
    restorer = Inverts(length=4, overlap=1)
    made = restore(clip, task="haze", restorer=restorer)
    assert asked == []  # nothing is done before a frame is wanted
    list(made.frames())
    assert sorted(asked) == list(range(10))
    assert restorer.chunks == [(0, 4, "haze"), (3, 4, "haze"), (6, 4, "haze")]
    restorer.chunks.clear()
    list(restore(clip, task="haze", restorer=restorer, chunk_frames=5, chunk_overlap=0).frames())
    assert restorer.chunks == [(0, 5, "haze"), (5, 5, "haze")]


def test_a_jump_begins_anew_and_gives_the_right_frame():
    clip, _ = clip_of(vs.RGBS, frames=200)
    made = restore(clip, task="haze", restorer=Inverts())
    for number in (0, 150, 20, 199, 19):
        assert made.get_frame(number).props["number"] == number


def test_requests_in_any_order_and_from_many_threads_are_one_rendering():
    clip, asked = clip_of(vs.RGB24, frames=40)
    made = restore(clip, task="haze", restorer=Inverts())
    waiting = [made.get_frame_async(number) for number in (3, 1, 0, 2, *range(4, 40))]
    for future in waiting:
        frame = future.result()
        expected = 1 - round(frame.props["number"] / 20 * 255) / 255 if frame.props["number"] <= 20 else None
        if expected is not None:
            np.testing.assert_allclose(pixels_of(frame, "RGB24"), expected, atol=1 / 255)
    assert sorted(set(asked)) == list(range(40))


@pytest.mark.parametrize("format", [vs.YUV420P8, vs.GRAY8, vs.RGB30, vs.RGBH])
def test_other_formats_are_refused_with_the_call_that_converts(format):
    clip = vs.core.std.BlankClip(format=format, width=8, height=8, length=1)
    with pytest.raises(EbrError, match=r"core\.resize\.Bicubic\(clip, format=vs\.RGBS, matrix_in_s="):
        restore(clip, task="haze", restorer=Inverts())


def test_what_cannot_be_met_is_told_before_any_frame():
    clip, asked = clip_of(vs.RGB24)
    changing = vs.core.std.Splice([clip, vs.core.std.BlankClip(format=vs.RGB24, width=20, height=20, length=2)], mismatch=True)
    for wrong, why in (
        (lambda: restore(changing, task="haze", restorer=Inverts()), "resize it to one"),
        (lambda: restore("clip.mp4", task="haze", restorer=Inverts()), "expected a clip"),
        (lambda: restore(clip, restorer=Inverts()), "name a task"),
        (lambda: restore(clip, task="hase", restorer=Inverts()), "unknown task"),
        (lambda: restore(clip, task="haze", restorer=Inverts(), stepz=3), "did you mean 'steps'"),
        (lambda: restore(clip, task="haze", restorer=Inverts(), backbone="mini"), "has its backbone already"),
    ):
        with pytest.raises(EbrError, match=why):
            wrong()
    assert asked == []


def test_task_auto_looks_at_three_frames():
    clip, asked = clip_of(vs.RGB24, frames=9)
    restorer = Inverts()
    made = restore(clip, task="auto", restorer=restorer)
    assert restorer.looked == 3
    assert asked == [0, 3, 6]
    made.get_frame(0)
    assert restorer.chunks[0][2] == "rain"


def test_an_error_of_the_engine_reaches_the_one_who_asks_and_the_next_request_begins_anew():
    clip, _ = clip_of(vs.RGB24)
    restorer = Inverts()
    made = restore(clip, task="haze", restorer=restorer)
    run, restorer.run = restorer.run, None
    with pytest.raises(vs.Error):
        made.get_frame(0)
    restorer.run = run
    assert made.get_frame(0).props["number"] == 0


def test_the_bundled_backbone_restores_a_clip():
    clip, _ = clip_of(vs.RGB24, frames=2, width=24, height=16)
    made = restore(clip, task="haze", steps=1, compile="off")
    frame = made.get_frame(1)
    assert frame.props["number"] == 1
    assert np.isfinite(pixels_of(frame, "RGB24")).all()
