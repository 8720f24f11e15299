"""Files, folders and configurations that cannot be loaded are refused with what is wrong and what to do."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from ebr_engine.backbones.checkpoint import find_model, load_halves
from ebr_engine.errors import BackboneError
from tests.backbones.checkpoints import CONFIGS, clone


def saved(folder, tensors, name="a.safetensors"):
    """A file of tensors; a name alone stands for any tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors if isinstance(tensors, dict) else {key: torch.zeros(2) for key in tensors}, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], r"a LoRA .*LoRA merge is not supported"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], r"LoRA merge is not supported"),
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.scale_weight"], r"scaled fp8.* use the bf16"),
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight_scale"], r"scaled fp8"),
        (["model.diffusion_model.img_in.weight", "scaled_fp8"], r"scaled fp8"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(2, dtype=torch.int8)}, r"q\.weight is I8.*int8"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(2, dtype=torch.uint8)}, r"q\.weight is U8.*4-bit"),
        (["encoder.block.0.weight", "shared.weight"], r"no transformer of Wan or FLUX.* encoder\.block\.0\.weight, shared"),
        (["transformer_blocks.0.norm1.linear.weight"], r"flux transformer, not wan: use it with the flux backbone"),
        (["double_blocks.0.img_mod.lin.weight"], r"flux transformer, not wan"),
        (["single_stream_modulation.lin.weight", "double_blocks.0.img_attn.qkv.weight"], r"flux2 transformer, not wan"),
        (["blocks.0.self_attn.q.weight"], r"misses patch_embedding\.weight"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, keys, message):
    with pytest.raises(BackboneError, match=message) as caught:
        find_model("wan", saved(tmp_path, keys))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-Q4_K.gguf", "GGUF is not supported; use the safetensors checkpoint"),
        ("model.pth", "never read; use the safetensors checkpoint"),
        ("model.pt", "never read"),
        ("pytorch_model.bin", "never read"),
        ("model.zip", "not a safetensors checkpoint"),
    ],
)
def test_other_formats_are_refused_unread_as_files_and_in_folders(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(BackboneError, match=message):
        find_model("wan", tmp_path / name)
    with pytest.raises(BackboneError, match="holds no safetensors checkpoint of a transformer") as caught:
        find_model("wan", tmp_path)
    assert (name in str(caught.value)) == (not name.endswith("zip"))


def test_a_folder_without_a_model_and_paths_that_are_not_there(tmp_path):
    with pytest.raises(BackboneError, match="holds no safetensors checkpoint"):
        find_model("flux", tmp_path)
    for source in (tmp_path / "none", "none", "checkpoints/wan.safetensors", "a/b/c"):
        with pytest.raises(BackboneError, match="no such file or folder"):
            find_model("flux", source)
    with pytest.raises(BackboneError, match=r"revision \('main'\) pins a hub id only"):
        find_model("flux", tmp_path, revision="main")
    with pytest.raises(BackboneError, match="'mini' backbone has no checkpoints"):
        find_model("mini", tmp_path)


@pytest.mark.parametrize(
    ("layout", "shard"), [("sharded folder", "transformer/*-00002-of-*"), ("original shards", "*-00001-of-*")]
)
def test_a_missing_shard_is_named(sources, tmp_path, layout, shard):
    copy = clone(sources["wan"][layout], tmp_path / "copy")
    (gone,) = copy.glob(shard)
    gone.unlink()
    with pytest.raises(BackboneError, match=rf"misses 1 of \d+ shard\(s\): {re.escape(gone.name)}"):
        find_model("wan", copy)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_file_is_named(sources, tmp_path, length):
    whole = sources["wan"]["original file"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:length])
    with pytest.raises(BackboneError, match=r"cut\.safetensors is truncated or damaged, fetch it again"):
        find_model("wan", tmp_path / "cut.safetensors")


