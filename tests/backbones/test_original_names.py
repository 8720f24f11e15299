"""The original layouts under diffusers' names: what diffusers' own converters make of them, and the sizes the shapes tell."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.weights import ORIGINAL as FLUX_NAMES
from ebr_engine.backbones.flux.weights import flux_sizes
from ebr_engine.backbones.flux2.model import Flux2Config
from ebr_engine.backbones.flux2.weights import ORIGINAL as FLUX2_NAMES
from ebr_engine.backbones.flux2.weights import flux2_sizes
from ebr_engine.backbones.parameters import OriginalState, TensorFiles
from ebr_engine.backbones.registry import named_config
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.backbones.wan.weights import ORIGINAL as WAN_NAMES
from ebr_engine.backbones.wan.weights import wan_sizes
from ebr_engine.errors import BackboneError
from tests.backbones.original_layouts import flux2_original, flux_original, wan_original

WAN = WanConfig(
    num_attention_heads=2,
    in_channels=3,
    out_channels=3,
    text_dim=10,
    freq_dim=16,
    ffn_dim=40,
    num_layers=12,
    patch_size=(1, 2, 3),
)
FLUX = FluxConfig(in_channels=12, num_layers=2, num_single_layers=11, num_attention_heads=1, joint_attention_dim=10)
FLUX2 = Flux2Config(in_channels=12, num_layers=2, num_single_layers=11, num_attention_heads=1, joint_attention_dim=10)
MODELS = {WanConfig: WanTransformer3DModel, FluxConfig: FluxTransformer2DModel, Flux2Config: Flux2Transformer2DModel}


def diffusers_shapes(config):
    """Diffusers' names and shapes of a configuration."""
    model = MODELS[type(config)]
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model(**config.to_diffusers()).state_dict().items()}


