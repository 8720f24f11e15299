"""The GPU check's command: its sections survive each other's ends, go on where they stopped, and are told in few words."""

import json
import math
import time
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from benchmarks import clock, gpu, gpu_kernels, gpu_report, report

pytestmark = pytest.mark.usefixtures("undone")
CPU = torch.device("cpu")
TIME = ("--minutes", "80")  # enough on a busy machine


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