def test_several_transformers_in_a_folder_are_a_question(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path, ["blocks.0.self_attn.q.weight"], f"{name}.safetensors")
    with pytest.raises(BackboneError, match=r"several transformers \(a\.safetensors, b\.safetensors\); name one"):
        find_model("wan", tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_missing_and_unexpected_keys_are_listed_with_the_model(sources, tmp_path, name):
    files = find_model(name, sources[name]["original file"]).state.files
    tensors = {key: files[key] for key in files}
    gone = "blocks.1.ffn.0.weight" if name == "wan" else "double_blocks.1.img_mlp.0.weight"
    with pytest.raises(BackboneError, match=r"a@.*: checkpoint has unexpected 1 key\(s\): vace_blocks\.0\.weight"):
        load(name, saved(tmp_path, tensors | {"vace_blocks.0.weight": torch.zeros(1)}))
    with pytest.raises(
        BackboneError, match=r"a@.*: checkpoint misses 1 key\(s\): .*blocks\.1\.ff.*(net\.0\.proj|linear_in)\.weight"
    ):
        load(name, saved(tmp_path, {key: tensor for key, tensor in tensors.items() if key != gone}))


def test_a_tensor_of_another_size_is_named(sources, tmp_path):
    files = find_model("flux", sources["flux"]["original file"]).state.files
    tensors = {key: files[key] for key in files} | {"single_blocks.1.linear1.weight": torch.zeros(6 * 7, 128)}
    with pytest.raises(BackboneError, match=r"attn\.to_q\.weight has shape \(6, 128\) in the checkpoint, \(128, 128\)"):
        load("flux", saved(tmp_path, tensors))


def load(name, source):
    return load_halves(find_model(name, source), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("wan", {"_class_name": "FluxTransformer2DModel"}, "flux transformer, not wan: use it with the flux backbone"),
        ("flux", {"_class_name": "WanTransformer3DModel"}, "wan transformer, not flux"),
        ("flux", {"_class_name": "Flux2Transformer2DModel"}, "flux2 transformer, not flux"),
        ("flux2", {"_class_name": "FluxTransformer2DModel"}, "flux transformer, not flux2"),
        ("wan", {"_class_name": "WanVACETransformer3DModel"}, "of WanVACETransformer3DModel; a wan model has WanTransformer3D"),
        ("wan", {"image_dim": 1280, "in_channels": 36}, "image-to-video models are not supported"),
        ("wan", {"in_channels": 36}, r"in_channels=36 and out_channels=4.*image-to-video"),
        ("flux", {"in_channels": 384, "out_channels": 64}, "Fill"),
        ("flux", {"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ("wan", {"patch_size": 2}, r"config\.json is damaged"),
        ("wan", {"num_layers": "30"}, r"config\.json is damaged: num_layers='30'"),
        ("flux", {"num_attention_heads": -1}, r"config\.json is damaged: num_attention_heads=-1"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(sources, tmp_path, name, changes, message):
    copy = clone(sources[name]["single folder"], tmp_path / "copy")
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(BackboneError, match=message) as caught:
        find_model(name, copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_damaged_json_is_named(sources, tmp_path, text):
    copy = clone(sources["wan"]["sharded folder"], tmp_path / "copy")
    for file in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        path = copy / "transformer" / file
        kept = path.read_text()
        path.write_text(text)
        with pytest.raises(BackboneError, match=re.escape(str(path))):
            find_model("wan", copy)
        path.write_text(kept)
    for index in ({}, {"weight_map": []}, {"weight_map": {"a": "../b.safetensors"}}):
        path.write_text(json.dumps(index))
        with pytest.raises(BackboneError, match="is not an index of shards"):
            find_model("wan", copy)


def test_a_mismatch_of_configuration_and_weights_is_told(sources, tmp_path):
    copy = clone(sources["wan"]["single folder"], tmp_path / "copy")
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ffn_dim": 41}))
    with pytest.raises(BackboneError, match=r"copy@.* has shape \(40,.*in the checkpoint, \(41,"):
        load("wan", copy)
