"""fp8 layers in a trunk: which, and how far the velocity moves."""

import pytest
import torch
from torch import nn

from ebr_engine.backbones.quantized import Fp8Linear, quantize_trunk, trunk_dtype


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


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.bfloat16)])
def test_a_precision_that_is_asked_for_is_taken(precision, dtype):
    assert trunk_dtype(precision, torch.device("cpu")) == dtype


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_automatic_precision_is_what_the_hardware_multiplies(has_bf16, dtype, monkeypatch):
    monkeypatch.setattr("ebr_engine.backbones.quantized.cpu_has_bf16", lambda: has_bf16)
    assert trunk_dtype("auto", torch.device("cpu")) == dtype
    assert trunk_dtype("auto", torch.device("cuda")) == torch.bfloat16
