"""Wan 2.2 A14B: of its two transformers the one for little noise is loaded, and what would need the other is refused."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebr_engine.backbones.checkpoint import find_model, load_halves
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.wan.weights import diffusers_state_dict
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import BackboneError, PromptError
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.distributed import World
from ebr_engine.training.learner import check_fits
from tests.backbones.original_layouts import wan_original
from tests.real_layout import WAN, write_wan, write_wan22

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of the same tiny model in diffusers' layout and in the original one, and of a Wan 2.1 model."""
    folder = tmp_path_factory.mktemp("models")
    write_wan22(folder / "wan22")
    write_wan(folder / "wan")
    (folder / "wan" / "model_index.json").write_text('{"_class_name": "WanPipeline", "transformer_2": [null, null]}')
    for theirs, ours in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        target = folder / "original" / theirs
        target.mkdir(parents=True)
        save_file(wan_original(load_file(folder / "wan22" / ours / FILE), WAN["num_layers"]), target / FILE)
        sizes = {"num_heads": 2, "model_type": "t2v", "eps": 1e-6, "_class_name": "WanModel"}
        (target / "config.json").write_text(json.dumps(sizes))
    shutil.copy(folder / "original" / "low_noise_model" / FILE, folder / "wan2.2_t2v_low_noise_14B.safetensors")
    shutil.copy(folder / "original" / "low_noise_model" / "config.json", folder / "config.json")
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "source",
    [
        "wan22",
        "wan22/transformer_2",
        f"wan22/transformer_2/{FILE}",
        "original",
        "original/low_noise_model",
        "wan2.2_t2v_low_noise_14B.safetensors",
    ],
)
def test_every_layout_gives_the_transformer_for_little_noise(models, source):
    files = find_model("wan22", models / source)
    assert files.boundary == 0.875
    assert (files.vae is not None) == source.startswith("wan22")
    loaded = diffusers_state_dict(*load_halves(files, "cpu", torch.float32))
    state = load_file(models / "wan22" / "transformer_2" / FILE)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("source", ["wan22/transformer", f"wan22/transformer/{FILE}", "original/high_noise_model"])
def test_the_transformer_for_much_noise_is_refused_by_its_name(models, source):
    with pytest.raises(BackboneError, match=r"transformer of wan22 that is not run.*name its transformer_2 or low_noise_model"):
        find_model("wan22", models / source)


@pytest.mark.parametrize(
    "name",
    ["wan2.2_t2v_high_noise_14B_fp16.safetensors", "Wan2.2-HighNoise.safetensors", "Wan2_2-T2V-A14B_HIGH_bf16.safetensors"],
)
def test_a_single_file_for_much_noise_is_refused_by_its_name(models, tmp_path, name):
    shutil.copy(models / "wan2.2_t2v_low_noise_14B.safetensors", tmp_path / name)
    with pytest.raises(BackboneError, match="is not run, by its name"):
        find_model("wan22", tmp_path / name)


def test_the_models_of_the_two_versions_are_not_taken_for_each_other(models):
    with pytest.raises(BackboneError, match="holds a wan22 transformer, not wan: use it with the wan22 backbone"):
        find_model("wan", models / "wan22")
    with pytest.raises(BackboneError, match="holds a wan transformer, not wan22: use it with the wan backbone"):
        find_model("wan22", models / "wan")
    assert find_model("wan", models / "wan").boundary == 1


@pytest.mark.parametrize(("said", "boundary"), [(0.5, 0.5), (None, 0.875)])
def test_the_pipelines_index_says_the_boundary(models, tmp_path, said, boundary):
    copy = changed(models, tmp_path, boundary_ratio=said)
    assert find_model("wan22", copy).boundary == boundary


@pytest.mark.parametrize("said", ["0.875", 1.5, -1, [0.5]])
def test_a_boundary_that_cannot_be_is_told(models, tmp_path, said):
    with pytest.raises(BackboneError, match=r"model_index\.json is damaged: boundary_ratio is"):
        find_model("wan22", changed(models, tmp_path, boundary_ratio=said))


def changed(models, tmp_path, **settings):
    """A copy of the model whose index says something else."""
    copy = shutil.copytree(models / "wan22", tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | settings))
    return copy


@pytest.fixture(scope="module")
def restorer(models, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return Restorer("wan22", model=models / "wan22", device="cpu", precision="fp32")


def prompt(backbone, t0=0.4, width=24):
    return Prompt(torch.ones(226, width), torch.ones(2), backbone, t0=t0)


def test_a_bridge_that_begins_above_the_boundary_is_refused(restorer):
    assert restorer.plan(t0=0.87, steps=2).table.t0 == 0.87
    for options in ({"t0": 0.875}, {"prompt": prompt("wan22", 0.9)}):
        with pytest.raises(BackboneError, match=r"T0 0\.(875|9) .*other transformer, .* from 0\.875 on .*use a T0 below"):
            restorer.plan(steps=2, **options)


def test_prompts_are_not_learned_above_the_boundary(restorer):
    config = LearnConfig("fog", backbone="wan22", data="x", loss="velocity", t0=0.9, size=32, batch=2)
    with pytest.raises(BackboneError, match=r"T0 0\.9 would meet"):
        check_fits(config, restorer.backbone, World())
    check_fits(replace(config, t0=0.8), restorer.backbone, World())


def test_prompts_of_the_other_version_are_taken_with_a_warning_where_sizes_agree(restorer, caplog):
    restorer.plan(prompt=prompt("wan22"), steps=2)
    assert caplog.records == []
    plan = restorer.plan(prompt=prompt("wan"), steps=2)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "learned on another model, of the wan backbone" in record.message
    assert torch.equal(plan.tables[0].prompt_key, restorer.plan(prompt=prompt("wan22"), steps=2).tables[0].prompt_key)
    with pytest.raises(PromptError, match=r"width 36 .* the wan22 backbone has width 24"):
        restorer.plan(prompt=prompt("wan", width=36))
    with pytest.raises(PromptError, match="for the wan22 backbone, not for wan"):
        prompt("wan22").check("wan", 24, 2)


def test_the_sizes_are_those_of_wan_14b_with_a_word_on_what_is_not_loaded():
    one = spec("wan22")
    assert one.configs["wan22-a14b"] == spec("wan").configs["wan-14b"]
    assert "half of the model" in one.note
    assert (one.injection, one.codec, one.native_size) == ("dual", spec("wan").codec, (480, 832))
