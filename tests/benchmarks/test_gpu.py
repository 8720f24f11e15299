"""The GPU check's sections run at toy sizes on a CPU, see what is wrong, and its parts survive each other's ends."""

import json
import math
import sys
import time
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from benchmarks import clock, gpu, gpu_cases, gpu_codecs, gpu_kernels, gpu_models, gpu_report, report
from ebr_engine.kernels import backend, scaled_linear

CPU = torch.device("cpu")
TIME = ("--minutes", "80")  # enough on a busy machine
# Of kernels/, no operations themselves.
OF_A_CPU = {
    "convolution",
    "cpu",
    "gelu",
    "int8_linear",
    "packed_linear",
    "rms_norm",
    "tune",
}  # native code there, torch's elsewhere
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


# The command


def checked(tmp_path, *arguments):
    """The command's result file and page, and its exit status."""
    try:
        gpu.main(["--tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work"), *arguments])
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
    assert list(again["sections"]) == ["train-wan", "linears", "build", "tests"]
    assert again["sections"]["linears"] == result["sections"]["linears"]
    assert again["sections"]["train-wan"]["rows"][0]["ms"] > 0


@pytest.fixture
def scripted(monkeypatch):
    """The check's sections are scripts: `scripted(name="python code")`; `row` in one writes a row."""

    def script(**codes):
        section = replace(next(iter(gpu.SECTIONS.values())), seconds=3)
        monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(codes, section))
        monkeypatch.setattr(gpu, "SHORTEST", 0)
        monkeypatch.setattr(gpu, "GRACE", 0)
        start = gpu.subprocess.Popen
        head = "import json, os, sys, time\nrow = lambda **x: print(json.dumps(x), file=open(sys.argv[1], 'a'))\n"

        def replaced(words, **settings):
            if "--worker" not in words:
                return start(words, **settings)
            name, file = words[4:6]
            return start([words[0], "-c", head + codes[name], file], **settings)

        monkeypatch.setattr(gpu.subprocess, "Popen", replaced)

    return script


def test_a_section_that_dies_or_hangs_keeps_its_rows_and_the_next_one_runs(tmp_path, scripted, capfd):
    late = f"row(error={gpu.NO_TIME!r})"
    scripted(dies="row(ok=1); sys.exit(3)", hangs="row(ok=1); time.sleep(60)", late=late, ends="row(ok=1)")
    result, page, status = checked(tmp_path)
    assert status == 1
    statuses = {name: section["status"] for name, section in result["sections"].items()}
    assert statuses == {"dies": "failed: exit status 3", "hangs": "stopped after 3 s", "late": "out of time", "ends": "done"}
    assert all(len(section["rows"]) == 1 for section in result["sections"].values())
    assert "exit status 3" in page
    assert "1 of 4 sections without a fault; faults in dies, hangs, late" in capfd.readouterr().out
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "work" / "gpu_cpu_tiny").glob("*.json")}
    assert files == result["sections"]


def test_a_section_whose_device_is_lost_goes_on_in_a_new_process(tmp_path, scripted):
    scripted(lost=f"again = os.path.exists(sys.argv[1]); row(ok=1, again=again); sys.exit(0 if again else {gpu.LOST})")
    result, _, status = checked(tmp_path)
    assert status == 0
    assert result["sections"]["lost"]["rows"] == [{"ok": 1, "again": False}, {"ok": 1, "again": True}]
    scripted(lost=f"row(ok=1); sys.exit({gpu.LOST})")
    result, _, status = checked(tmp_path)
    assert status == 1
    assert len(result["sections"]["lost"]["rows"]) == gpu.RESTARTS + 1


def test_what_began_before_the_device_was_lost_does_not_begin_again(run, monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "lost", lambda device: True)
    run.marks = (tmp_path / "begun").open("w")
    with pytest.raises(clock.DeviceLost):
        gpu_kernels.ops(run, ("attention",))
    run.marks.flush()
    assert len(run.rows()) == 2  # the ceilings and the operation
    monkeypatch.undo()
    again = clock.Run(
        CPU, True, time.monotonic() + 600, run.file, tmp_path, tmp_path, set((tmp_path / "begun").read_text().splitlines())
    )
    gpu_kernels.ops(again, ("attention",))
    _, first, *others = run.rows()
    assert [row.get("sizes") for row in (first, *others)] == ["small", None, "odd"]  # the ceilings are measured anew


