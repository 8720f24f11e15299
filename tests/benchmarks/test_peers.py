"""The ladder runs for every case, tells the same work from less of it, and says why a rung is missing."""

import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from benchmarks import peers
from benchmarks.models import random_model, work_of
from benchmarks.report import spread
from ebr_engine.bridge.sampler import make_table
from ebr_engine.kernels import backend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Text and numbers of the quick form on all cases."""
    file = tmp_path_factory.mktemp("peers") / "peers.json"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        peers.main(["--quick", "--case", *peers.CASES, "--json", str(file)])
    return SimpleNamespace(text="\n".join(lines), result=json.loads(file.read_text()))


def test_every_case_climbs_the_ladder(quick):
    assert [case["case"] for case in quick.result["cases"]] == list(peers.CASES)
    for case in quick.result["cases"]:
        assert case["skipped"] == {}
        names = [rung["rung"] for rung in case["rungs"]]
        assert names[0] == "released: diffusers, eager"
        assert names[-1] == "+ second order (fast)"
        assert ("+ equal text rows merged" in names) == (case["case"] != "flux-dev")  # all of FLUX's text rows differ
        assert all(name in quick.text for name in names)


def test_the_same_work_gives_the_released_result(quick):
    for case in quick.result["cases"]:
        for rung in case["rungs"]:
            if rung["evaluations"] == 3:
                assert rung["rms_difference"] < 1e-5, (case["case"], rung["rung"])
        assert case["rungs"][0]["rms_difference"] == case["rungs"][0]["largest_difference"] == 0
        assert 1e-6 < case["rungs"][-2]["rms_difference"] < 1e-3  # one evaluation less, at t = 1e-4
        assert case["rungs"][-1]["rms_difference"] > 1e-2  # three coarse steps are not five fine ones


def test_gains_multiply(quick):
    for case in quick.result["cases"]:
        product = 1.0
        for rung in case["rungs"]:
            assert rung["seconds"]["median"] > 0
            if rung["aside"]:
                assert rung["total_gain"] == pytest.approx(product * rung["gain"])
                continue
            product *= rung["gain"]
            assert rung["total_gain"] == pytest.approx(product)


def test_fast_comes_nearer_to_the_converged_solution_than_three_released_steps(quick):
    (mini,) = (case for case in quick.result["cases"] if case["case"] == "mini")
    assert [row["task"] for row in mini["accuracy"]] == ["haze", "rain", "snow", "blur", "lowlight"]
    for row in mini["accuracy"]:
        assert row["fast"]["distance"] < row["released"]["distance"]
        assert 5 < row["fast"]["psnr"] < 40


def test_the_machine_is_told(quick):
    for word in (quick.result["commit"], version("torch"), quick.result["date"]):
        assert word in quick.text
    assert quick.result["device"] == "cpu"


@pytest.mark.slow
def test_other_runtimes_stand_aside_with_the_same_result():
    case = random_model(work_of("wan-width", True), CPU, torch.float32).add_transformer()
    found = {rung["rung"]: rung for rung in peers.climb(case, "wan-width", 3, 1, False, others=True)["rungs"]}
    aside = [name for name, rung in found.items() if rung["aside"]]
    assert "ours, by ONNX Runtime" in aside
    assert all(found[name]["rms_difference"] < 1e-5 for name in aside)


def test_a_rung_that_fails_is_skipped_with_its_reason(monkeypatch):
    def ladder(*_):
        yield peers.Rung("first", lambda: torch.ones(2), 2)
        yield peers.Rung("second", lambda: torch.compiler_is_missing, 2)
        yield peers.Rung("third", lambda: torch.full((2,), 3.0), 1)

    monkeypatch.setattr(peers, "ladder", ladder)
    monkeypatch.setattr(peers, "bake_seconds", lambda *_: spread([1.0]))
    case = SimpleNamespace(degraded=torch.ones(1, 2), device=CPU, dtype=torch.float32, t0=0.4)
    result = peers.climb(case, "mini", 2, 3, True)
    assert [rung["rung"] for rung in result["rungs"]] == ["first", "third"]
    assert "AttributeError" in result["skipped"]["second"]
    assert "skipped second" in peers.case_table(result)
    assert result["rungs"][1]["rms_difference"] == pytest.approx(2)
    assert result["rungs"][1]["largest_difference"] == 2
    assert len(result["rungs"][0]["seconds"]["all"]) == 3


def test_plain_rungs_keep_our_kernels_out():
    seen = []

    def run():
        seen.append(backend.ASKED)
        return torch.zeros(1)

    before = backend.ASKED
    peers.Rung("x", run, 1, plainly=True)()
    peers.Rung("x", run, 1)()
    assert seen == ["torch", before]
    assert before == backend.ASKED


def test_every_row_and_merged_rows_are_the_same_attention(relative_rms):
    case = random_model(work_of("wan-width", tiny=True), CPU, torch.float32)
    merged = case.bake(case.timesteps(make_table("released", case.t0, 3), released=True))
    every = case.every_row(merged)
    assert merged.text_key.shape[3] == 2
    assert every.text_key.shape[3] == 226
    with torch.no_grad():
        assert relative_rms(case.trunk(case.degraded, every[0]), case.trunk(case.degraded, merged[0])) < 1e-5


def test_bf16_keeps_the_modules_that_diffusers_keeps():
    case = random_model(work_of("wan-width", tiny=True), CPU, torch.bfloat16).add_transformer()
    kept = {name for name, parameter in case.transformer.named_parameters() if parameter.dtype == torch.float32}
    assert {name.split(".")[0] for name in kept} == {"scale_shift_table", "condition_embedder", "blocks"}
    assert "blocks.0.attn1.to_q.weight" not in kept
    assert {parameter.dtype for parameter in case.trunk.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in case.transformer.rope.buffers()} == {torch.float32}


def test_full_size_cases_have_the_real_widths():
    assert work_of("wan-width").config.width == work_of("wan-1.3b").config.width == 1536
    assert work_of("wan-width").config.num_layers == 4
    assert work_of("wan-1.3b").config.num_layers == 30
    assert (work_of("flux-dev").config.num_layers, work_of("flux-dev").config.width) == (19, 3072)


@pytest.mark.slow
def test_both_sides_compile_and_compute_the_same():
    case = random_model(work_of("wan-width", tiny=True), CPU, torch.float32).add_transformer()
    result = peers.climb(case, "wan-width", 3, 1, compiled=True)
    names = {rung["rung"]: rung["rms_difference"] for rung in result["rungs"]}
    if result["skipped"]:
        pytest.skip(f"not compiled here: {result['skipped']}")
    assert names["released: diffusers, torch.compile"] < 1e-5
    assert names["+ torch.compile"] < 1e-5


@pytest.mark.parametrize(
    "arguments", [["--steps", "1"], ["--rounds", "0"], ["--size", "30"], ["--case", "sora"], ["--device", "cuda:99"]]
)
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        peers.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_name_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        peers.main(["--runtimes", "--case", "wan-1.3b"])
    assert "there is no wan-1.3b; there are mini-256, mini-512, wan-width" in capsys.readouterr().err
