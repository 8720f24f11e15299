"""Large pictures: in one piece up to two tiles' area, else in even ones; heard of and stopped between tiles; estimated before."""

import math
from dataclasses import replace

import pytest

from ebr_engine import Restorer
from ebr_engine.engine.memory import Fallback, Work, peak
from tests.tiny import make_prompt, picture

SIDE = 64  # of a tile in these tests


@pytest.fixture
def small(weights):
    """The tiny backbone with small tiles, and the sizes of the latents that its transformer sees."""
    one = Restorer(model=weights, device="cpu", precision="fp32", compile="off")
    one.backbone.spec = replace(one.backbone.spec, tile=SIDE, overlap=16, whole=2.0, small_side=SIDE)
    one.seen = []
    velocity = one.backbone.velocity
    one.backbone.velocity = lambda latent, step: one.seen.append(tuple(latent.shape)) or velocity(latent, step)
    return one


def cells(height, width):
    return height // 8 + 1, width // 8 + 1  # the moved grid is a token larger


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE + 24), (40, 2 * SIDE), (84, 85)])
def test_a_picture_of_less_than_two_tiles_area_runs_in_one_piece(small, height, width):
    small.restore(picture(height, width), prompt=make_prompt(), steps=1)
    assert [shape[-2:] for shape in small.seen] == [cells(-(-height // 8) * 8, -(-width // 8) * 8)]


@pytest.mark.parametrize(("height", "width"), [(SIDE + 40, SIDE + 40), (16, 2 * SIDE + 8)])
def test_a_larger_or_longer_one_runs_in_tiles(small, height, width):
    small.restore(picture(height, width), prompt=make_prompt(), steps=1)
    assert len(small.seen) > 2
    assert max(math.prod(shape[-2:]) for shape in small.seen[1:]) <= math.prod(cells(SIDE, SIDE))


def test_tiles_that_are_asked_for_are_taken(small):
    small.restore(picture(SIDE, SIDE + 24), prompt=make_prompt(), steps=1, tile=SIDE)
    assert len(small.seen) == 3  # the small version and two tiles


def test_tiles_are_no_larger_than_they_have_to_be(small):
    small.restore(picture(48, 72), prompt=make_prompt(), steps=1, tile=SIDE, tile_overlap=8)
    assert [shape[-2:] for shape in small.seen[1:]] == 2 * [cells(48, 40)]


def test_where_memory_is_less_than_one_piece_needs_tiles_are_taken(small):
    height, width = SIDE, 2 * SIDE
    whole, tiled = (peak(small.engine.costs, Fallback(side, 16), Work(1, 1, height, width)) for side in (0, SIDE))
    assert tiled < whole
    for limit, pieces in ((whole, 1), (whole - 1, 4)):
        small.engine.fitting.limit = limit
        small.seen.clear()
        small.restore(picture(height, width), prompt=make_prompt(), steps=1)
        assert len(small.seen) == pieces


@pytest.mark.parametrize("blend", ["latent", "pixel"])
def test_every_tile_is_heard_of_and_the_small_version_too(small, blend):
    heard = []
    asked = {"tile": SIDE, "tile_overlap": 8, "tile_blend": blend}
    small.restore(picture(90, 90), prompt=make_prompt(), steps=2, callback=lambda *step: heard.append(step), **asked)
    done, totals = zip(*heard)
    assert len(heard) == len(small.seen) == 2 * (1 + 4)
    assert set(totals) == {10}
    assert list(done) == list(range(1, 11))


@pytest.mark.parametrize("after", [1, 3])
def test_what_a_callback_raises_ends_a_run_before_the_next_tile(small, after):
    class Enough(Exception):
        pass

    def callback(done, total):
        if done == after:
            raise Enough

    with pytest.raises(Enough):
        small.restore(picture(90, 90), prompt=make_prompt(), steps=2, callback=callback, tile=SIDE)
    assert len(small.seen) == after


def test_an_estimate_counts_what_a_run_evaluates_and_tries_little_of_it(small):
    plan = small.plan(prompt=make_prompt(), steps=2)
    how = {"tile": None, "tile_overlap": None, "tile_blend": "latent", "detail": "auto"}
    counted = small.engine.evaluations(100, 120, plan, None, None, "latent", "auto")
    small.restore(picture(100, 120), plan=plan)
    assert sum(counted.values()) == len(small.seen)
    small.seen.clear()
    assert small.estimate([((100, 120), plan, how)] * 40) > 0
    assert len(small.seen) == 2
    assert small.estimate([((16, 16), plan, how)]) is None  # a trial would take as long
    assert small.estimate([]) is None


def test_the_estimate_of_twice_the_work_is_about_twice_as_long(small, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("ebr_engine.engine.measure.time.perf_counter", lambda: next(ticks))
    plan, how = small.plan(prompt=make_prompt()), {"tile": 0, "tile_overlap": None, "tile_blend": "latent", "detail": "auto"}
    once, twice = (small.estimate([((64, 72), plan, how)] * count) for count in (60, 120))
    assert twice == pytest.approx(2 * once)
