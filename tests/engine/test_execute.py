"""However a plan is run, its result is that of the plain sampler; graphs serve all prompts of a size; failures are told once."""

import gc
import os
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.compiler.config as compiler_config

from ebr_engine import Restorer
from ebr_engine.backbones.layers import ROTARY_KEPT
from ebr_engine.bridge.sampler import draw_noise
from ebr_engine.engine import execute as runner
from ebr_engine.engine.execute import Graphs, Runner, Tiling
from ebr_engine.errors import EngineError, EngineWarning
from ebr_engine.kernels import backend
from ebr_engine.media.tiling import plan_tiles
from tests.engine.test_graphs import CallAgain
from tests.tiny import make_prompt


def latent(height=6, width=10, batch=1):
    return torch.randn(batch, 192, 1, height, width, generator=torch.Generator().manual_seed(7))


def noise_for(degraded):
    return draw_noise(degraded.shape, 42)


def recorded(restorer, most=8):
    recorder = CallAgain()
    return Runner(restorer.backbone, "auto", graphs=Graphs(recorder, most)), recorder


def run(one, plan, degraded, **how):
    with torch.no_grad():
        return one.run(plan, degraded, noise_for(degraded), **how)


def test_a_recorded_run_is_the_plain_run_for_every_prompt_seed_and_picture(restorer):
    graphs, recorder = recorded(restorer)
    plans = [restorer.plan(prompt=make_prompt(seed)) for seed in range(2)]
    for plan in (*plans, plans[0]):  # back to the first one: its tables were overwritten
        for degraded in (latent(), 0.5 * latent()):
            assert torch.equal(run(graphs, plan, degraded), run(restorer.runner, plan, degraded))
    assert recorder.recorded == 1
    assert not torch.equal(run(graphs, plans[0], latent()), run(graphs, plans[1], latent()))


def test_plans_are_not_changed_by_the_graphs_that_read_them(restorer):
    graphs, _ = recorded(restorer)
    first, second = (restorer.plan(prompt=make_prompt(seed)) for seed in range(2))
    before = first.tables[0].prompt_key.clone()
    run(graphs, first, latent())
    run(graphs, second, latent())
    assert torch.equal(first.tables[0].prompt_key, before)


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": make_prompt(1, tokens=6)},
        {"prompt": make_prompt(1), "steps": 3},
        {"prompt": make_prompt(1), "t0": 0.3},
        {"prompt": [make_prompt(), make_prompt(1)], "mix": "velocity"},
        {"prompt": make_prompt(1), "order": 1},
    ],
)
def test_other_work_is_another_graph(restorer, other):
    graphs, recorder = recorded(restorer)
    for plan in (restorer.plan(prompt=make_prompt()), restorer.plan(**other)):
        assert torch.equal(run(graphs, plan, latent()), run(restorer.runner, plan, latent()))
    assert recorder.recorded == 2


def test_shapes_and_batches_are_graphs_of_their_own_that_share_the_tables(restorer):
    graphs, recorder = recorded(restorer)
    plan = restorer.plan(prompt=make_prompt())
    for degraded in (latent(), latent(8, 8), latent(batch=2), latent()):
        assert torch.equal(run(graphs, plan, degraded), run(restorer.runner, plan, degraded))
    assert recorder.recorded == 3
    assert len(graphs._tables) == 1


def test_a_graph_keeps_the_positions_that_it_reads(restorer):
    graphs, recorder = recorded(restorer)
    plan, trunk = restorer.plan(prompt=make_prompt()), restorer.backbone.trunk
    result = run(graphs, plan, latent())
    read = weakref.ref(restorer.backbone.prepare(latent(7, 11), plan.tables[0][0])[0])  # the moved grid is a cell larger
    for side in range(1, 2 * ROTARY_KEPT):
        trunk.rotary((1, 1, side), torch.device("cpu"))
    gc.collect()
    assert all(table is not read() for tables in trunk._rotary.values() for table in tables)
    assert read() is not None
    assert torch.equal(run(graphs, plan, latent()), result)
    assert recorder.recorded == 1
    graphs.graphs = None
    gc.collect()
    assert read() is None


def test_in_tiles_every_step_is_a_graph_for_groups_of_one_size(restorer):
    graphs, recorder = recorded(restorer)
    plan, heard = restorer.plan(prompt=make_prompt()), []
    for height in (16, 24):  # three tiles and five: groups of three both times
        degraded = latent(height - 1, 7)  # a moved grid is one cell larger
        tiling = Tiling(plan_tiles(height, 8, 8, 4, 1), 4)
        assert len(tiling.tiles) in (3, 5)
        result = run(graphs, plan, degraded, tiling=tiling, callback=lambda *step: heard.append(step))
        expected = run(restorer.runner, plan, degraded, tiling=tiling)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert recorder.recorded == len(plan.table)
    assert heard == [(3 * i, 15) for i in range(1, 6)] + [(5 * i + n, 25) for i in range(5) for n in (3, 5)]


def test_a_run_that_is_one_graph_is_heard_of_once(restorer):
    graphs, heard = recorded(restorer)[0], []
    run(graphs, restorer.plan(prompt=make_prompt()), latent(), callback=lambda *step: heard.append(step))
    assert heard == [(5, 5)]


