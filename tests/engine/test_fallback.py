"""When memory runs out, a run goes on with less; where it is limited, a way that fits is taken from the start."""

from dataclasses import replace

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.backbones.registry import named_config, spec
from ebr_engine.engine.costs import costs
from ebr_engine.engine.fallback import Fitting, load_with_offload
from ebr_engine.engine.memory import Fallback, Work, fallbacks, peak
from ebr_engine.engine.run import TILES_AT_ONCE
from ebr_engine.errors import EngineError, EngineWarning

SIDE = 136


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, SIDE, SIDE + 24, generator=torch.Generator().manual_seed(3))


class Exhausted:
    """A velocity function that runs out of memory for its first `times` runs, as torch does, and then computes."""

    def __init__(self, velocity, times, error):
        self.velocity, self.left, self.error = velocity, times, error
        self.shapes = []

    def __call__(self, latent, step):
        if self.left:
            self.left -= 1
            raise self.error
        self.shapes.append(tuple(latent.shape))
        return self.velocity(latent, step)


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "error", [CPU, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("std::bad_alloc")]
)
def test_out_of_memory_steps_down_says_so_and_goes_on(picture, monkeypatch, times, error):
    monkeypatch.setitem(TILES_AT_ONCE, "cpu", 4)
    restorer = Restorer("mini", precision="fp32")
    plan = restorer.plan("rain", steps=1, supersample=1)
    alone = restorer.restore(picture, plan=plan, tile=64, tile_overlap=16)
    exhausted = Exhausted(restorer.backbone.velocity, times, error)
    monkeypatch.setattr(restorer.backbone, "velocity", exhausted)
    with pytest.warns(EngineWarning, match="not enough memory") as told:
        restored = restorer.restore(picture, plan=plan, tile=64, tile_overlap=16)
    assert len(told) == times
    assert f"{2 // times} at once" in str(told[-1].message)
    torch.testing.assert_close(restored, alone, atol=1e-4, rtol=0)
    again = restorer.restore(picture, plan=plan, tile=64, tile_overlap=16)  # begins where it got to, without a word
    assert len(told) == times
    torch.testing.assert_close(again, alone, atol=1e-4, rtol=0)


def test_what_never_fits_is_an_error_after_the_smallest_way_was_tried(picture, monkeypatch):
    restorer = Restorer("mini", precision="fp32")
    exhausted = Exhausted(restorer.backbone.velocity, 99, CPU)
    monkeypatch.setattr(restorer.backbone, "velocity", exhausted)
    with pytest.warns(EngineWarning, match="tiles of 128 pixels"), pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        restorer.restore(picture, "rain", steps=1, supersample=1)
    assert exhausted.left == 97  # in one piece, and in tiles: nothing else needs less for so small a picture


def test_another_error_is_no_reason_to_try_again(picture, monkeypatch):
    restorer = Restorer("mini", precision="fp32")
    exhausted = Exhausted(restorer.backbone.velocity, 99, RuntimeError("a bug"))
    monkeypatch.setattr(restorer.backbone, "velocity", exhausted)
    with pytest.raises(RuntimeError, match="a bug"):
        restorer.restore(picture, "rain", steps=1, supersample=1)
    assert exhausted.left == 98


def test_a_limit_chooses_the_way_and_the_least_that_would_do_is_told(picture, monkeypatch):
    monkeypatch.setitem(TILES_AT_ONCE, "cpu", 4)
    free = Restorer("mini", precision="fp32")
    start, work = Fallback(64, 16), Work(1, 1, SIDE, SIDE + 24)
    need = peak(free.engine.costs, start, work)
    limited = Restorer("mini", precision="fp32", max_memory=need - 1)
    shapes = []
    velocity = limited.backbone.velocity
    limited.backbone.velocity = lambda latent, step: shapes.append(latent.shape[0]) or velocity(latent, step)
    restored = limited.restore(picture, "rain", steps=1, supersample=1, tile=64, tile_overlap=16)
    assert max(shapes) < 4  # tiles at once
    expected = free.restore(picture, "rain", steps=1, supersample=1, tile=64, tile_overlap=16)
    torch.testing.assert_close(restored, expected, atol=1e-4, rtol=0)
    small = Restorer("mini", precision="fp32", max_memory="1M")
    with pytest.raises(EngineError, match=r"need .* MB at least, more than the 1 MB"):
        small.restore(picture, "rain", steps=1, supersample=1)


def tried(fitting, rungs, model, work, refused):
    """The first rung that is not refused, as a run finds it."""
    index = fitting.choose(rungs, model, work)
    while rungs[index] in refused:
        lower = fitting.next(rungs, model, work, index)
        fitting.descend(rungs, lower, work)
        index = lower
    return rungs[index]


