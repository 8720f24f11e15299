"""The roofline counts what the real trunks compute, and its totals are those the design states."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.models import clip_of
from ebr_engine.backbones.flux.conditioning import FluxStep
from ebr_engine.backbones.flux.model import FluxTrunk
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanStep, WanTrunk

H200 = roofline.GPUS["h200"]


def meta(*shape):
    return torch.empty(shape, device="meta")


def counted(trunk, latent, step):
    """FLOPs that torch counts in one run of a trunk on the meta device, where nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        velocity = trunk(latent, step)
    assert velocity.shape == latent.shape
    return counter.get_total_flops()


def wan_flop(work):
    """Torch's count for a Wan workload with the empty text's two distinct rows and one prompt."""
    config = work.config
    heads, blocks = config.num_attention_heads, config.num_layers
    keys = blocks, 1, heads
    step = WanStep(
        meta(1, blocks, 6, config.width),
        meta(1, 2, config.width),
        meta(*keys, roofline.WAN_DISTINCT, config.attention_head_dim),
        meta(*keys, roofline.WAN_DISTINCT, config.attention_head_dim),
        meta(roofline.WAN_DISTINCT),
        meta(*keys, roofline.WAN_TEXT, config.attention_head_dim),
        meta(*keys, roofline.WAN_TEXT, config.attention_head_dim),
        meta(blocks, 1),
    )
    with torch.device("meta"):
        trunk = WanTrunk(config)
    return counted(trunk, meta(1, *clip_of(work.latent)), step)


def flux_flop(work):
    """Torch's count for a FLUX workload."""
    config, rows = work.config, roofline.FLUX_TEXT
    step = FluxStep(
        meta(1, config.num_layers, 2, 6, config.width),
        meta(1, config.num_single_layers, 3, config.width),
        meta(1, 2, config.width),
        meta(work.text, config.width),
        meta(config.num_layers, rows, 3 * config.width),
        meta(config.num_single_layers, rows, 3 * config.width),
    )
    with torch.device("meta"):
        trunk = FluxTrunk(config)
    return counted(trunk, meta(1, *clip_of(work.latent)), step)


def flop(work):
    return roofline.analyse(work, H200)["totals"]["flop"]


@pytest.mark.parametrize("size", [(64, 96), (480, 832)])
@pytest.mark.parametrize("backbone", ["wan-1.3b", "wan-14b", "wan22-5b"])
def test_wan_s_operations_are_those_of_the_trunk(backbone, size):
    work = roofline.workload(backbone, *size, frames=5 if size[0] == 64 else 33)
    assert flop(work) == wan_flop(work)


@pytest.mark.parametrize("size", [(64, 96), (1024, 1024)])
@pytest.mark.parametrize("backbone", ["flux-dev", "flux2-klein-4b"])
def test_flux_s_operations_are_those_of_the_trunk(backbone, size):
    work = roofline.workload(backbone, *size)
    assert flop(work) == flux_flop(work)


def test_what_the_conditioner_computes_once_is_counted_as_torch_counts_it():
    config = WanConfig(num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=40, num_layers=3)
    work = roofline.Workload("tiny", "", config, (16, 1, 4, 4), 4, roofline.WAN_TEXT)
    with torch.device("meta"):
        conditioner = WanConditioner(config)
    with FlopCounterMode(display=False) as counter:
        conditioner.modulations(meta(1))
        text = conditioner.encode_text(meta(roofline.WAN_TEXT, config.text_dim))
        for _ in range(2):  # the text's own, and with one prompt
            conditioner.keys_values(text[None])
    baked = [op for op in roofline.step(work) if "baked" in op.name]
    assert sum(op.count * op.plain_flop for op in baked) == counter.get_total_flops()
    assert all(op.flop == op.bytes == 0 for op in baked)


