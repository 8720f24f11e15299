"""A linear layer in fp8 whose programs make several tiles, operands coming through descriptors."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels import scaled_linear as module
from ebr_engine.kernels.quantize_fp8 import quantize_fp8
from ebr_engine.kernels.scaled_linear import bound_ref, scaled_linear_fp8_ref, scaled_linear_launch, scaled_linear_ref, usual_form
from ebr_engine.kernels.scaled_linear_persistent import FORMS, described

INTERPRETED = pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")
# Rows, depth, outputs. The interpreter's tiles are 32 × 64 × 32: the last has more of them than there are programs.
SHAPES = [(1, 16, 16), (33, 48, 80), (100, 160, 208)]


def layer(rows, depth, out):
    x, weight = quantize_fp8(torch.randn(rows, depth)), quantize_fp8(torch.randn(out, depth))
    return *x, *weight, torch.randn(out)


@INTERPRETED
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_it_is_the_product_of_the_dequantised_factors(form, shape, gelu, relative_rms):
    values, x_scale, weight, scale, bias = given = layer(*shape)
    result, _ = scaled_linear_launch(*given, None, gelu, torch.float32, form)
    expected = (values.double() * x_scale) @ (weight.double() * scale).T + bias.double()
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    assert result.shape == expected.shape
    assert relative_rms(result, expected) < 32 * torch.finfo(torch.float32).eps


@INTERPRETED
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_a_result_in_fp8_is_that_of_the_reference(form, shape, gelu):
    given = layer(*shape)
    bound = bound_ref(*given[2:])
    values, scale = scaled_linear_launch(*given, bound, gelu, torch.float8_e4m3fn, form)
    expected, expected_scale = scaled_linear_fp8_ref(*given, bound, gelu)
    torch.testing.assert_close(scale, expected_scale)
    # Float32 sums in another order move a number over the middle of two of e4m3's now and then: by one step of it.
    assert (values.float() == expected.float()).float().mean() > 0.99
    torch.testing.assert_close(values.float(), expected.float(), rtol=2**-3, atol=2**-9)


@INTERPRETED
@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_rounded_once(form, rounded_once):
    given = layer(40, 64, 96)
    result, _ = scaled_linear_launch(*given, None, False, torch.bfloat16, form)
    rounded_once(result, scaled_linear_ref(*given, False, torch.float64).double(), slack=1e-4)


@INTERPRETED
def test_rows_that_no_descriptor_takes_are_multiplied_in_tiles(monkeypatch):
    monkeypatch.setattr(module, "scaled_linear_persistent_launch", None)
    for shape in ((5, 33, 16), (5, 32, 17), (0, 32, 16)):
        given = layer(*shape)
        result, _ = scaled_linear_launch(*given, None, False, torch.bfloat16, "persistent")
        expected = scaled_linear_ref(*given, False, torch.bfloat16)
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-2)


def test_what_descriptors_ask_of_addresses_and_rows():
    x, weight = torch.zeros(8, 32, dtype=torch.float8_e4m3fn), torch.zeros(16, 32, dtype=torch.float8_e4m3fn)
    assert described(x, weight, 32)
    assert not described(x, weight, 24)
    assert not described(x[:0], weight, 32)
    shifted = torch.zeros(8 * 32 + 1, dtype=torch.float8_e4m3fn)[1:].view(8, 32)
    assert not described(shifted, weight, 32)


@pytest.mark.parametrize(
    ("capability", "rows", "form"),
    [(9, 14040, "persistent"), (9, 512, "tiles"), (10, 14040, "specialized"), (8, 14040, "tiles"), (12, 14040, "tiles")],
)
def test_the_form_goes_by_capability_and_rows(capability, rows, form):
    assert usual_form(capability, rows) == form


def test_a_gpus_table_may_name_a_form(monkeypatch):
    monkeypatch.setattr(module, "choices", lambda device: {(1024, 64, 32, "gelu_fp8"): "specialized"})
    assert module.implementation("a GPU", 1000, torch.empty(32, 64), "gelu_fp8") == "specialized"
    assert module.implementation("a GPU", 1000, torch.empty(48, 64), "gelu_fp8") == "triton"
