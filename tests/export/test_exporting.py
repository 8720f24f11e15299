"""What is written, and what is refused before anything is."""

from types import SimpleNamespace

import pytest
import torch

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.wan.model import WanConditioning
from ebr_engine.bridge.sampler import make_table
from ebr_engine.engine.plan import Plan
from ebr_engine.errors import EngineError
from ebr_engine.export import exporting
from ebr_engine.export.engine_file import read_about
from ebr_engine.export.exporting import ExportOptions, export_trunk, latent_size

CODEC = SimpleNamespace(spatial=8, temporal=4, channels=16, frames=lambda count: count + -(count - 1) % 4)
PICTURES = SimpleNamespace(spatial=8, temporal=1, channels=16, frames=lambda count: count)


def backbone(model, name="wan", codec=CODEC):
    return Backbone(spec(name), None, model.trunk, codec, {}, torch.device("cpu"), torch.float32, "a model", {"folder": "vae"})


def plan_of(*steps):
    """A plan of one step, whose velocity is the mean over `steps`."""
    tables = [WanConditioning(*step) for step in steps]
    return Plan(make_table("fast", 0.2, 1, None), tables)


@pytest.mark.parametrize(
    ("name", "codec", "clip", "expected"),
    [
        ("wan", CODEC, (5, 480, 832), (16, 2, 60, 104)),
        ("wan", CODEC, (1, 16, 32), (16, 1, 2, 4)),
        ("flux", PICTURES, (1, 32, 16), (16, 1, 4, 2)),
    ],
)
def test_the_latent_of_a_clip_has_the_shape_that_the_trunk_takes(make_tiny, name, codec, clip, expected):
    assert latent_size(backbone(make_tiny(name), name, codec), clip) == expected


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ((5, 480, 830), "multiples of 16 pixels, not 480x830; use 480x832"),
        ((5, 0, 16), "use 16x16"),
        ((4, 16, 16), r"4n \+ 1 frames, not 4; use 5"),
    ],
)
def test_a_size_that_the_backbone_does_not_take_is_told_with_one_that_it_does(make_tiny, clip, words):
    with pytest.raises(EngineError, match=words):
        latent_size(backbone(make_tiny("wan")), clip)


def test_prompts_of_several_lengths_cannot_share_a_graph(make_tiny, tmp_path):
    model = make_tiny("wan")
    step = model.step(1)
    shorter = step._replace(prompt_key=step.prompt_key[..., :3, :], prompt_value=step.prompt_value[..., :3, :])
    with pytest.raises(EngineError, match="--mix residual"):
        export_trunk(tmp_path / "x.onnx", backbone(model), plan_of(step, shorter), "onnx", ExportOptions((1, 16, 16)), about={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fixed", [False, True])
def test_tensorrt_builds_from_an_onnx_file_that_does_not_stay(make_tiny, tmp_path, monkeypatch, fixed):
    asked = []
    monkeypatch.setattr(exporting.onnx, "write_onnx", lambda path, *settings: asked.append(settings) or path.touch())
    monkeypatch.setattr(
        exporting.tensorrt, "write_plan", lambda path, graph, options: asked.append((graph, options)) or path.touch()
    )
    model, path = make_tiny("wan"), tmp_path / "new" / "rain.plan"
    options = ExportOptions((5, 32, 48), fixed, opset=19, workspace=2.0)
    files = export_trunk(path, backbone(model), plan_of(model.step(1)), "tensorrt", options, {"prompts": ["rain"]})
    assert files == [path, path.with_name("rain.plan.tables")]
    assert sorted(path.parent.iterdir()) == files
    (_, _, latent, frames, opset, _), (graph, built) = asked
    assert (latent, frames, opset) == ((16, 2, 4, 6) if fixed else None, True, 19)
    assert not graph.exists()
    assert built.workspace == 2
    if fixed:
        assert built.open_sizes is None
    else:
        assert built.open_sizes["latent"] == ((1, 16, 1, 2, 2), (1, 16, 2, 4, 6), (4, 16, 2, 4, 6))
        assert built.open_sizes["sin"] == ((1, 1, 1, 6), (2, 2, 3, 6), (2, 2, 3, 6))
    assert read_about(path)["prompts"] == ["rain"]