@pytest.mark.parametrize(
    ("backbone", "tokens", "tera", "bf16", "fp8"), [("wan-1.3b", 14040, 72, 107, 63), ("flux-dev", 4096, 74, 108, 60)]
)
def test_the_totals_are_the_design_s(backbone, tokens, tera, bf16, fp8):
    work = roofline.workload(backbone)
    totals = roofline.analyse(work, H200)["totals"]
    assert work.tokens == tokens
    assert totals["flop"] / 1e12 == pytest.approx(tera, rel=0.01)
    # The design's milliseconds are estimates: they lie between the floor and what is left when nothing overlaps.
    for precision, milliseconds in (("bf16", bf16), ("all fp8", fp8)):
        low, high = totals["floor"][precision] * 1e3, totals["expected"][precision] * 1e3
        assert 0.95 * low < milliseconds < 1.05 * high


def test_a_floor_is_the_larger_of_products_and_memory():
    gpu = roofline.Gpu(bf16=2, fp8=4, bandwidth=1, source="")
    op = roofline.Operation("x", 3, flop=8, bytes=1, plain_flop=8, plain_bytes=9, fp8=True)
    tera = [tuple(seconds * 1e12 for seconds in op.seconds(gpu, name)) for name in ("bf16", "fp8", "all fp8", "plain")]
    assert tera == [pytest.approx((12, 3)), pytest.approx((6, 3)), pytest.approx((6, 3)), pytest.approx((12, 27))]
    assert replace(op, fp8=False).seconds(gpu, "fp8") == op.seconds(gpu, "bf16")
    assert op.saved == 24


@pytest.mark.parametrize("backbone", roofline.MODELS)
def test_fusing_and_narrowing_save_bytes_and_change_no_products(backbone):
    work = roofline.workload(backbone)
    wide, narrow = ({op.name: op for op in roofline.step(work, size)} for size in (2, 1))
    for name, op in wide.items():
        assert narrow[name].flop == op.flop
        assert narrow[name].bytes <= op.bytes
        assert op.saved >= 0 or name == "join q, k, v"  # the one pass that the eager form has inside another
    assert any(op.fp8 for op in narrow.values())
    assert not any(op.fp8 for op in wide.values())


def test_the_table_and_the_file_tell_the_same(tmp_path, capsys):
    file = tmp_path / "folder" / "roofline.json"
    roofline.main(["--backbone", "wan-1.3b", "--size", "64", "96", "--frames", "5", "--bf16", "100", "--json", str(file)])
    text, result = capsys.readouterr().out, json.loads(file.read_text())
    (work,) = result["workloads"]
    assert result["gpu"]["bf16"] == 100
    assert "100 TFLOP/s bf16" in text
    assert "given: bf16" in text
    names = [op["name"] for op in work["operations"]]
    assert len(set(names)) == len(names)
    assert all(name in text for name in names)
    assert f"{work['totals']['floor']['bf16'] * 1e3:.2f}" in text
    floors = [op["floor"] for op in work["operations"]]
    for precision, total in work["totals"]["floor"].items():
        assert math.isclose(total, sum(floor[precision] for floor in floors))
        assert total <= work["totals"]["expected"][precision] <= 2 * total


def test_a_gpu_without_fp8_has_no_fp8_columns(capsys):
    roofline.main(["--gpu", "a100"])
    text = capsys.readouterr().out
    assert text.count("a step: floor") == len(roofline.MODELS)
    assert "fp8 ms" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bf16", "0"],
        ["--frames", "4"],
        ["--size", "100", "100"],
        ["--size", "48", "64", "--backbone", "wan22-5b"],
        ["--gpu", "abacus"],
        ["--backbone", "mini"],
    ],
)
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        roofline.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_what_takes_the_place_of_operations_has_a_lower_floor():
    flux, wan = (roofline.analyse(roofline.workload(name), roofline.GPUS["h200"])["forms"] for name in ("flux-dev", "wan-1.3b"))
    assert [form["form"] for form in flux] == ["attention_fp8", "qkv_norm_rope"]
    assert [form["form"] for form in wan] == ["attention_fp8"]
    assert all(form["floor"] < form["usual_floor"] for form in (*flux, *wan))
    assert flux[1]["bytes"] < flux[1]["usual_bytes"]
    assert not roofline.analyse(roofline.workload("wan-1.3b"), roofline.GPUS["a100"])["forms"]  # which has no fp8