def test_warming_up_meets_the_solvers_differences_in_few_steps(restorer):
    evaluated = []
    plan = restorer.plan(prompt=make_prompt(), steps=12)
    graphs, _ = recorded(restorer)
    backbone = graphs.backbone
    graphs.backbone = SimpleNamespace(
        velocity=lambda *given: evaluated.append(1) or backbone.velocity(*given), prepare=backbone.prepare, codec=backbone.codec
    )
    run(graphs, plan, latent())
    assert len(evaluated) == runner.WARM_STEPS + 12 + 12  # warm, recorded, replayed
    assert any(plan.first(runner.WARM_STEPS).steps.differences)


def test_what_cannot_be_recorded_runs_plainly_and_is_told_once(restorer):
    def broken(function, warm):
        raise RuntimeError("operation failed due to\na previous error during capture")

    one = Runner(restorer.backbone, "auto", graphs=Graphs(broken))
    plan = restorer.plan(prompt=make_prompt())
    assert one.static((4, 6), plan)
    with pytest.warns(EngineWarning, match=r"CUDA graphs are left out.* a previous error") as told:
        results = [run(one, plan, latent()) for _ in range(3)]
    assert len(told) == 1
    assert all(torch.equal(result, run(restorer.runner, plan, latent())) for result in results)
    assert not one.static((4, 6), plan)


def test_a_compiler_that_fails_is_told_once_and_the_result_is_there(restorer, monkeypatch):
    def broken(trunk):
        def run(latent, step):
            raise RuntimeError("No working C++ compiler found")

        return run

    monkeypatch.setattr(runner, "compile_trunk", broken)
    one, plan = Runner(restorer.backbone, "on"), restorer.plan(prompt=make_prompt())
    with pytest.warns(EngineWarning, match=r"not compiled: No working C\+\+ compiler") as told:
        results = [run(one, plan, latent()) for _ in range(2)]
    assert len(told) == 1
    assert torch.equal(results[0], run(restorer.runner, plan, latent()))
    assert not one.static((4, 6), plan)


def test_auto_compiles_for_the_sizes_that_come_often_enough_to_pay(restorer, monkeypatch):
    monkeypatch.setattr(runner, "compile_trunk", lambda trunk: trunk)
    monkeypatch.setattr(Runner, "_evaluation_seconds", lambda self, cells, plan: 0.01 * cells[0])
    plan = restorer.plan(prompt=make_prompt(), steps=5)
    enough = {cells: round(runner.COMPILE_SECONDS / runner.COMPILE_SHARE / (5 * 0.01 * cells[0])) for cells in ((4, 6), (40, 6))}
    assert enough[4, 6] == 10 * enough[40, 6]
    for mode, times, compiled in (("auto", 1.01, True), ("auto", 0.99, False), ("off", 1000, False)):
        one = Runner(restorer.backbone, mode)
        for cells, count in enough.items():
            one.expect([cells] * round(count * times))
        assert {one.static(cells, plan) for cells in enough} == {compiled}
        assert not one.static((8, 8), plan)  # nobody expects it


def test_the_time_that_compiling_took_decides_of_the_next_size(restorer, monkeypatch):
    monkeypatch.setattr(runner, "compile_trunk", lambda trunk: trunk)
    monkeypatch.setattr(Runner, "_evaluation_seconds", lambda self, cells, plan: 1.0)
    one, plan = Runner(restorer.backbone, "auto"), restorer.plan(prompt=make_prompt(), steps=5)
    one.expect([(6, 10)] * 10**4 + [(6, 6)] * 4)
    assert one.static((6, 10), plan)
    run(one, plan, latent())
    assert one.compile_seconds < 1
    assert one.static((6, 6), plan)  # too few for what was guessed, but not for what was measured


def test_what_cannot_be_compiled_is_refused_when_it_is_asked_for(restorer):
    with pytest.raises(EngineError, match=r"blocks .* leave compile at auto"):
        Runner(restorer.backbone, "on", offloads=True)
    exported = SimpleNamespace(trunk=lambda *_: None, device=torch.device("cpu"))
    with pytest.raises(EngineError, match="exported"):
        Runner(exported, "on")
    one = Runner(exported, "auto")
    one.expect([(4, 6)] * 10**6)
    assert not one.static((4, 6), None)
    with pytest.raises(EngineError, match="unknown compile 'yes'"):
        Restorer(compile="yes")


class Counted:
    """A backend of torch.compile that runs what it is given, and counts how often that is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


def test_one_compilation_serves_all_steps_prompts_and_seeds_of_a_shape(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    counted, compile = Counted(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options=None, **how: compile(module, backend=counted, **how))
    engine = Restorer(model=weights, device="cpu", precision="fp32", compile="on")
    plain = Restorer(model=weights, device="cpu", precision="fp32", compile="off")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        for seed, size in ((1, (24, 40)), (2, (24, 40)), (3, (40, 24)), (4, (24, 40)), (5, (40, 24))):
            image = torch.rand(3, *size)
            for plan_seed in range(2):
                result = engine.restore(image, prompt=make_prompt(plan_seed), seed=seed)
                expected = plain.restore(image, prompt=make_prompt(plan_seed), seed=seed)
                torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert counted.graphs == 2  # a shape each
    torch.compiler.reset()


def test_the_compilers_cache_is_ours_unless_the_user_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    with compiler_config.patch(cache_key_tag=""):
        backend.keep_compiled()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        backend.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


def test_what_the_compiler_kept_of_other_gradients_is_not_found(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    with compiler_config.patch(cache_key_tag="the user's own"):
        backend.keep_compiled()
        backend.keep_compiled()
        assert compiler_config.cache_key_tag == "the user's own" + backend.operations_tag()
        monkeypatch.setattr(backend, "operations_tag", lambda: " of another state")
        backend.keep_compiled()
        assert compiler_config.cache_key_tag.endswith(" of another state")
