"""The GPU check's sections run at toy sizes on a CPU and see what is wrong."""

import math
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import clock, gpu, gpu_cases, gpu_codecs, gpu_kernels, gpu_models, gpu_sizes
from ebr_engine.kernels import scaled_linear

pytestmark = pytest.mark.usefixtures("undone")
CPU = torch.device("cpu")
# Of kernels/, no operations themselves.
OF_A_CPU = {
    "learned_linear",
    "convolution",
    "cpu",
    "cpu_channels",
    "cpu_views",
    "gelu",
    "norm_gradients",  # its sums; on a GPU formulas
    "int8_linear",
    "packed_linear",
    "rms_norm",
    "tune",
}  # native code there, torch's elsewhere
HELPERS = {
    "__init__",
    "gate",
    "backend",
    "rows",
    "heads",
    "tiles",
    "cuda",
    "prompt_attention_gradient",
    "qk_norm_rope_gradient",
    "rotary",
}


def test_every_operation_is_checked_against_float64_in_both_precisions(run):
    gpu_kernels.kernels(run)
    rows = run.rows()
    assert not [row for row in rows if not row.get("ok")]
    operations = {path.stem for path in (gpu.ROOT / "kernels").glob("*.py")} - HELPERS - OF_A_CPU
    assert {row["operation"].split()[0] for row in rows} == operations
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    results = {row["result"] for row in rows}
    assert {"output 0", "gradient of x", "gradient of qkv", "gradient of prompt_weight", "bits, against a CPU's"} <= results
    narrow = [row["error"] for row in rows if row["dtype"] == "bfloat16" and row["operation"] == "layer_norm_modulate"]
    assert all(1e-4 < error < 1e-2 for error in narrow)  # rounded once, and not compared with itself


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * 1.01, lambda x: x.masked_fill(torch.arange(x.numel()).view_as(x) == 5, math.nan), lambda x: x[:, 1:]],
)
def test_a_wrong_kernel_is_seen(wrong):
    (case, *_) = gpu_cases.norms(gpu_sizes.ODD, gpu_sizes.Draw(CPU, torch.bfloat16))
    good = [row["ok"] for row in gpu_kernels.compared(replace(case, learned=()))]
    bad = replace(case, learned=(), function=lambda **inputs: wrong(case.function(**inputs)))
    assert good == [True]
    assert [row["ok"] for row in gpu_kernels.compared(bad)] == [False]


def test_a_wrong_gradient_and_a_wrong_bit_are_seen():
    draw = gpu_sizes.Draw(CPU, torch.bfloat16)
    case = gpu_cases.norms(gpu_sizes.ODD, draw)[0]

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    bad = replace(case, function=lambda **inputs: case.function(**inputs | {"x": Halved.apply(inputs["x"])}))
    assert [row["ok"] for row in gpu_kernels.compared(bad)] == [True, False]

    def one_off(x):
        quantized = case.function(x)
        quantized.values.view(torch.uint8)[0, 0, 0] ^= 1
        return quantized

    case = gpu_cases.quantised(gpu_sizes.ODD, draw)[0]
    assert [row["ok"] for row in gpu_kernels.compared(case)] == [True, True]
    assert [row["ok"] for row in gpu_kernels.compared(replace(case, function=one_off))] == [True, False]


def test_operations_are_timed_beside_their_peers(run, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "ODD", gpu_sizes.ODD)
    gpu_kernels.ops(run, ("layer_norm_modulate", "prompt_attention"))
    ceilings, *rows = run.rows()
    assert ceilings["bandwidth"] > 0
    assert not [row for row in rows if any("failed" in key or key == "error" for key in row)]
    (row,) = (row for row in rows if row["operation"] == "prompt_attention")
    assert row["library"].startswith("two calls")
    assert row["x library"] == pytest.approx(row["library ms"] / row["ours ms"])
    assert row["share"] == pytest.approx(row["floor ms"] / row["ours ms"])
    (row,) = (row for row in rows if row["operation"] == "layer_norm_modulate" and row["sizes"] == "small")
    small = gpu_sizes.SMALL
    moved = 2 * 2 * small.tokens * small.width + 2 * 4 * small.width  # x and y in bf16, two tables in float32
    assert row["GB/s"] * row["ours ms"] * 1e6 == pytest.approx(moved)


def test_a_compiled_form_is_timed(run):
    (case, *_) = gpu_cases.norms(gpu_sizes.SMALL, gpu_sizes.Draw(CPU, torch.bfloat16))
    row = gpu_kernels.timed(run, case, gpu_sizes.SMALL, clock.ceilings(CPU), compile_too=True)
    assert row["compiled ms"] > 0


def test_a_form_that_fails_leaves_the_others(run):
    (case, *_) = gpu_cases.norms(gpu_sizes.SMALL, gpu_sizes.Draw(CPU, torch.bfloat16))
    broken = replace(case, library={"broken": lambda **_: 1 / 0})
    row = gpu_kernels.timed(run, broken, gpu_sizes.SMALL, clock.ceilings(CPU), compile_too=False)
    assert "ZeroDivisionError" in row["library failed"]
    assert row["ours ms"] > 0


