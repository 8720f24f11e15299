"""int8 linear layers: oneDNN's against the formula in float64, on odd shapes, where products of 8 bits saturate too."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import int8_linear as op
from ebr_engine.kernels.int8_linear import Int8Weight, activation_levels, can_int8, int8_linear, int8_linear_ref, quantize_rows

pytestmark = pytest.mark.skipif(not can_int8(), reason="this CPU has no int8 products")
SHAPES = [((7, 33), 5), ((2, 3, 64), 48), ((1, 16), 1), ((40, 257), 96)]


def made(shape, out, dtype=torch.float32):
    weight, bias = torch.randn(out, shape[-1]) * shape[-1] ** -0.5, torch.randn(out)
    return torch.randn(shape, dtype=dtype), weight, bias


@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_it_is_the_formula(shape, out, gelu, levels, monkeypatch, relative_rms):
    if levels > activation_levels():
        pytest.skip("products of 8 bits saturate here")
    monkeypatch.setattr(op, "activation_levels", lambda: levels)
    x, weight, bias = made(shape, out)
    rows, scale = quantize_rows(weight, 127)
    exact = int8_linear_ref(x, rows, scale.squeeze(-1), bias, gelu, levels)
    assert relative_rms(int8_linear(x, Int8Weight(weight), bias, gelu), exact) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_bf16_is_rounded_once(shape, out, relative_rms):
    x, weight, bias = made(shape, out, torch.bfloat16)
    rows, scale = quantize_rows(weight, 127)
    exact = int8_linear_ref(x.float(), rows, scale.squeeze(-1), bias.bfloat16().float(), False, activation_levels())
    result = int8_linear(x, Int8Weight(weight), bias.bfloat16())
    assert result.dtype == torch.bfloat16
    assert relative_rms(result.float(), exact) < 2**-8


@pytest.mark.parametrize(("levels", "most"), [(127, 0.013), (63, 0.019)])
def test_what_rounding_costs_is_what_two_uniform_errors_are(levels, most, relative_rms):
    x, weight, bias = made((200, 512), 256)
    rows, scale = quantize_rows(weight, 127)
    # A row's largest of 512 normal numbers is about 3.1, its step that by the levels, and the error step / √12, twice.
    error = relative_rms(int8_linear_ref(x, rows, scale.squeeze(-1), 0 * bias, False, levels), F.linear(x, weight))
    assert most / 2 < error < most


def test_rows_of_zeros_and_no_rows_are_taken():
    weight, bias = Int8Weight(torch.zeros(3, 8)), torch.tensor([1.0, -2.0, 0.5])
    assert torch.equal(int8_linear(torch.zeros(2, 8), weight, bias), bias.expand(2, 3))
    assert int8_linear(torch.zeros(0, 8), weight, bias).shape == (0, 3)


def test_a_weight_comes_back_as_it_was_rounded():
    weight = torch.randn(20, 33)
    rows, scale = quantize_rows(weight, 127)
    torch.testing.assert_close(Int8Weight(weight).dense(), rows * scale, rtol=1e-6, atol=0)


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, bias = made((9, 64), 32)
    weight = Int8Weight(weight)
    louder = x.clone()
    louder[4:] *= 100
    assert torch.equal(int8_linear(x, weight, bias)[:4], int8_linear(louder, weight, bias)[:4])


def test_the_operator_is_registered_rightly():
    x, weight, bias = made((6, 32), 16)
    packed = Int8Weight(weight)
    torch.library.opcheck(op.int8_linear_op, (x, packed.number, bias, False), test_utils=("test_schema", "test_faketensor"))


def test_where_int16_saturates_activations_have_seven_bits():
    """oneDNN kept from all that has no such step, in another process, and told to use what remains."""
    code = """
import torch
from ebr_engine.kernels.int8_linear import *
torch.manual_seed(0)
x, weight, bias = torch.rand(64, 256) + 1, torch.ones(32, 256), torch.zeros(32)  # the worst: all of one sign, all large
rows, scale = quantize_rows(weight, 127)
exact = int8_linear_ref(x, rows, scale.squeeze(-1), bias, False, activation_levels())
print(activation_levels(), ((int8_linear(x, Int8Weight(weight), bias) - exact).norm() / exact.norm()).item())
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    levels, error = done.stdout.split()
    assert int(levels) in (127, 63)
    assert float(error) < 1e-6