def test_what_a_long_clip_has_taught_holds_for_its_other_chunks_and_for_pictures_until_the_next_file():
    model = costs(spec("wan"), named_config("wan-1.3b"), "bf16", "cuda")
    start = Fallback(832, 64, frames=33)
    clip, picture = fallbacks(start, model), fallbacks(replace(start, frames=1), model)
    work, one = Work(1, 33, 2160, 3840), Work(1, 1, 2160, 3840)
    fitting = Fitting()
    with pytest.warns(EngineWarning):
        assert tried(fitting, clip, model, work, clip[:-1]) == clip[-1]
    assert len(picture) < len(clip)
    assert picture[fitting.choose(picture, model, one)] == picture[-1]
    assert fitting.seen == str(clip[-1])
    fitting.begin()
    after = clip[fitting.choose(clip, model, work)]
    assert (after.tile, after.frames, after.blend, after.offload) == (832, 33, "latent", "blocks")  # what nobody sees is kept
    assert fitting.seen == ""
    fitting = Fitting()
    with pytest.warns(EngineWarning):
        tried(fitting, picture, model, one, picture[:1])
    after = clip[fitting.choose(clip, model, work)]
    assert after != clip[0]
    assert (after.tile, after.frames) == (832, 33)  # a picture says nothing of a clip's frames


def test_low_memory_changes_no_tile():
    restorer = Restorer("mini", low_memory=True)
    rungs, work = restorer.engine.fallbacks((1, 3, 1, 900, 900), None, None, "latent")
    chosen = rungs[restorer.engine.fitting.choose(rungs, restorer.engine.costs, work)]
    assert (chosen.tile, chosen.blend, chosen.at_once) == (512, "pixel", 1)


def test_pictures_that_do_not_fit_together_run_one_by_one(monkeypatch):
    restorer = Restorer("mini", precision="fp32")
    pictures = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    plan = restorer.plan("rain", steps=2)
    together = restorer.restore(pictures, plan=plan)
    exhausted = Exhausted(restorer.backbone.velocity, 1, CPU)
    monkeypatch.setattr(restorer.backbone, "velocity", exhausted)
    steps = []
    with pytest.warns(EngineWarning):
        apart = restorer.restore(pictures, plan=plan, callback=lambda done, total: steps.append((done, total)))
    assert {shape[0] for shape in exhausted.shapes} == {1}
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
    assert steps == [(i + 1, 6) for i in range(6)]


def test_the_tables_of_a_run_survive_a_move_of_the_codec():
    restorer = Restorer("mini", precision="fp32")
    clip = torch.rand(1, 3, 32, 32)
    plan = restorer.plan("rain", t0=0.05, steps=2)
    before = restorer.run(clip, plan)
    restorer.engine.apply(Fallback(512, 64, offload="codec"))
    assert restorer.engine.offload == "codec"
    torch.testing.assert_close(restorer.run(clip, plan), before)
    restorer.engine.apply(Fallback(512, 64, offload="blocks"))
    assert restorer.engine.offload == "blocks"
    torch.testing.assert_close(restorer.run(clip, plan), before)


class Loading:
    """Runs out of memory while it loads, unless blocks wait on the CPU."""

    def __init__(self, error, fits=("blocks",)):
        self.error, self.fits, self.tried = error, fits, []

    def __call__(self, offload):
        self.tried.append(offload)
        if offload not in self.fits:
            raise self.error
        return offload


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")


def test_a_model_that_a_gpu_cannot_hold_is_loaded_with_its_blocks_on_the_cpu():
    load = Loading(FULL)
    with pytest.warns(EngineWarning, match=r"does not fit into the memory of cuda:0; its blocks wait on the CPU"):
        assert load_with_offload(load, torch.device("cuda:0"), "none", True) == "blocks"
    assert load.tried == ["none", "blocks"]


@pytest.mark.parametrize(
    ("device", "offload", "movable", "words"),
    [
        ("cpu", "none", True, "a smaller precision"),
        ("cuda:0", "blocks", True, "a smaller precision"),
        ("cuda:0", "codec", False, "offload blocks may fit"),
    ],
)
def test_a_model_that_fits_nowhere_is_a_clear_error(device, offload, movable, words):
    load = Loading(FULL, ())
    with pytest.raises(EngineError, match=f"not enough memory to load the model; {words}"):
        load_with_offload(load, torch.device(device), offload, movable)
    assert load.tried == [offload]


def test_other_errors_of_loading_are_themselves():
    with pytest.raises(RuntimeError, match="device-side assert"):
        load_with_offload(Loading(RuntimeError("device-side assert"), ()), torch.device("cuda:0"), "none", True)
