"""A run that is not finite is made again in the next safer precision, and told in one line."""

from dataclasses import replace

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.backbones.layers import quantised_as, safer_trunk
from ebr_engine.engine.fallback import Safety
from ebr_engine.errors import EngineError, EngineWarning
from tests.tiny import make_prompt


def engine(weights, precision):
    return Restorer(model=weights, device="cpu", precision=precision)


def enlarge(restorer):
    """Make a layer's output too large for fp16; a norm follows it, so that the function stays the same."""
    layer = restorer.trunk.blocks[0].cross_q
    with torch.no_grad():
        layer.weight.mul_(3e4 / layer.weight.abs().max().item())
        layer.bias.zero_()
    return restorer


def image():
    return torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(5)) * 0.4 + 0.3


def test_what_overflows_in_fp16_is_made_again_in_fp32(weights, recwarn):
    expected = enlarge(engine(weights, "fp32")).restore(image(), prompt=make_prompt())
    narrow = enlarge(engine(weights, "fp16"))
    assert narrow.trunk.blocks[0].cross_q.weight.isfinite().all()
    assert not recwarn.list
    with pytest.warns(EngineWarning, match="not finite in fp16; it was made again in fp32") as told:
        result = narrow.restore(image(), prompt=make_prompt())
    assert len(told) == 1
    assert (result - expected).norm() / expected.norm() < 1e-2  # the weights stay what fp16 made of them
    assert narrow.dtype == torch.float16  # the next picture is tried as fast


def test_an_engine_file_is_made_again_from_its_own_tables(weights, tmp_path):
    narrow = enlarge(engine(weights, "fp16"))
    narrow.build(tmp_path / "x.ebr", narrow.plan(prompt=make_prompt()))
    with pytest.warns(EngineWarning, match="made again in fp32"):
        expected = narrow.restore(image(), prompt=make_prompt())
    with pytest.warns(EngineWarning, match="made again in fp32"):
        result = Restorer.from_engine(tmp_path / "x.ebr", device="cpu").restore(image())
    assert (result - expected).norm() / expected.norm() < 1e-2


def test_one_precision_after_another_is_tried(weights):
    one = engine(weights, "fp8")
    tried = []

    def spoil(trunk, _, velocity):
        tried.append("fp8" if quantised_as(trunk) else next(trunk.parameters()).dtype)
        return velocity if tried[-1] == torch.float32 else velocity * torch.nan

    one.trunk.register_forward_hook(spoil)
    with pytest.warns(EngineWarning, match="not finite in fp8; it was made again in fp32"):
        assert one.restore(image(), prompt=make_prompt()).isfinite().all()
    assert list(dict.fromkeys(tried)) == list(dict.fromkeys(["fp8", one.dtype, torch.float32]))


def test_where_no_precision_helps_the_request_fails_in_one_line(weights):
    one = engine(weights, "fp16")
    one.trunk.register_forward_hook(lambda *given: given[-1] * torch.inf)
    with pytest.raises(EngineError, match="not finite, in float32 either"):
        one.restore(image(), prompt=make_prompt())


def test_what_is_not_the_transformers_fault_is_told(weights):
    one = engine(weights, "fp16")
    one.codec.encode = lambda pixels: torch.full((1, 192, 1, 3, 5), torch.nan)
    with pytest.raises(EngineError, match="codec"):
        one.restore(image(), prompt=make_prompt())


def test_an_exported_transformer_cannot_change_its_precision(weights):
    one = engine(weights, "fp32")
    safety = Safety(replace(one.backbone, trunk=lambda *_: None))
    with pytest.raises(EngineError, match="not finite in fp32, and this transformer cannot change"):
        safety.run(one.plan(prompt=make_prompt()), torch.zeros(1), torch.zeros(1))


def test_a_safer_copy_computes_the_same_and_leaves_the_trunk(weights, relative_rms):
    exact = engine(weights, "fp32")
    step = exact.plan(prompt=make_prompt()).tables[0][1]
    latent = torch.randn(1, 192, 1, 3, 5)
    narrow = engine(weights, "fp8").trunk
    dense = safer_trunk(narrow)
    assert quantised_as(narrow)
    assert not quantised_as(dense)
    assert safer_trunk(exact.trunk) is None
    with torch.no_grad():
        assert relative_rms(safer_trunk(dense.to(torch.bfloat16))(latent, step), exact.trunk(latent, step)) < 2**-4
