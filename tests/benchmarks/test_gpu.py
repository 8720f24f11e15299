"""The GPU check's sections run at toy sizes on a CPU, see what is wrong, and its parts survive each other's ends."""

import json
import math
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import clock, gpu, gpu_cases, gpu_kernels, gpu_models
from ebr_engine.kernels import backend, scaled_linear

CPU = torch.device("cpu")
TIME = ("--minutes", "80")  # enough on a busy machine
# Of kernels/, no operations themselves.
HELPERS = {"__init__", "gate", "backend", "rows", "heads", "tiles", "cuda", "prompt_attention_gradient"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A tiny run whose operations go through their registrations, as on a device; `rows()` reads what it kept."""
    monkeypatch.setattr(backend, "FORCED", True)
    one = clock.Run(CPU, True, time.monotonic() + 600, (tmp_path / "rows").open("w"), tmp_path)
    one.rows = lambda: [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    yield one
    one.file.close()


@pytest.fixture(autouse=True)
def undone():
    """What a section sets for its own process does not outlive a test of it."""
    yield
    if "torch._dynamo" in sys.modules:  # or it would be imported to be reset
        torch.compiler.reset()


def test_every_operation_is_checked_against_float64_in_both_precisions(run):
    gpu_kernels.kernels(run)
    rows = run.rows()
    assert not [row for row in rows if not row.get("ok")]
    operations = {path.stem for path in (gpu.ROOT / "kernels").glob("*.py")} - HELPERS - {"packed_linear"}  # a CPU's
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
    (case, *_) = gpu_cases.norms(gpu_cases.ODD, gpu_cases.Draw(CPU, torch.bfloat16))
    good = [row["ok"] for row in gpu_kernels.compared(replace(case, learned=()))]
    bad = replace(case, learned=(), function=lambda **inputs: wrong(case.function(**inputs)))
    assert good == [True]
    assert [row["ok"] for row in gpu_kernels.compared(bad)] == [False]


def test_a_wrong_gradient_and_a_wrong_bit_are_seen():
    draw = gpu_cases.Draw(CPU, torch.bfloat16)
    case = gpu_cases.norms(gpu_cases.ODD, draw)[0]

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

    case = gpu_cases.quantised(gpu_cases.ODD, draw)[0]
    assert [row["ok"] for row in gpu_kernels.compared(case)] == [True, True]
    assert [row["ok"] for row in gpu_kernels.compared(replace(case, function=one_off))] == [True, False]


def test_operations_are_timed_beside_their_peers(run, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "ODD", gpu_cases.ODD)
    gpu_kernels.ops(run, ("layer_norm_modulate", "prompt_attention"))
    ceilings, *rows = run.rows()
    assert ceilings["bandwidth"] > 0
    assert not [row for row in rows if any("failed" in key or key == "error" for key in row)]
    (row,) = (row for row in rows if row["operation"] == "prompt_attention")
    assert row["library"].startswith("two calls")
    assert row["x library"] == pytest.approx(row["library ms"] / row["ours ms"])
    assert row["share"] == pytest.approx(row["floor ms"] / row["ours ms"])
    (row,) = (row for row in rows if row["operation"] == "layer_norm_modulate" and row["sizes"] == "small")
    small = gpu_cases.SMALL
    moved = 2 * 2 * small.tokens * small.width + 2 * 4 * small.width  # x and y in bf16, two tables in float32
    assert row["GB/s"] * row["ours ms"] * 1e6 == pytest.approx(moved)


def test_a_compiled_form_is_timed(run):
    (case, *_) = gpu_cases.norms(gpu_cases.SMALL, gpu_cases.Draw(CPU, torch.bfloat16))
    row = gpu_kernels.timed(run, case, gpu_cases.SMALL, clock.ceilings(CPU), compile_too=True)
    assert row["compiled ms"] > 0


def test_a_form_that_fails_leaves_the_others(run):
    (case, *_) = gpu_cases.norms(gpu_cases.SMALL, gpu_cases.Draw(CPU, torch.bfloat16))
    broken = replace(case, library={"broken": lambda **_: 1 / 0})
    row = gpu_kernels.timed(run, broken, gpu_cases.SMALL, clock.ceilings(CPU), compile_too=False)
    assert "ZeroDivisionError" in row["library failed"]
    assert row["ours ms"] > 0


@pytest.mark.parametrize("model", ["wan-1.3b", "flux-dev"])
def test_every_form_of_a_step_computes_the_same(run, model):
    gpu_models.steps(run, model)
    rows = {(row["form"], row["precision"]): row for row in run.rows()}
    assert not [row for row in rows.values() if "error" in row]
    released = rows.pop(("diffusers, released, eager", "plain"))
    assert released["RMS from first"] == 0
    for (form, precision), row in rows.items():
        assert row["ms"] > 0
        if "restoration" not in form:
            assert row["RMS from first"] < (0.1 if precision == "fp8" else 0.02), form
    forms = {form for form, _ in rows}
    assert {"step, eager", "step, compiled blocks, CUDA graph", "restoration, fast, 5 evaluations"} <= forms
    assert ("step, compiled blocks", "fp8") in rows


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


# The command


def checked(tmp_path, *arguments):
    """The command's result file and page, and its exit status."""
    try:
        gpu.main(["--tiny", "--out", str(tmp_path), *arguments])
        status = 0
    except SystemExit as error:
        status = error.code
    (path,) = tmp_path.glob("gpu_*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text(), status


def test_the_command_runs_sections_and_goes_on_where_it_stopped(tmp_path, capfd):
    result, page, status = checked(tmp_path, "--sections", "build,linears,tests", *TIME)
    assert status == 0
    assert {name: section["status"] for name, section in result["sections"].items()} == dict.fromkeys(
        ("build", "linears", "tests"), "done"
    )
    assert result["tiny"]
    assert "no CUDA device" in page
    assert "| small | qkv | 64 |" in page
    assert "linears: Linear layers" in capfd.readouterr().out  # told as it goes
    again, _, status = checked(tmp_path, "--sections", "build,train-wan", "--resume", *TIME)
    assert status == 0
    assert list(again["sections"]) == ["build", "linears", "train-wan", "tests"]
    assert again["sections"]["linears"] == result["sections"]["linears"]
    assert again["sections"]["train-wan"]["rows"][0]["ms"] > 0


def test_a_section_that_dies_or_hangs_keeps_its_rows_and_the_next_one_runs(tmp_path, monkeypatch):
    write = "import json, sys, time; open(sys.argv[1], 'w').write(json.dumps({row}) + chr(10)); "
    row, late = (write.format(row=row) for row in ({"ok": 1}, {"error": gpu.NO_TIME}))
    sections = {"dies": row + "sys.exit(3)", "hangs": row + "time.sleep(60)", "is late": late, "ends": row}
    monkeypatch.setattr(gpu, "SECTIONS", {name: replace(gpu.SECTIONS["build"], seconds=3) for name in sections})
    monkeypatch.setattr(gpu, "SHORTEST", 0)
    monkeypatch.setattr(gpu, "GRACE", 0)
    command = gpu.subprocess.run

    def replaced(words, **settings):
        if "--worker" not in words:
            return command(words, **settings)
        name, file = words[4:6]
        return command([words[0], "-c", sections[name], file], **settings)

    monkeypatch.setattr(gpu.subprocess, "run", replaced)
    result, page, status = checked(tmp_path)
    assert status == 1
    statuses = {name: section["status"] for name, section in result["sections"].items()}
    assert statuses == {"dies": "failed: exit status 3", "hangs": "stopped after 3 s", "is late": "out of time", "ends": "done"}
    assert all(len(section["rows"]) == 1 for section in result["sections"].values())
    assert "exit status 3" in page


def test_without_time_sections_are_left_out(tmp_path):
    result, _, status = checked(tmp_path, "--sections", "kernels", "--minutes", "0.01")
    assert status == 1
    assert result["sections"]["kernels"]["status"] == "left out: no time"


def test_problems_are_failures_not_measured_errors_nor_what_was_left_out():
    rows = [{"error": 1e-3, "ok": True}, {"error": "left out: no time"}, {"error": "ValueError: x"}, {"error": 1.0, "ok": False}]
    assert gpu.problems({"status": "done", "rows": rows}) == rows[2:]
    assert gpu.problems({"status": "stopped after 3 s", "rows": []})


@pytest.mark.parametrize("arguments", [["--sections", "everything"], ["--minutes", "0"], ["--sections", "build,nothing"]])
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_a_device_it_says_so(tmp_path, monkeypatch):
    about = {"machine": {"cpu": {}, "cuda": [], "versions": {}}, "commit": "x", "date": "today"}
    monkeypatch.setattr(gpu, "about", lambda: about)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_every_section_exists():
    modules = {"gpu_kernels": gpu_kernels, "gpu_models": gpu_models}
    for section in gpu.SECTIONS.values():
        assert callable(getattr(modules[section.module], section.function))


@pytest.mark.parametrize("model", ["wan-1.3b", pytest.param("flux-dev", marks=pytest.mark.slow)])
def test_every_form_of_a_run_computes_the_same_with_one_graph_for_all_prompts(run, model):
    gpu_models.graphs(run, model)
    rows = {row["form"]: row for row in run.rows()}
    assert list(rows) == ["plain", "captured", "compiled", "compiled and captured"]
    assert not [row for row in rows.values() if "error" in row]
    assert all(row["ok"] for form, row in rows.items() if form != "plain")
    assert rows["captured"]["bits"]
    assert rows["captured"]["graphs"] == 1
