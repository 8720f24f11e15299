"""fp8 and int8 layers in a trunk: which, and how far the velocity moves."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.model import FluxTrunk
from ebr_engine.backbones.flux2.model import Flux2Conditioner
from ebr_engine.backbones.layers import (
    Fp8Linear,
    Int8Linear,
    dense_weight,
    feed_forward,
    quantised_as,
    quantised_for,
    quantize_trunk,
    safer_trunk,
    taken_precision,
    takes_fp8,
    trunk_dtype,
)
from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.errors import BackboneError, EngineWarning
from ebr_engine.kernels.int8_linear import can_int8
from ebr_engine.kernels.quantize_fp8 import quantize_fp8
from tests.tiny import TINY_FLUX2


def test_a_layer_is_the_linear_one_to_fp8s_precision(relative_rms):
    linear = nn.Linear(96, 40)
    layer = Fp8Linear(linear)
    x = torch.randn(2, 7, 96)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert not list(layer.parameters())  # nothing to train
    # Both factors' roundings: even within 2^-4 of an element at most, √3 below that in RMS, added in squares.
    error = relative_rms(layer(x) - linear.bias, linear(x) - linear.bias)
    assert 2**-7 < error < 2**-4 * (2 / 3) ** 0.5


def test_only_the_large_linears_of_the_blocks_are_quantised(make_wan):
    _, _, trunk = make_wan()
    before = {name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    assert quantize_trunk(trunk) == 4 * len(trunk.blocks)
    quantised = {name for name, module in trunk.named_modules() if isinstance(module, Fp8Linear)}
    assert quantised == {f"blocks.{i}.{name}" for i in range(3) for name in ("qkv", "out", "up", "down")}
    left = {name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    assert left == before - quantised
    assert {"patch_in", "patch_out", "blocks.0.cross_q", "blocks.0.cross_out"} <= left


def test_the_velocity_moves_little(make_wan, relative_rms):
    _, conditioner, trunk = make_wan()
    step = conditioner(torch.tensor([399.0]), torch.randn(9, 10))[0]
    latent = torch.randn(1, 4, 2, 6, 6)
    exact = trunk(latent, step)
    quantize_trunk(trunk)
    # Three blocks with three quantised branches each, every one off by at most 2^-4·√(2/3) of itself, independently.
    assert 2**-9 < relative_rms(trunk(latent, step), exact) < 2**-4 * (2 / 3) ** 0.5 * 9**0.5


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_precision_that_is_asked_for_is_taken(precision, dtype):
    assert trunk_dtype(precision, torch.device("cpu")) == dtype


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_automatic_precision_is_what_the_hardware_multiplies(has_bf16, dtype, monkeypatch):
    monkeypatch.setattr("ebr_engine.backbones.layers.cpu_has_bf16", lambda: has_bf16)
    assert trunk_dtype("auto", torch.device("cpu")) == dtype
    assert trunk_dtype("fp8", torch.device("cpu")) == dtype
    assert trunk_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_fluxs_blocks_are_quantised_in_both_streams():
    sizes = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2}
    trunk = FluxTrunk(FluxConfig(**sizes, axes_dims_rope=(4, 2, 2)))
    before = {name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    assert quantize_trunk(trunk) == 8 * len(trunk.double_blocks) + 3 * len(trunk.single_blocks)
    assert {name for name in before if isinstance(trunk.get_submodule(name), nn.Linear)} == {"image_in", "image_out"}


@torch.no_grad()
def test_flux2s_gated_blocks_are_quantised_and_the_velocity_moves_little(relative_rms):
    conditioner, trunk = Flux2Conditioner(TINY_FLUX2), FluxTrunk(TINY_FLUX2)
    for weight in conditioner.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # branches count for something
    prompt = torch.randn(5, TINY_FLUX2.width), torch.rand(TINY_FLUX2.blocks)
    step = conditioner.bake(trunk, torch.tensor([399.0]), {"context": torch.randn(7, 10)}, [prompt])[0]
    latent = torch.randn(2, 16, 1, 3, 5)
    exact = trunk(latent, step)
    assert quantize_trunk(trunk) == 8 * len(trunk.double_blocks) + 3 * len(trunk.single_blocks)
    assert not trunk.single_blocks[0].out.bias.any()
    # Three blocks with at most three quantised branches each, every one off by at most 2^-4·√(2/3) of itself, independently.
    assert 2**-9 < relative_rms(trunk(latent, step), exact) < 2**-4 * (2 / 3) ** 0.5 * 9**0.5


def test_a_layer_made_of_its_tensors_is_the_same():
    layer = Fp8Linear(nn.Linear(32, 8))
    again = Fp8Linear.from_tensors(layer.weight, layer.scale, layer.bias)
    x = torch.randn(5, 32)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again.bound, layer.bound)
    assert torch.equal(dense_weight(again), layer.weight.float() * layer.scale)


def test_loaded_weights_bring_their_bound():
    layer, other = Fp8Linear(nn.Linear(32, 8)), Fp8Linear(nn.Linear(32, 8))
    other.scale.mul_(10)
    layer.load_state_dict(other.state_dict())
    again = Fp8Linear.from_tensors(other.weight, other.scale, other.bias)
    assert torch.equal(layer.bound, again.bound)
    assert set(layer.state_dict()) == {"weight", "scale", "bias"}


def test_a_quantised_input_is_not_quantised_again():
    layer = Fp8Linear(nn.Linear(32, 8))
    x = torch.randn(5, 32)
    assert torch.equal(layer(quantize_fp8(x)), layer(x))


@torch.no_grad()
def test_the_fused_feed_forward_is_as_near_as_two_roundings_allow(relative_rms):
    up, down, x = nn.Linear(64, 200), nn.Linear(200, 48), torch.randn(9, 64)
    exact = feed_forward(up, down, x)
    up, down = Fp8Linear(up), Fp8Linear(down)
    assert takes_fp8(up, down)
    apart = down(nn.functional.gelu(up(x), approximate="tanh"))
    fused = feed_forward(up, down, quantize_fp8(x))
    error = relative_rms(fused, exact)
    assert 2**-7 < error < 2**-4 * (4 / 3) ** 0.5  # four roundings, independent
    assert error < 1.2 * relative_rms(apart, exact)  # the bound in place of each row's maximum costs little


def test_learning_goes_through_unfused_layers():
    up, down = Fp8Linear(nn.Linear(16, 24)), Fp8Linear(nn.Linear(24, 8))
    assert not takes_fp8(up, down)
    x = torch.randn(3, 16, requires_grad=True)
    feed_forward(up, down, x).sum().backward()
    assert x.grad.abs().sum() > 0


@torch.no_grad()
def test_the_bundled_backbones_hidden_layers_may_be_quantised_by_a_bound(relative_rms):
    mini = load_mini()
    inputs = []
    for block in mini.trunk.blocks:
        block.up.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    mini.trunk(2 * torch.randn(1, 192, 1, 8, 9), mini.conditioner(torch.tensor([150.0]), mini.context)[0])
    assert len(inputs) == 6
    for block, x in zip(mini.trunk.blocks, inputs):
        exact = feed_forward(block.up, block.down, x) - block.down.bias
        up, down = Fp8Linear(block.up), Fp8Linear(block.down)
        apart = down(nn.functional.gelu(up(x), approximate="tanh")) - block.down.bias
        fused = feed_forward(up, down, x) - block.down.bias
        assert relative_rms(fused, exact) < 1.15 * relative_rms(apart, exact)


@pytest.mark.skipif(not can_int8(), reason="this CPU has no int8 products")
def test_int8_layers_are_those_of_fp8_and_move_the_velocity_less(make_wan, relative_rms):
    _, conditioner, trunk = make_wan()
    step = conditioner(torch.tensor([399.0]), torch.randn(9, 10))[0]
    latent = torch.randn(1, 4, 2, 6, 6)
    exact = trunk(latent, step)
    names = set(trunk.state_dict())
    assert quantize_trunk(trunk, Int8Linear) == 4 * len(trunk.blocks)
    assert quantised_as(trunk) == "int8"
    error = relative_rms(trunk(latent, step), exact)
    assert 1e-4 < error < 0.02  # layers of 24 to 40 inputs: steps of a 127th of the largest
    assert set(trunk.state_dict()) == names  # of ordinary layers
    wider = safer_trunk(trunk)
    assert quantised_as(wider) is None
    assert relative_rms(wider(latent, step), exact) < error
    assert quantised_as(copy.deepcopy(trunk)) == "int8"


@pytest.mark.parametrize("has_int8", [True, False])
def test_fp8_is_int8_where_a_cpu_restores_and_says_so(has_int8, monkeypatch):
    monkeypatch.setattr("ebr_engine.backbones.layers.can_int8", lambda: has_int8)
    assert quantised_for("fp8", torch.device("cuda")) == "fp8"
    assert quantised_for("bf16", torch.device("cpu")) == "bf16"
    with pytest.warns(EngineWarning, match="int8 here") if has_int8 else nullcontext():
        assert quantised_for("fp8", torch.device("cpu")) == ("int8" if has_int8 else "fp8")


def test_int8_is_refused_on_a_gpu_and_left_out_where_there_are_no_products(monkeypatch):
    with pytest.raises(BackboneError, match="fp8"):
        taken_precision("int8", torch.device("cuda"))
    monkeypatch.setattr("ebr_engine.backbones.layers.can_int8", lambda: False)
    with pytest.warns(EngineWarning, match="no int8 products"):
        assert taken_precision("int8", torch.device("cpu")) == "auto"
