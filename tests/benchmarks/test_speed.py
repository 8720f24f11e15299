"""The speed benchmarks run, add up, count operations as torch does, and say from how many pictures on compiling pays."""

import json
from importlib.metadata import version

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report, speed, starting, waiting
from benchmarks.models import evaluation_flop, random_model, work_of
from benchmarks.stages import STAGES
from ebr_engine.backbones.layers import cpu_has_bf16
from ebr_engine.backbones.mini.model import MINI
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanTrunk
from ebr_engine.backbones.wan.spec import run_flop, trunk_flop
from ebr_engine.kernels import backend

WAYS = waiting.LIBRARY, "without spinning"
TINY = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=8,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=40,
    num_layers=3,
)


def test_a_tiny_photo_is_timed_from_start_to_file(tmp_path, capsys):
    options = "--size 64 --runs 1 --steps 2 --precision fp32 --device cpu --json"
    speed.main(["latency", *options.split(), str(tmp_path / "x")])
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "x").read_text())
    assert (result["size"], result["runs"], result["device"], result["dtype"]) == (64, 1, "cpu", "torch.float32")
    stages = result["stages"]
    assert list(stages) == [*STAGES, "other restoring", "other process"]
    assert all(stages[name]["median"] > 0 for name in STAGES)
    assert sum(stage["median"] for stage in stages.values()) == pytest.approx(result["whole"]["median"])
    assert sum(stage["share"] for stage in stages.values()) == pytest.approx(1)
    assert stages["import torch"]["median"] > stages["bake"]["median"]
    transformer = result["transformer"]
    assert transformer["runs_a_photo"] == 2
    assert sum(transformer["seconds"]["all"]) == pytest.approx(stages["denoise"]["median"])
    speeds = [transformer["gflop"] / 1e3 / seconds for seconds in transformer["seconds"]["all"]]
    assert transformer["tflop_per_second"]["all"] == pytest.approx(speeds)
    assert transformer["gflop"] * 1e9 > 64 * trunk_flop(MINI, 1, 0)  # 64 tokens, and they look at each other
    assert 0 < transformer["share_of_products"] < 2
    assert 1e8 < result["peak_bytes"] < 1e10
    for word in ("64 x 64", "whole process", *STAGES, "TFLOP/s", result["commit"], version("torch"), result["date"]):
        assert word in text


def test_a_clip_is_timed_too(tmp_path, capsys):
    pytest.importorskip("av")
    options = "--size 32 --frames 3 --task rain --runs 1 --steps 2 --precision fp32 --device cpu --json"
    speed.main(["latency", *options.split(), str(tmp_path / "x")])
    assert "clip of 3 frames with mini" in capsys.readouterr().out
    result = json.loads((tmp_path / "x").read_text())
    assert (result["frames"], result["task"]) == (3, "rain")
    assert result["transformer"]["gflop"] * 1e9 > 3 * 16 * trunk_flop(MINI, 1, 0)
    assert result["stages"]["write"]["median"] > 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prompts", [0, 2])
def test_operations_are_counted_as_torch_counts_them(batch, prompts, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(backend, "ASKED", "torch")  # torch counts its own products alone
    conditioner, trunk = WanConditioner(TINY), WanTrunk(TINY)
    torch.nn.init.normal_(conditioner.kv_weight)
    residuals = [(torch.randn(5, TINY.width), torch.ones(TINY.num_layers))] * prompts
    step = conditioner(torch.tensor([300.0]), torch.randn(3, TINY.text_dim), residuals)[0]
    latent = torch.randn(batch, 8, 1, 6, 10)
    with FlopCounterMode(display=False) as counter:
        trunk(latent, step)  # with gradients, so that attention is explicit products, which torch counts
    assert run_flop(TINY, latent.shape, step) == counter.get_total_flops()


@pytest.mark.parametrize("frames", [1, 3])
def test_operations_of_flux_are_counted_as_torch_counts_them(frames, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "torch")
    model = random_model(work_of("flux-dev", tiny=True), "cpu", torch.float32)
    latent = torch.randn(2, 16, frames, 8, 12)
    tables = model.bake(torch.tensor([300.0]))[0]
    with FlopCounterMode(display=False) as counter:
        model.backbone().velocity(latent.requires_grad_(), tables)
    assert evaluation_flop(model.config, latent.shape, tables) == counter.get_total_flops()


def test_medians_and_quartiles():
    assert report.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3, "quartiles": [2, 4], "all": [3, 1, 2, 5, 4]}
    assert report.spread([7.0])["quartiles"] == [7, 7]


