"""From every supported source to the same velocity, errors that say what to do, and loading in bounded memory."""

import json
import re

import huggingface_hub
import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file

from ebr_engine.backbones.checkpoint import find_model, load_halves
from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.weights import diffusers_state_dict as flux_state_dict
from ebr_engine.backbones.flux.weights import load_flux
from ebr_engine.backbones.flux2.model import Flux2Config
from ebr_engine.backbones.flux2.weights import diffusers_state_dict as flux2_state_dict
from ebr_engine.backbones.flux2.weights import load_flux2
from ebr_engine.backbones.registry import named_config, spec
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.backbones.wan.weights import diffusers_state_dict as wan_state_dict
from ebr_engine.backbones.wan.weights import load_wan
from ebr_engine.errors import BackboneError
from tests.backbones.original_layouts import flux2_original, flux_original, wan_original

CONFIGS = {
    "wan": WanConfig(num_attention_heads=1, in_channels=4, out_channels=4, text_dim=10, freq_dim=16, ffn_dim=40, num_layers=3),
    "flux": FluxConfig(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=1,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        guidance_embeds=True,
    ),
    "flux2": Flux2Config(
        in_channels=4, num_layers=2, num_single_layers=3, num_attention_heads=1, joint_attention_dim=10, guidance_embeds=True
    ),
}
MODELS = {"wan": WanTransformer3DModel, "flux": FluxTransformer2DModel, "flux2": Flux2Transformer2DModel}
INVERSES = {
    "wan": (load_wan, wan_state_dict),
    "flux": (load_flux, flux_state_dict),
    "flux2": (load_flux2, flux2_state_dict),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def modules():
    """diffusers' module of each backbone, no parameter zero or one."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        module = MODELS[name](**config.to_diffusers()).requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        made[name] = module
    return made


@pytest.fixture(scope="module")
def sources(modules, tmp_path_factory):
    """The same weights of each backbone in every layout; the paths by name."""
    made = {}
    for name, module in modules.items():
        folder = tmp_path_factory.mktemp(name)
        module.save_pretrained(folder / "sharded" / "transformer", max_shard_size="300KB")
        for part in ("vae", "text_encoder", "tokenizer"):
            (folder / "sharded" / part).mkdir()
        module.save_pretrained(folder / "single" / "transformer")
        state, config = module.state_dict(), CONFIGS[name]
        if name == "wan":
            original = wan_original(state, config.num_layers)
        else:
            write = flux_original if name == "flux" else flux2_original
            original = write(state, config.num_layers, config.num_single_layers)
        save_file(original, folder / "original.safetensors")
        prefixed = {PREFIX + key: tensor for key, tensor in original.items()}
        save_file(prefixed | {"first_stage_model.conv.weight": torch.randn(2)}, folder / "prefixed.safetensors")
        shards = folder / "original"
        shards.mkdir()
        keys = sorted(original)
        names = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        for i, shard in enumerate(names):
            save_file({key: original[key] for key in keys[i::3]}, shards / shard)
        save_file({"encoder.conv.weight": torch.randn(2)}, shards / "ae.safetensors")
        made[name] = {
            "sharded folder": folder / "sharded",
            "sharded transformer folder": folder / "sharded" / "transformer",
            "single folder": folder / "single",
            "single file": folder / "single" / "transformer" / "diffusion_pytorch_model.safetensors",
            "original file": folder / "original.safetensors",
            "original file among others": folder / "prefixed.safetensors",
            "original shards": shards,
            "a shard": shards / names[1],
        }
    return made


def velocity(name, conditioner, trunk):
    """The trunk's output for fixed random inputs."""
    config, timestep = trunk.config, torch.tensor([300.0])
    generator = torch.Generator().manual_seed(1)
    if name == "wan":
        latent, context = torch.randn(1, 4, 2, 4, 6, generator=generator), torch.randn(5, config.text_dim, generator=generator)
        return trunk(latent, conditioner(timestep, context)[0])
    latent, context = (
        torch.randn(1, 4, 1, 6, 4, generator=generator),
        torch.randn(5, config.joint_attention_dim, generator=generator),
    )
    text = {"context": context}
    if name == "flux":
        text["pooled"] = torch.randn(config.pooled_projection_dim, generator=generator)
    return trunk(latent, conditioner.bake(trunk, timestep, text)[0])


LAYOUTS = (
    "sharded folder",
    "sharded transformer folder",
    "single folder",
    "single file",
    "original file",
    "original file among others",
    "original shards",
    "a shard",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_loads_to_the_same_bits(modules, sources, name, layout):
    files = find_model(name, sources[name][layout])
    halves = load_halves(files, "cpu", torch.float32)
    load, back = INVERSES[name]
    state = modules[name].state_dict()
    assert files.config == CONFIGS[name]
    loaded = back(*halves)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert torch.equal(velocity(name, *halves), velocity(name, *load(CONFIGS[name], state)))


def test_the_index_of_shards_is_what_says_which_there_are(sources):
    folder = sources["wan"]["sharded folder"] / "transformer"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    assert find_model("wan", index).state.keys() == find_model("wan", folder).state.keys()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_stored_dtypes_become_the_trunks_and_the_conditioners(sources, tmp_path, name, stored):
    state = find_model(name, sources[name]["original file"]).state
    files = state.files
    original = {key: files[key].to(stored) for key in files}
    save_file(original, tmp_path / "a.safetensors")
    conditioner, trunk = load_halves(find_model(name, tmp_path / "a.safetensors"), "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.bfloat16}
    kept = torch.float32 if name == "wan" else stored
    assert {parameter.dtype for parameter in conditioner.parameters()} == {kept}
    weight = original["head.head.weight" if name == "wan" else "final_layer.linear.weight"]
    assert torch.equal((trunk.patch_out if name == "wan" else trunk.image_out).weight, weight.bfloat16())


def test_parts_beside_the_transformer_are_found(sources):
    folder = sources["flux"]["sharded folder"]
    for source in (folder, str(folder), folder / "transformer"):
        files = find_model("flux", source)
        assert files.vae == folder / "vae"
        assert files.text_encoders == (folder / "text_encoder",)
        assert files.tokenizers == (folder / "tokenizer",)
        assert re.fullmatch(r"sharded@[0-9a-f]{12}", files.identity)
    alone = find_model("flux", sources["flux"]["original file"])
    assert (alone.vae, alone.text_encoders, alone.tokenizers) == (None, (), ())
    assert re.fullmatch(r"original@[0-9a-f]{12}", alone.identity)


def test_folders_of_one_name_with_other_text_encoders_are_told_apart(sources, tmp_path):
    same, other = (clone(sources["wan"]["single folder"], tmp_path / place / "model") for place in ("a", "b"))
    for folder, size in ((same, 3), (other, 4)):
        (folder / "text_encoder").mkdir(exist_ok=True)
        save_file({"x": torch.zeros(size)}, folder / "text_encoder" / "model.safetensors")
    assert find_model("wan", same).identity != find_model("wan", other).identity


def test_without_the_transformer_no_weight_file_is_opened(sources, tmp_path):
    (tmp_path / "transformer").mkdir()
    config = (sources["wan"]["single folder"] / "transformer" / "config.json").read_text()
    (tmp_path / "transformer" / "config.json").write_text(config)
    files = find_model("wan", tmp_path, parts=("text_encoder", "tokenizer"))
    assert files.config == CONFIGS["wan"]
    assert not files.state
    with pytest.raises(BackboneError, match="was found without its transformer"):
        load_halves(files, "cpu", torch.float32)


def test_sizes_in_bytes_of_the_real_models():
    flux = spec("flux").parameters(named_config("flux-dev"), torch.bfloat16)
    assert flux["conditioner_bytes"] == 2 * 3_292_296_192  # modulation, which stays out of the device's memory
    assert flux["trunk_bytes"] == 2 * flux["trunk_parameters"] == 2 * 8_609_112_128
    wan = spec("wan").parameters(named_config("wan-1.3b"), torch.float32)
    assert wan["trunk_bytes"] == 4 * 1_251_446_848
    assert wan["conditioner_bytes"] == 4 * wan["conditioner_parameters"]


# Errors


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


def clone(source, target):
    """A copy of a folder of files and folders."""
    target.mkdir(parents=True)
    for item in source.iterdir():
        if item.is_dir():
            clone(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())
    return target


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


# The hub


@pytest.fixture
def hub(monkeypatch, sources, tmp_path):
    """A hub whose models are Wan's and FLUX's sharded folders; the arguments of the calls it got."""
    calls = []

    def snapshot_download(repo_id, **arguments):
        calls.append({"id": repo_id, **arguments})
        target = tmp_path / repo_id.replace("/", "--") / COMMIT
        if not target.exists():
            target.parent.mkdir()
            clone(sources["wan" if "Wan" in repo_id else "flux"]["sharded folder"], target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("name", "model"), [("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), ("flux", "black-forest-labs/FLUX.1-dev")]
)
def test_the_default_is_a_model_of_the_hub(hub, name, model):
    files = find_model(name, None)
    assert files.identity == f"{model}@{COMMIT}"
    assert files.vae.parent.name == COMMIT
    assert find_model(name, model).identity == files.identity
    assert load_halves(files, "cpu", torch.float32)[1].config == CONFIGS[name]


def test_of_the_hub_only_what_is_asked_for_is_fetched(hub):
    files = find_model("flux", "someone/FLUX.1-tuned", revision="v2", offline=True, parts=("text_encoder", "tokenizer"))
    assert (files.identity, len(files.state)) == (f"someone/FLUX.1-tuned@{COMMIT}", 0)
    (call,) = hub
    assert (call["id"], call["revision"], call["local_files_only"]) == ("someone/FLUX.1-tuned", "v2", True)
    assert {name for pattern in call["allow_patterns"] if (name := pattern.split("/")[0])} == {
        "transformer",
        "text_encoder*",
        "tokenizer*",
        "model_index.json",
    }
    assert "transformer/*.safetensors" not in call["allow_patterns"]


def test_a_path_that_exists_is_never_a_hub_id(hub, sources, tmp_path):
    (tmp_path / "org").mkdir()
    clone(sources["wan"]["single folder"], tmp_path / "org" / "name")
    assert find_model("wan", "org/name").identity.startswith("name@")
    assert not hub


def test_a_repository_in_another_layout_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(BackboneError, match=r"Wan-AI/Wan2\.1-T2V-1\.3B has no transformer folder"):
        find_model("wan", "Wan-AI/Wan2.1-T2V-1.3B")
