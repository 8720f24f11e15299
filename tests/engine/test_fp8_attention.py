"""`--fp8-attention`: what it changes, where it goes, and what a device without it is told."""

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.backbones.layers import check_fp8_attention, has_fp8_attention, safer_trunk
from ebr_engine.errors import BackboneError
from tests.tiny import make_prompt, picture, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("fp8") / "tiny.safetensors", attention_head_dim=16, ffn_dim=64)


@pytest.fixture(scope="module")
def prompt():
    return make_prompt(width=32)


def restorer(model, **options):
    return Restorer(model=model, device="cpu", **{"precision": "fp32", "compile": "off"} | options)


def test_a_cpu_emulates_it_and_says_so(model, prompt):
    exact = restorer(model).restore(picture(), prompt=prompt)
    with pytest.warns(UserWarning, match="emulated"):
        eight_bits = restorer(model, fp8_attention=True)
    assert has_fp8_attention(eight_bits.trunk)
    found = eight_bits.restore(picture(), prompt=prompt)
    assert 0 < (found - exact).abs().max() < 0.02


@pytest.mark.filterwarnings("ignore:.*emulated")
def test_an_engine_file_keeps_it(model, prompt, tmp_path):
    made = restorer(model, fp8_attention=True)
    plan = made.plan(prompt=prompt)
    made.build(tmp_path / "a.ebr", plan, {})
    loaded = Restorer.from_engine(tmp_path / "a.ebr", device="cpu", compile="off")
    assert has_fp8_attention(loaded.trunk)
    assert torch.equal(loaded.restore(picture()), made.run(picture(), plan))


@pytest.mark.filterwarnings("ignore:.*emulated")
def test_a_safer_trunk_attends_exactly(model):
    trunk = restorer(model, fp8_attention=True).trunk
    safer = safer_trunk(trunk)
    assert not has_fp8_attention(safer)
    assert has_fp8_attention(trunk)
    assert safer_trunk(safer) is None  # it is float32 already


def test_a_gpu_without_it_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(BackboneError, match=r"8\.9 or newer.*leave it out"):
        check_fp8_attention(torch.device("cuda", 7))  # a number that no other test asks of
    with pytest.raises(BackboneError, match="mps"):
        check_fp8_attention(torch.device("mps"))
