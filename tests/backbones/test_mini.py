"""`mini`'s file and its text encoder, on a tiny configuration with random weights."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ebr_engine.backbones.mini.codec import PixelCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import MINI, Mini, MiniTextEncoder, load_mini, save_mini
from ebr_engine.backbones.wan.model import WanConditioner, WanTrunk
from ebr_engine.backbones.wan.weights import diffusers_state_dict, load_wan
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import BackboneError
from tests.tiny import save_blocks

WORDS = ["haze", "strong", "blue"]
CONFIG = replace(
    MINI, num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=16
)


@pytest.fixture
def encoder():
    return MiniTextEncoder(WORDS, width=8)


@pytest.fixture
def mini(encoder):
    names = diffusers_state_dict(WanConditioner(CONFIG), WanTrunk(CONFIG))
    halves = load_wan(CONFIG, {name: torch.randn(tensor.shape) for name, tensor in names.items()})
    codec = LappedCodec(torch.randn(192), torch.rand(192) + 0.1)
    return Mini(*halves, codec, encoder, torch.randn(16, 8), {"minutes": 60, "seed": 3})


def test_a_saved_backbone_is_read_back_with_bf16_weights(mini, tmp_path):
    path = tmp_path / "deep" / "mini.safetensors"
    save_mini(path, mini)
    loaded = load_mini(path)
    assert list(path.parent.iterdir()) == [path]
    assert loaded.trunk.config == CONFIG
    assert (loaded.training, loaded.text_encoder.vocabulary) == (mini.training, WORDS)
    assert torch.equal(loaded.context, mini.context)
    assert torch.equal(loaded.codec.mean, mini.codec.mean)
    assert torch.equal(loaded.codec.scale, mini.codec.scale)
    for part in ("conditioner", "trunk", "text_encoder"):
        theirs, ours = getattr(loaded, part).state_dict(), getattr(mini, part).state_dict()
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, ours[name].bfloat16().float())
        assert not any(parameter.requires_grad for parameter in getattr(loaded, part).parameters())


def test_the_trunk_alone_takes_the_precision_asked_for(mini, tmp_path):
    save_mini(tmp_path / "mini.safetensors", mini)
    loaded = load_mini(tmp_path / "mini.safetensors", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.trunk.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.conditioner.parameters()} == {torch.float32}


def test_weights_over_the_block_codec_are_still_read(tmp_path):
    path = save_blocks(tmp_path / "blocks.safetensors", PixelCodec(torch.randn(48), torch.rand(48) + 0.1))
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, metadata | {"format": "ebr-engine mini 1"})
    restorer = Restorer(model=path, device="cpu", precision="fp32")
    assert isinstance(restorer.codec, PixelCodec)
    assert restorer.backbone.multiple == 8
    result = restorer.restore(torch.rand(3, 20, 30), t0=0.2)
    assert result.shape == (3, 20, 30)
    assert result.isfinite().all()


def test_missing_damaged_and_other_files_are_refused(mini, tmp_path):
    path = tmp_path / "mini.safetensors"
    with pytest.raises(BackboneError, match=r"cannot read the mini backbone from .*mini\.safetensors"):
        load_mini(path)
    save_mini(path, mini)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BackboneError, match="cannot read the mini backbone"):
        load_mini(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(BackboneError, match="is not a mini backbone"):
        load_mini(path)


def test_captions_become_ids_with_an_end_and_padding(encoder):
    ids = encoder.tokenize([(), ("haze", "blue"), ("strong",) * 20])
    assert ids.shape == (3, 16)
    assert ids[0].tolist() == [1] + [0] * 15
    assert ids[1].tolist() == [2, 4, 1] + [0] * 13
    assert ids[2].tolist() == [3] * 15 + [1]


def test_unknown_words_are_named(encoder):
    with pytest.raises(BackboneError, match=r"unknown caption word\(s\) fog, sepia"):
        encoder.tokenize([("haze", "fog", "sepia")])


def test_padding_is_zero_and_does_not_reach_the_words(encoder):
    ids = encoder.tokenize([(), ("haze", "blue")])
    context = encoder(ids)
    assert context.shape == (2, 16, 8)
    assert (context[0, 1:] == 0).all()
    assert (context[1, 3:] == 0).all()
    assert (context[1, :3].abs().sum(-1) > 0).all()
    with torch.no_grad():
        encoder.embedding.weight[0] += 10
    assert torch.equal(encoder(ids), context)


def test_captions_are_told_apart(encoder):
    one, two, three = encoder(encoder.tokenize([("haze", "blue"), ("blue", "haze"), ("haze", "strong")]))
    assert min((one - two).abs().max(), (one - three).abs().max()) > 0.1