def test_every_form_is_measured_in_rounds(tmp_path, capsys):
    file = tmp_path / "x.json"
    arguments = "--size 32 --batch 1 2 --precision fp32 bf16 --steps 2 --rounds 3 --device cpu --json"
    speed.main(["throughput", *arguments.split(), str(file)])
    result, text = json.loads(file.read_text()), capsys.readouterr().out
    forms = [(row["precision"], row["compile"], row["batch"]) for row in result["rows"]]
    half = "bf16" if cpu_has_bf16() else "fp32"  # what is asked for as bf16 runs so on a CPU without
    assert forms == [("fp32", "off", 1), ("fp32", "off", 2), (half, "off", 1), (half, "off", 2)]
    for row in result["rows"]:
        assert len(row["seconds"]["all"]) == 3
        assert row["rate"] == pytest.approx(row["batch"] / row["seconds"]["median"])
        assert row["first"] > 0
        assert row["break_even"] is None
        assert row["still"]
    one, two = (row["tflops"] * row["seconds"]["median"] for row in result["rows"][:2])
    assert two == pytest.approx(2 * one)
    for word in ("fp32, compile off", "pictures/s", "TFLOP/s", result["commit"]):
        assert word in text


def test_frames_are_counted_as_frames(capsys):
    speed.main(
        ["throughput", "--size", "16", "--frames", "2", "--batch", "1", "--steps", "1", "--rounds", "1", "--device", "cpu"]
    )
    assert "frames/s" in capsys.readouterr().out


def test_compiling_pays_when_what_it_took_is_saved():
    plain = {"compile": "off", "batch": 2, "asked": "auto", "first": 2.0, "seconds": {"median": 2.0}}
    fast = {"compile": "on", "batch": 2, "asked": "auto", "first": 21.0, "seconds": {"median": 1.0}}
    assert speed.break_even(fast, [plain, fast]) == pytest.approx(40)  # 20 s, at half a second a picture
    assert speed.break_even(plain, [plain, fast]) is None
    assert speed.break_even(fast | {"seconds": {"median": 3.0}}, [plain, fast]) is None


def test_time_beside_busy_processes_is_told_by_what_fair_sharing_gives():
    def row(busy, seconds):
        return {"way": "asleep", "busy": busy, "seconds": report.spread([seconds]), "cpu_seconds": report.spread([0.5])}

    text = waiting.table({"task": "rain", "size": 64, "rounds": 1, "rows": [row(0, 1.0), row(1, 2.2), row(2, 9.0)]})
    assert [line.split()[-1] for line in text.splitlines()[-3:]] == ["1.00", "1.10", "3.00"]


def test_the_start_is_told_beside_another_commits():
    seconds = {"here": report.spread([1.0, 2.0, 3.0]), "beside": report.spread([3.0])}
    peaks = {"here": 10**8, "beside": 2 * 10**8}
    text = starting.table(
        {"size": [64, 48], "task": "rain", "precision": "auto", "rounds": 3, "seconds": seconds, "peak_bytes": peaks}
    )
    assert text.endswith("x1.50")
    assert "64 x 48" in text


def test_a_clips_frames_a_second_are_told():
    seconds, peaks = {"here": report.spread([4.0])}, {"here": 10**8}
    given = {"size": [64, 64], "frames": 8, "task": "rain", "precision": "auto", "rounds": 1}
    assert starting.table(given | {"seconds": seconds, "peak_bytes": peaks}).endswith("frames a second of one core: 2.00 (here)")


@pytest.mark.slow
def test_a_small_picture_is_restored_by_two_folders_commands(tmp_path):
    options = ["--size", "16", "24", "--rounds", "1", "--beside", str(report.ROOT), "--json", str(tmp_path / "x")]
    speed.main(["starting", *options])
    seconds = json.loads((tmp_path / "x").read_text())["seconds"]
    assert all(seconds[name]["median"] > 0 for name in ("here", "beside"))


@pytest.mark.slow
def test_every_way_to_wait_restores_beside_busy_processes(tmp_path):
    speed.main(["waiting", "--size", "16", "--rounds", "1", "--busy", "0", "1", "--spins", "--json", str(tmp_path / "x")])
    rows = json.loads((tmp_path / "x").read_text())["rows"]
    assert [(row["way"], row["busy"]) for row in rows] == [(way, busy) for busy in (0, 1) for way in (*WAYS, "one thread")]
    assert all(row["seconds"]["median"] > 0 for row in rows)


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plots" / "x.png"
    speed.main(
        [
            "throughput",
            *["--size", "16", "--batch", "1", "2", "--steps", "1", "--rounds", "1", "--device", "cpu", "--plot"],
            str(file),
        ]
    )
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["latency", *wrong] for wrong in (["--runs", "0"], ["--size", "8"], ["--precision", "int4"])),
        *(["starting", *wrong] for wrong in (["--rounds", "0"], ["--size", "4", "64"], ["--beside", "/nowhere"])),
        ["starting", "--size", "64", "48", "--frames", "2"],
        *(["waiting", *wrong] for wrong in (["--rounds", "0"], ["--busy", "-1"])),
        *(["throughput", *wrong] for wrong in (["--rounds", "0"], ["--size", "8"], ["--batch", "0"], ["--precision", "int4"])),
    ],
)
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        speed.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
