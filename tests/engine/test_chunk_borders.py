"""A clip in chunks does not jump where they meet; and a very long one streams with a few frames in memory."""

import gc
import weakref
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.media.chunking import blend, chunked
from ebr_engine.media.video.info import Frame
from ebr_engine.prompts.prompt import Prompt
from tests.real_layout import write_wan

FRAMES, LENGTH, OVERLAP = 45, 17, 8


def static(count, height=32, width=48):
    y, x = np.mgrid[:height, :width].astype(np.float32)
    picture = np.stack([0.4 + 0.2 * np.sin(x / 9 + k) * np.cos(y / 7) for k in range(3)], axis=-1)
    return [Frame(picture, i, Fraction(1, 24)) for i in range(count)]


def restored(restorer, plan, frames, length, overlap):
    """The clip in chunks, as the command restores it; frames [H, W, 3], and the first frame of every chunk's fade."""
    found, tail, borders = [], [], []
    for chunk in chunked(frames, length, overlap, restorer.codec.frames):
        clip = torch.from_numpy(chunk.pixels).movedim(-1, 0)[None]
        settled, tail = blend(chunk, restorer.run(clip, plan, first=chunk.start)[0].movedim(0, -1).numpy(), tail)
        borders += [chunk.start + chunk.skip] if chunk.start else []
        found += settled
    return np.stack([frame.pixels for frame in [*found, *tail]]), borders


def jumps(pixels, borders, overlap):
    """Largest mean difference of successive frames where chunks meet, and the mean of those inside of chunks."""
    steps = np.array([np.abs(b - a).mean() for a, b in pairwise(pixels)])
    meet = np.zeros(len(steps), bool)
    for border in borders:
        meet[border - 1 : border + overlap] = True
    return steps[meet].mean(), steps[~meet].mean()


def test_mini_restores_a_static_clip_to_a_static_one():
    restorer = Restorer("mini", precision="fp32")
    pixels, borders = restored(restorer, restorer.plan("haze", steps=1), static(11), 4, 1)
    assert len(borders) == 3
    assert np.abs(np.diff(pixels, axis=0)).max() < 1e-5


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    pytest.importorskip("diffusers")
    restorer = Restorer("wan", model=write_wan(tmp_path_factory.mktemp("wan")), device="cpu", precision="fp32")
    torch.manual_seed(2)
    prompt = Prompt(torch.randn(226, 24) * 0.5, torch.rand(2), backbone="wan", task="rain", t0=0.4)
    return restorer, restorer.plan(prompt=prompt, steps=3)


@pytest.mark.parametrize("overlap", [8, 9])
def test_chunks_of_wan_meet_without_a_jump(wan, overlap):
    pixels, borders = restored(*wan, static(FRAMES), LENGTH, overlap)
    assert len(pixels) == FRAMES
    assert len(borders) >= 3
    meeting, inside = jumps(pixels, borders, overlap)
    assert meeting < 1.2 * inside


def test_the_last_chunk_sees_the_noise_of_its_own_moment(wan):
    restorer, _ = wan
    first, later = (restorer.engine.geometry.noise((1, 3, 17, 32, 48), 42, start) for start in (0, 8))
    torch.testing.assert_close(later[:, :, :3], first[:, :, 2:])
    assert later.unique().numel() == first.numel()  # a chunk has no noise twice


def test_two_hours_stream_with_a_few_frames_in_memory():
    alive, most, count = set(), 0, 2 * 3600 * 24

    def film():
        nonlocal most
        for i in range(count):
            frame = Frame(np.full((2, 2, 3), 0.5, np.float32), i, Fraction(1, 24))
            alive.add(i)
            weakref.finalize(frame, alive.discard, i).atexit = False
            most = max(most, len(alive))
            yield frame

    written, tail, last = 0, [], None
    for chunk in chunked(film(), 33, 9, lambda n: 1 + (n + 2) // 4 * 4, cuts=False):
        settled, tail = blend(chunk, chunk.pixels, tail)
        written += len(settled)
        last = settled[-1].time if settled else last
        settled.clear()
    gc.collect()
    assert written + len(tail) == count
    assert tail[-1].time == Fraction(count - 1, 24) if tail else last == Fraction(count - 1, 24)
    assert most <= 2 * 33
