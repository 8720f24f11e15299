"""Checkpoints and configurations that are not Wan's are refused by name."""

import re

import pytest
import torch

from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.backbones.wan.weights import load_wan
from ebr_engine.errors import BackboneError


@pytest.mark.parametrize("missing", ["proj_out.bias", "blocks.1.attn2.norm_k.weight", "blocks.2.ffn.net.0.proj.weight"])
def test_a_missing_key_is_named(wan, missing):
    module, (_, trunk) = wan
    state = module.state_dict()
    del state[missing]
    with pytest.raises(BackboneError, match=f"checkpoint misses 1 key.*{missing}"):
        load_wan(trunk.config, state)


def test_an_unexpected_key_is_named(wan):
    module, (_, trunk) = wan
    state = module.state_dict() | {"blocks.0.attn2.add_k_proj.weight": torch.randn(4)}
    with pytest.raises(BackboneError, match=r"has unexpected 1 key.*blocks\.0\.attn2\.add_k_proj\.weight"):
        load_wan(trunk.config, state)


@pytest.mark.parametrize("change", ["a row more", "a row less", "a dimension more", "a column more"])
def test_every_wrong_shape_is_named(make_wan, change):
    module, _, trunk = make_wan(num_layers=1)
    state = module.state_dict()
    for name, tensor in state.items():
        wrong = {
            "a row more": lambda t: torch.cat((t, t[:1])),
            "a row less": lambda t: t[:-1],
            "a dimension more": lambda t: t[None],
            "a column more": lambda t: torch.cat((t, t[..., :1]), dim=-1),
        }[change](tensor)
        with pytest.raises(BackboneError, match=re.escape(f"{name} has shape {tuple(wrong.shape)}")):
            load_wan(trunk.config, state | {name: wrong})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_dim": 1280}, "image_dim=1280: image-to-video"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim=5120: image-to-video"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len=514: image-to-video"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False; only True is supported"),
        ({"qk_norm": None}, "qk_norm=None; only 'rms_norm_across_heads'"),
    ],
)
def test_configurations_of_other_models_are_refused(wan, changes, message):
    module, _ = wan
    config = dict(module.config)
    assert WanConfig.from_diffusers(config).num_layers == 3
    with pytest.raises(BackboneError, match=message):
        WanConfig.from_diffusers(config | changes)


def test_a_configuration_may_leave_the_output_channels_to_the_input(wan):
    config = dict(wan[0].config) | {"in_channels": 20, "out_channels": None}
    assert WanConfig.from_diffusers(config).out_channels == 20