def random_state(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def stored(folder, tensors):
    """Tensors written to a file and opened again."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "a.safetensors")
    return TensorFiles([folder / "a.safetensors"])


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert all(state.shape(name) == tensor.shape for name, tensor in expected.items())


def test_wan_is_what_diffusers_converter_makes(tmp_path):
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = random_state(diffusers_shapes(WAN))
    original = wan_original(state, WAN.num_layers)
    expected = converters.convert_wan_transformer_to_diffusers(dict(original))
    assert_same(OriginalState(WAN_NAMES, stored(tmp_path, original)), expected)
    assert_same(OriginalState(WAN_NAMES, stored(tmp_path, original)), state)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_flux_is_what_diffusers_converter_makes(tmp_path, name):
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = named_config(name)
    config = FluxConfig(num_layers=2, num_single_layers=2, guidance_embeds=config.guidance_embeds)
    # The converter knows the real number of rows only; of the columns a few do, since nothing splits them.
    state = random_state({name: (*shape[:1], *(2 for _ in shape[1:])) for name, shape in diffusers_shapes(config).items()})
    original = flux_original(state, 2, 2, config.guidance_embeds)
    expected = converters.convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert_same(OriginalState(FLUX_NAMES, stored(tmp_path, original)), expected)
    assert_same(OriginalState(FLUX_NAMES, stored(tmp_path, original)), state)


@pytest.mark.parametrize("guidance", [False, True])
def test_flux2_is_what_diffusers_converter_makes(tmp_path, guidance):
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = random_state(diffusers_shapes(Flux2Config(**vars(FLUX2) | {"guidance_embeds": guidance})))
    original = flux2_original(state, FLUX2.num_layers, FLUX2.num_single_layers, guidance)
    expected = converters.convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    assert_same(OriginalState(FLUX2_NAMES, stored(tmp_path, original)), expected)
    assert_same(OriginalState(FLUX2_NAMES, stored(tmp_path, original)), state)


@pytest.mark.parametrize(
    ("model", "write", "names", "layers"),
    [
        ("wan-14b", wan_original, WAN_NAMES, (40,)),
        ("flux-dev", flux_original, FLUX_NAMES, (19, 38)),
        ("flux2-dev", flux2_original, FLUX2_NAMES, (8, 48)),
    ],
)
def test_the_maps_reach_every_key_of_the_real_models_once(model, write, names, layers):
    shapes = diffusers_shapes(named_config(model))
    with torch.device("meta"):
        original = write({name: torch.empty(shape) for name, shape in shapes.items()}, *layers)
    assert sorted(name for key in original for name, _ in names.pieces(key)) == sorted(shapes)


@pytest.mark.parametrize("config", [FLUX2, Flux2Config(**vars(FLUX2) | {"guidance_embeds": True, "mlp_ratio": 2.5})])
def test_sizes_of_flux2_are_read_from_shapes_in_either_layout(tmp_path, config):
    state = random_state(diffusers_shapes(config))
    original = flux2_original(state, config.num_layers, config.num_single_layers, config.guidance_embeds)
    original = OriginalState(FLUX2_NAMES, stored(tmp_path, original))
    assert Flux2Config.from_diffusers(flux2_sizes(original, {})) == config
    assert Flux2Config.from_diffusers(flux2_sizes(stored(tmp_path, state), {})) == config


@pytest.mark.parametrize("config", [WAN, FLUX, FluxConfig(**vars(FLUX) | {"guidance_embeds": True, "num_attention_heads": 3})])
def test_sizes_are_read_from_shapes_in_either_layout(tmp_path, config):
    state = random_state(diffusers_shapes(config))
    if isinstance(config, WanConfig):
        original = OriginalState(WAN_NAMES, stored(tmp_path, wan_original(state, config.num_layers)))
        read = [WanConfig.from_diffusers(wan_sizes(found, {})) for found in (original, stored(tmp_path, state))]
    else:
        layers = config.num_layers, config.num_single_layers
        original = OriginalState(FLUX_NAMES, stored(tmp_path, flux_original(state, *layers, config.guidance_embeds)))
        read = [FluxConfig.from_diffusers(flux_sizes(found, {})) for found in (original, stored(tmp_path, state))]
    assert read == [config, config]


def test_wan_heads_and_eps_are_read_from_the_original_configuration(tmp_path):
    config = WanConfig(**vars(WAN) | {"num_attention_heads": 4, "attention_head_dim": 10, "num_layers": 1, "eps": 1e-5})
    state = OriginalState(WAN_NAMES, stored(tmp_path, wan_original(random_state(diffusers_shapes(config)), 1)))
    settings = {"_class_name": "WanModel", "model_type": "t2v", "num_heads": 4, "dim": 40, "eps": 1e-5}
    assert WanConfig.from_diffusers(wan_sizes(state, settings)) == config
    for changes, message in (({"num_heads": 3}, "not that of 3 heads"), ({"model_type": "i2v"}, "text-to-video")):
        with pytest.raises(BackboneError, match=message):
            wan_sizes(state, settings | changes)
    with pytest.raises(BackboneError, match=r"config\.json has to lie beside it"):
        wan_sizes(state, {})


def test_a_key_of_no_layer_keeps_its_name(tmp_path):
    tensors = {
        "double_blocks.0.img_attn.qkv.gate": torch.randn(3),
        "blocks.0.modulation": torch.randn(2),
        "img_in.weight": torch.randn(2),
    }
    state = OriginalState(FLUX_NAMES, stored(tmp_path, tensors))
    assert sorted(state) == ["blocks.0.modulation", "double_blocks.0.img_attn.qkv.gate", "x_embedder.weight"]


def test_a_fused_tensor_that_cannot_be_split_is_told(tmp_path):
    state = OriginalState(FLUX_NAMES, stored(tmp_path, {"single_blocks.1.linear1.weight": torch.randn(22, 3)}))
    with pytest.raises(BackboneError, match=r"single_blocks\.1\.linear1\.weight has 22 rows, which are not 7 equal parts"):
        state["single_transformer_blocks.1.attn.to_k.weight"]


def test_a_slice_of_a_fused_tensor_is_a_view_of_the_file(tmp_path):
    fused = torch.randn(21, 4)
    state = OriginalState(FLUX_NAMES, stored(tmp_path, {"single_blocks.0.linear1.weight": fused}))
    parts = {name.split(".", 2)[2]: state[name] for name in state}
    start = parts["attn.to_q.weight"].data_ptr()
    row = fused[0].nbytes
    assert [part.data_ptr() - start for part in parts.values()] == [0, 3 * row, 6 * row, 9 * row]
    assert torch.equal(parts["proj_mlp.weight"], fused[9:])


def test_missing_or_misshapen_tensors_are_named_when_sizes_are_read(tmp_path):
    state = random_state(diffusers_shapes(WAN))
    del state["proj_out.weight"]
    with pytest.raises(BackboneError, match=r"misses proj_out\.weight"):
        wan_sizes(stored(tmp_path, state), {})
    state["patch_embedding.weight"] = torch.randn(3, 4)
    with pytest.raises(BackboneError, match=r"patch_embedding\.weight has shape \(3, 4\) in the checkpoint, 5 axes"):
        wan_sizes(stored(tmp_path, state), {})
