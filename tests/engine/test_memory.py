"""The memory model as arithmetic: ladders go down, what fits is chosen, what cannot fit is told with the least."""

from dataclasses import replace
from itertools import pairwise

import pytest

from ebr_engine.backbones.registry import named_config, spec
from ebr_engine.engine.costs import costs
from ebr_engine.engine.memory import Fallback, Work, choose, fallbacks, format_size, last_with_view, peak, size_of
from ebr_engine.errors import EngineError

GB = 2**30
WAN = costs(spec("wan"), named_config("wan-1.3b"), "bf16", "cuda")
FLUX = costs(spec("flux"), named_config("flux-dev"), "bf16", "cuda")
MINI = costs(spec("mini"), named_config("mini"), "fp32", "cpu")
CLIP = Work(1, 33, 480, 832)
START = {"wan": Fallback(832, 64, frames=33), "flux": Fallback(1024, 64), "mini": Fallback(512, 64, frames=4)}


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 * GB), ("1.5 GB", 3 * GB // 2), ("900m", 900 * 2**20), ("2GiB", 2 * GB), (1234, 1234), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "8 apples", "G", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(EngineError, match="8G"):
        size_of(text)


def test_sizes_are_told_in_their_unit():
    assert [format_size(x) for x in (3 * GB // 2, 900 * 2**20, 2048, 5)] == ["1.5 GB", "900 MB", "2 KB", "5 bytes"]


@pytest.mark.parametrize("size", [1, 1023, 1025, 1010 * 2**20, 2**30 - 1, 2**30 + 1, 12.34 * 2**30, 1234567890123])
def test_a_size_that_is_told_is_enough_when_it_is_given_back(size):
    assert size <= size_of(format_size(size).replace(" bytes", "")) <= 1.011 * size


@pytest.mark.parametrize("name", ["wan", "flux", "mini"])
@pytest.mark.parametrize("frames", [1, 33])
@pytest.mark.parametrize("size", [(480, 832), (2160, 3840)])
def test_no_rung_needs_more_than_the_one_above_it_by_much_and_the_last_needs_least(name, frames, size):
    model = {"wan": WAN, "flux": FLUX, "mini": MINI}[name]
    start = replace(START[name], frames=frames)
    needs = [peak(model, rung, Work(1, frames, *size)) for rung in fallbacks(start, model)]
    assert min(needs) == needs[-1]
    assert all(after <= before for before, after in pairwise(needs))
    assert needs[-1] < needs[0]


def test_the_first_rungs_change_nothing_that_is_seen():
    rungs = fallbacks(START["wan"], WAN)
    last = last_with_view(rungs)
    assert 0 < last < len(rungs) - 1
    assert {(rung.tile, rung.frames) for rung in rungs[: last + 1]} == {(832, 33)}
    assert (rungs[last].blend, rungs[last].at_once, rungs[last].offload) == ("pixel", 1, "blocks")


def test_the_fastest_rung_that_fits_is_chosen():
    rungs = fallbacks(START["wan"], WAN)
    assert choose(rungs, WAN, CLIP, None) == 0
    assert choose(rungs, WAN, CLIP, 80 * GB) == 0
    chosen = [choose(rungs, WAN, CLIP, limit * GB) for limit in (80, 24, 12, 8, 6, 4)]
    assert chosen == sorted(chosen)
    for limit, index in zip((24, 12, 8, 6, 4), chosen[1:]):
        assert peak(WAN, rungs[index], CLIP) <= limit * GB
        assert index == 0 or peak(WAN, rungs[index - 1], CLIP) > limit * GB
    assert choose(rungs, WAN, CLIP, 80 * GB, first=3) == 3  # never up again


def test_what_cannot_fit_is_refused_with_the_least_that_would_do():
    rungs = fallbacks(START["flux"], FLUX)
    picture = Work(1, 1, 1024, 1024)
    with pytest.raises(EngineError, match=r"1024 x 1024 pixels need .* at least, more than the 100 MB") as refused:
        choose(rungs, FLUX, picture, 100 * 2**20)
    least = format_size(min(peak(FLUX, rung, picture) for rung in rungs))
    assert least in str(refused.value)
    assert rungs[choose(rungs, FLUX, picture, size_of(least))]  # and would do


def test_a_fixed_graph_keeps_its_tile_and_a_cpu_has_nothing_to_offload():
    rungs = fallbacks(START["wan"], replace(WAN, cuda=False), fixed=True)
    assert {(rung.tile, rung.frames, rung.offload) for rung in rungs} == {(832, 33, "none")}
    assert len(rungs) > 2


def test_a_picture_that_was_not_to_be_tiled_is_when_nothing_else_helps():
    rungs = fallbacks(Fallback(0, 0), MINI)
    assert rungs[0].tile == 0
    assert rungs[-1].tile == 128
    assert all(0 < rung.overlap < rung.tile for rung in rungs if rung.tile)


def test_blocks_that_wait_need_no_room():
    whole, blocks = Fallback(832, 64, frames=33), Fallback(832, 64, frames=33, offload="blocks")
    saved = peak(WAN, whole, CLIP) - peak(WAN, blocks, CLIP)
    assert WAN.waiting <= saved <= WAN.waiting + WAN.codec
    assert 0.7 * WAN.trunk < WAN.waiting < WAN.trunk
