"""The memory model as arithmetic: fallbacks need less and less, what fits is chosen, what cannot fit is told with the least."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from ebr_engine.backbones.layers import ROTARY_KEPT
from ebr_engine.backbones.registry import named_config, spec
from ebr_engine.engine import execute, memory
from ebr_engine.engine.costs import costs
from ebr_engine.engine.layout import few_sizes
from ebr_engine.engine.memory import PIXEL, Fallback, Work, choose, fallbacks, format_size, last_with_view, peak, size_of
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
def test_no_fallback_needs_more_than_the_one_above_it_by_much_and_the_last_needs_least(name, frames, size):
    model = {"wan": WAN, "flux": FLUX, "mini": MINI}[name]
    start = replace(START[name], frames=frames)
    needs = [peak(model, way, Work(1, frames, *size)) for way in fallbacks(start, model)]
    assert min(needs) == needs[-1]
    assert all(after <= before for before, after in pairwise(needs))
    assert needs[-1] < needs[0]


def test_the_first_ways_change_nothing_that_is_seen():
    ways = fallbacks(START["wan"], WAN)
    last = last_with_view(ways)
    assert 0 < last < len(ways) - 1
    assert {(way.tile, way.frames) for way in ways[: last + 1]} == {(832, 33)}
    assert (ways[last].blend, ways[last].at_once, ways[last].offload) == ("pixel", 1, "blocks")


def test_the_fastest_rung_that_fits_is_chosen():
    ways = fallbacks(START["wan"], WAN)
    assert choose(ways, WAN, CLIP, None) == 0
    assert choose(ways, WAN, CLIP, 80 * GB) == 0
    chosen = [choose(ways, WAN, CLIP, limit * GB) for limit in (80, 24, 12, 8, 6, 4)]
    assert chosen == sorted(chosen)
    for limit, index in zip((24, 12, 8, 6, 4), chosen[1:]):
        assert peak(WAN, ways[index], CLIP) <= limit * GB
        assert index == 0 or peak(WAN, ways[index - 1], CLIP) > limit * GB
    assert choose(ways, WAN, CLIP, 80 * GB, first=3) == 3  # never up again


def test_what_cannot_fit_is_refused_with_the_least_that_would_do():
    ways = fallbacks(START["flux"], FLUX)
    picture = Work(1, 1, 1024, 1024)
    with pytest.raises(EngineError, match=r"1024 x 1024 pixels need .* at least, more than the 100 MB") as refused:
        choose(ways, FLUX, picture, 100 * 2**20)
    least = format_size(min(peak(FLUX, way, picture) for way in ways))
    assert least in str(refused.value)
    assert ways[choose(ways, FLUX, picture, size_of(least))]  # and would do


def test_a_fixed_graph_keeps_its_tile_and_a_cpu_has_nothing_to_offload():
    ways = fallbacks(START["wan"], replace(WAN, cuda=False), fixed=True)
    assert {(way.tile, way.frames, way.offload) for way in ways} == {(832, 33, "none")}
    assert len(ways) > 2


def test_a_picture_that_was_not_to_be_tiled_is_when_nothing_else_helps():
    ways = fallbacks(Fallback(0, 0), MINI)
    assert ways[0].tile == 0
    assert ways[-1].tile == 128
    assert all(0 < way.overlap < way.tile for way in ways if way.tile)


def test_blocks_that_wait_need_no_room():
    whole, blocks = Fallback(832, 64, frames=33), Fallback(832, 64, frames=33, offload="blocks")
    saved = peak(WAN, whole, CLIP) - peak(WAN, blocks, CLIP)
    assert WAN.waiting <= saved <= WAN.waiting + WAN.codec
    assert 0.7 * WAN.trunk < WAN.waiting < WAN.trunk


@pytest.mark.parametrize("sides", [(264, 264), (320, 264), (257, 300)])
def test_what_is_run_at_one_of_a_few_sizes_takes_what_that_size_takes(sides):
    few = replace(MINI, few_sizes=True)
    given = Work(1, 1, *sides), Work(1, 1, 320, 320)
    need, at_320 = (peak(few, START["mini"], work) for work in given)
    asked, at_most = (PIXEL * work.height * work.width for work in given)  # the picture itself is as it came
    assert need - asked == at_320 - at_most
    assert peak(MINI, START["mini"], given[0]) < need


def test_few_sizes_are_those_that_are_run():
    few = replace(WAN, few_sizes=True)
    for frames, height, width in ((1, 264, 264), (7, 200, 360), (33, 480, 832), (20, 900, 1700)):
        padded = 1 + 4 * math.ceil((frames - 1) / 4), *(math.ceil(side / 16) * 16 for side in (height, width))
        batch, *run = few_sizes((3, 3, *padded), 16, 4, 832)
        same = peak(few, START["wan"], Work(3, frames, height, width)), peak(WAN, START["wan"], Work(batch, *run))
        assert same[0] == same[1]


def test_blocks_that_wait_are_neither_compiled_nor_recorded():
    blocks = Fallback(832, 64, frames=33, offload="blocks")
    assert peak(replace(WAN, few_sizes=True, graphs=True), blocks, CLIP) == peak(WAN, blocks, CLIP)


@pytest.mark.parametrize(("model", "work"), [(WAN, CLIP), (FLUX, Work(1, 1, 1024, 1024)), (FLUX, Work(1, 1, 3000, 2000))])
def test_the_memory_of_graphs_stays_while_the_codec_works(model, work):
    start = START["wan" if model is WAN else "flux"]
    steps = peak(replace(model, encode=0, decode=0, feature=0), start, work) - model.trunk - model.codec
    coding = peak(replace(model, token=0, rotary=0), start, work)
    assert steps > 0.1 * GB
    assert peak(model, start, work) < coding + steps <= peak(replace(model, graphs=True), start, work)


def test_the_memory_model_knows_how_many_graphs_are_kept():
    assert memory.GRAPHS == execute.KEPT


def test_position_tables_are_counted():
    assert WAN.rotary == ROTARY_KEPT * 4 * 128
    tokens = 9 * (480 // 16) * (832 // 16)
    sampling = replace(WAN, encode=0, decode=0)
    assert peak(sampling, START["wan"], CLIP) - peak(replace(sampling, rotary=0), START["wan"], CLIP) == tokens * WAN.rotary


def test_the_small_version_of_a_tiled_picture_counts_where_it_is_larger_than_a_tile():
    few = replace(FLUX, few_sizes=True)
    way, work = Fallback(272, 0, "pixel", at_once=1), Work(1, 1, 2048, 2048)
    assert peak(few, way, work) == peak(few, replace(way, tile=320), work) > peak(FLUX, way, work)