@pytest.mark.parametrize("model", ["wan-1.3b", "flux-dev"])
def test_every_form_of_a_step_computes_the_same(run, model):
    gpu_models.steps(run, model)
    rows = {(row["form"], row["precision"]): row for row in run.rows()}
    assert not [row for row in rows.values() if "error" in row]
    for (form, precision), row in rows.items():
        assert row["ms"] > 0
        if "restoration" not in form:
            assert row["RMS from first"] < (0.1 if precision == "fp8" else 0.02), form
    forms = ["step, eager", "step, eager, CUDA graph", "restoration, fast, 5 evaluations", "step, compiled blocks"]
    forms.append("step, compiled blocks, CUDA graph")
    assert set(rows) == {(form, precision) for form in forms for precision in ("bf16", "fp8")}


@pytest.mark.parametrize("model", ["wan-1.3b", "flux-dev"])
def test_a_step_is_that_of_diffusers_modules(run, model):
    gpu_models.peers(run, model)
    rows = {row["form"]: row for row in run.rows()}
    assert not [row for row in rows.values() if "error" in row]
    assert rows["diffusers, released, eager"]["RMS from first"] == 0
    assert 0 < rows["step, eager"]["RMS from first"] < 0.02
    assert {"diffusers, released, compiled blocks", "step, compiled blocks, CUDA graph"} < set(rows)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_codec_is_timed_and_held_to_float32(run, name):
    gpu_codecs.codec(run, name)
    *rows, compared = run.rows()
    encode, decode, *theirs = rows
    assert [row["form"] for row in theirs] == ["encode, diffusers", "decode, diffusers"]
    assert all(row["ms"] > 0 for row in rows)
    assert encode["form"] == "encode"
    assert decode["megapixels a second"] > 0
    assert 0 < compared["RMS, pixels"] < gpu_codecs.ROUNDING
    assert compared["ok"]


@pytest.mark.parametrize("model", ["wan-1.3b", "flux-dev"])
def test_a_prompt_is_learned(run, model):
    gpu_models.train(run, model)
    (row,) = run.rows()
    assert row["form"] == "all activations kept"
    assert 0 < row["loss"] < 100


def test_a_model_that_does_not_fit_is_learned_with_checkpointed_blocks(run, monkeypatch):
    learned, tried = gpu_models.learned, []

    def out_of_memory_once(*arguments):
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("too large")
        return learned(*arguments)

    monkeypatch.setattr(gpu_models, "learned", out_of_memory_once)
    gpu_models.train(run, "wan-1.3b")
    first, second = run.rows()
    assert "memory" in first["error"]
    assert second["form"] == "checkpointed blocks"
    assert second["loss"] > 0


def test_linears_are_compared_and_the_choice_is_written(run, tmp_path):
    gpu_kernels.linears(run)
    *rows, written = run.rows()
    assert not [row for row in rows if "error" in row or "failed" in row]
    assert {row["layer"] for row in rows} == {"qkv", "out", "up", "down", "single out"}
    assert written["written"] == str(tmp_path / "scaled_linear_cpu.json")
    read = scaled_linear.choices("cpu", tmp_path)  # as the operation reads it from its own folder
    assert len(read) == len(rows)
    for row in rows:
        ending = "gelu_fp8" if row["layer"] == "up" else "none"
        assert read[64, row["k"], row["n"], ending] == row["fastest"]


def test_what_fails_is_a_row_and_what_has_no_time_too(run):
    with run.guarded(operation="x"):
        raise ValueError("first line\nsecond line")
    run.deadline = time.monotonic() + 5
    assert run.left(1, operation="y")
    assert not run.left(10, operation="z")
    assert run.rows() == [{"operation": "x", "error": "ValueError: first line"}, {"operation": "z", "error": "left out: no time"}]


def test_an_error_is_measured_relative_and_nan_is_none():
    one = torch.ones(4)
    assert clock.relative_rms(one * 1.5, one) == 0.5
    assert clock.relative_rms(torch.full((4,), math.nan), one) is None
    assert clock.relative_rms(torch.ones(5), one) is None


@pytest.mark.parametrize("model", ["wan-1.3b", pytest.param("flux-dev", marks=pytest.mark.slow)])
def test_every_form_of_a_run_computes_the_same_with_one_graph_for_all_prompts(run, model):
    gpu_models.graphs(run, model)
    rows = {row["form"]: row for row in run.rows()}
    assert list(rows) == ["plain", "captured", "compiled, captured", "blocks compiled, captured"]
    assert not [row for row in rows.values() if "error" in row]
    assert all(row["ok"] for form, row in rows.items() if form != "plain")
    assert rows["captured"]["bits"]
    assert rows["captured"]["graphs"] == 1