def test_the_output_ends_with_what_matters_in_few_characters():
    rows = [{"operation": f"op {i}", "error": "RuntimeError: " + "x" * 300} for i in range(500)]
    rows += [{"model": "m", "form": f"form {i} " + "y" * 200, "ms": 1.5, "share": 0.5} for i in range(500)]
    section = {"status": "done", "seconds": 1.0, "commit": "c", "rows": rows}
    machine = {"cpu": {"name": "c", "cores": 1, "threads": 1}, "cuda": [{"name": "cuda:0", "description": "GPU"}], "versions": {}}
    result = {"machine": machine, "commit": "abc", "date": "d", "sources": "s", "driver": "1.2", "tiny": False}
    result["sections"] = {f"section {i}": section for i in range(20)} | {
        "good": {**section, "rows": [{"form": "step", "ms": 1.5, "share": 0.5}]}
    }
    titles = dict.fromkeys(result["sections"], "title")
    text = "\n".join(gpu_report.summary(result, titles))
    assert 6000 < len(text) <= gpu_report.LIMIT
    assert "commit abc" in text
    assert "cuda:0: GPU" in text
    assert "! section 0: operation op 0, error RuntimeError" in text
    assert "section 0: done" in text  # its medians too
    few = "\n".join(gpu_report.summary(result | {"sections": {"good": result["sections"]["good"]}}, titles))
    assert "ms 1.5, share 0.5" in few
    assert "1 of 1 sections without a fault" in few


def test_what_is_measured_has_a_digest_without_git(tmp_path, monkeypatch):
    for folder in report.MEASURED:
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "op.py").write_text("x = 1")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    first = report.sources()
    (tmp_path / "kernels" / "notes.txt").write_text("no source")
    assert report.sources() == first
    (tmp_path / "kernels" / "op.py").write_text("x = 2")
    assert report.sources() != first


def test_the_sections_of_the_plan_fit_into_its_minutes():
    limits = [section.seconds for section in gpu.SECTIONS.values() if not section.beside and section.seconds < math.inf]
    assert sum(limits) <= gpu.MINUTES * 60 - 45  # which are left for pre-training and the start of processes


def test_without_time_sections_are_left_out(tmp_path):
    result, _, status = checked(tmp_path, "--sections", "kernels", "--minutes", "0.01")
    assert status == 1
    assert result["sections"]["kernels"]["status"] == "left out: no time"


def test_problems_are_failures_not_measured_errors_nor_what_was_left_out():
    rows = [{"error": 1e-3, "ok": True}, {"error": "left out: no time"}, {"error": "ValueError: x"}, {"error": 1.0, "ok": False}]
    assert gpu_report.problems({"status": "done", "rows": rows}) == rows[2:]
    assert gpu_report.problems({"status": "stopped after 3 s", "rows": []})


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


def test_a_section_for_two_devices_is_left_out_with_a_line_where_there_is_one(tmp_path, monkeypatch, capsys):
    here = gpu.about()
    one = here | {"machine": here["machine"] | {"cuda": [{"name": "cuda:0", "description": "Some GPU, 80 GB"}]}}
    monkeypatch.setattr(gpu, "about", lambda: one)
    gpu.main(["--sections", "parallel", "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    assert "parallel: left out, as it needs 2 GPUs" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_stand_in_for_two_devices(tmp_path):
    result, _, status = checked(tmp_path, "--sections", "parallel", *TIME)
    rows = [row for row in result["sections"]["parallel"]["rows"] if "devices" in row]
    assert status == 0
    assert [row["model"] for row in rows] == ["wan-1.3b", "flux-dev"]
    assert all(row["ok"] and row["MB sent"] > 0 for row in rows)


def test_every_section_exists():
    for section in gpu.SECTIONS.values():
        assert callable(getattr(import_module(f"benchmarks.{section.module}"), section.function))


@pytest.mark.parametrize("model", ["wan-1.3b", pytest.param("flux-dev", marks=pytest.mark.slow)])
def test_every_form_of_a_run_computes_the_same_with_one_graph_for_all_prompts(run, model):
    gpu_models.graphs(run, model)
    rows = {row["form"]: row for row in run.rows()}
    assert list(rows) == ["plain", "captured", "compiled, captured", "blocks compiled, captured"]
    assert not [row for row in rows.values() if "error" in row]
    assert all(row["ok"] for form, row in rows.items() if form != "plain")
    assert rows["captured"]["bits"]
    assert rows["captured"]["graphs"] == 1
