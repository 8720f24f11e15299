"""The latency benchmark runs, adds up, and counts operations as torch does."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import latency
from ebr_engine.backbones.mini.model import MINI
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanTrunk
from ebr_engine.backbones.wan.spec import trunk_flop
from ebr_engine.engine.measure import run_flop

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
    latency.main([*options.split(), str(tmp_path / "x")])
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "x").read_text())
    assert (result["size"], result["runs"], result["device"], result["dtype"]) == (64, 1, "cpu", "torch.float32")
    stages = result["stages"]
    assert list(stages) == [*latency.STAGES, "other restoring", "other process"]
    assert all(stages[name]["median"] > 0 for name in latency.STAGES)
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
    for word in ("64 x 64", "whole process", *latency.STAGES, "TFLOP/s", result["commit"], torch.__version__, result["date"]):
        assert word in text


def test_a_clip_is_timed_too(tmp_path, capsys):
    pytest.importorskip("av")
    options = "--size 32 --frames 3 --task rain --runs 1 --steps 2 --precision fp32 --device cpu --json"
    latency.main([*options.split(), str(tmp_path / "x")])
    assert "clip of 3 frames with mini" in capsys.readouterr().out
    result = json.loads((tmp_path / "x").read_text())
    assert (result["frames"], result["task"]) == (3, "rain")
    assert result["transformer"]["gflop"] * 1e9 > 3 * 16 * trunk_flop(MINI, 1, 0)
    assert result["stages"]["write"]["median"] > 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prompts", [0, 2])
def test_operations_are_counted_as_torch_counts_them(batch, prompts):
    torch.manual_seed(0)
    conditioner, trunk = WanConditioner(TINY), WanTrunk(TINY)
    torch.nn.init.normal_(conditioner.kv_weight)
    residuals = [(torch.randn(5, TINY.width), torch.ones(TINY.num_layers))] * prompts
    step = conditioner(torch.tensor([300.0]), torch.randn(3, TINY.text_dim), residuals)[0]
    latent = torch.randn(batch, 8, 1, 6, 10)
    with FlopCounterMode(display=False) as counter:
        trunk(latent, step)  # with gradients, so that attention is explicit products, which torch counts
    assert run_flop(TINY, latent, step) == counter.get_total_flops()


def test_medians_and_quartiles():
    assert latency.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3, "quartiles": [2, 4], "all": [3, 1, 2, 5, 4]}
    assert latency.spread([7.0])["quartiles"] == [7, 7]


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--size", "8"], ["--precision", "int4"]])
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        latency.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
