"""From every supported source, a file, a folder or the hub, to the same velocity."""

import json
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from ebr_engine.backbones.checkpoint import find_model, load_halves
from ebr_engine.backbones.flux.weights import diffusers_state_dict as flux_state_dict
from ebr_engine.backbones.flux.weights import load_flux
from ebr_engine.backbones.flux2.weights import diffusers_state_dict as flux2_state_dict
from ebr_engine.backbones.flux2.weights import load_flux2
from ebr_engine.backbones.registry import named_config, spec
from ebr_engine.backbones.wan.weights import diffusers_state_dict as wan_state_dict
from ebr_engine.backbones.wan.weights import load_wan
from ebr_engine.errors import BackboneError
from tests.backbones.checkpoints import CONFIGS, clone

INVERSES = {
    "wan": (load_wan, wan_state_dict),
    "flux": (load_flux, flux_state_dict),
    "flux2": (load_flux2, flux2_state_dict),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
