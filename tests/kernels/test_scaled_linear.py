"""A linear layer in fp8."""

import pytest
import torch

from ebr_engine.kernels.quantize_fp8 import quantize_fp8
from ebr_engine.kernels.scaled_linear import scaled_linear, scaled_linear_ref

SHAPES = [((1, 1), 1), ((5, 33), 7), ((2, 3, 17), 40), ((2, 9, 160), 24)]


def layer(shape, out):
    """Activations, fp8 weight and its scale, bias, and the weight as it was."""
    weight = torch.randn(out, shape[-1])
    return torch.randn(shape), *quantize_fp8(weight), torch.randn(out), weight.double()


def half_step(x):
    """Largest error of an element after quantisation by row: see test_quantize_fp8."""
    return torch.maximum(x.abs() * 2**-4, x.abs().amax(-1, keepdim=True) / 448 * 2**-10)


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_it_is_the_product_of_the_dequantised_factors(shape, out, relative_rms):
    x, weight, scale, bias, _ = layer(shape, out)
    values, x_scale = quantize_fp8(x)
    expected = (values.double() * x_scale) @ (weight.double() * scale).T + bias.double()
    for result in (scaled_linear(x, weight, scale, bias), scaled_linear_ref(values, x_scale, weight, scale, bias, x.dtype)):
        assert result.dtype == torch.float32
        assert relative_rms(result, expected) < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_it_is_as_near_to_the_exact_product_as_fp8_allows(shape, out):
    x, weight, scale, bias, exact = layer(shape, out)
    error = (scaled_linear(x, weight, scale, bias).double() - (x.double() @ exact.T + bias)).abs()
    wide = x.double()
    own, other = half_step(wide), half_step(exact)
    bound = own @ exact.abs().T + wide.abs() @ other.T + own @ other.T
    assert (error <= bound + 1e-5).all()


def test_its_error_is_that_of_independent_roundings(relative_rms):
    x, weight, scale, _, exact = layer((64, 512), 96)
    error = relative_rms(scaled_linear(x, weight, scale, torch.zeros(96)), x.double() @ exact.T)
    # An element's error is even within ±2^-4 to ±2^-5 of it, √3 below that in RMS, and two factors add in squares.
    assert 2**-5 / 3**0.5 < error < 2**-4 / 3**0.5 * 2**0.5


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_bf16_stays_bf16(shape, out, relative_rms):
    x, weight, scale, bias, _ = layer(shape, out)
    x = x.bfloat16()
    values, x_scale = quantize_fp8(x)
    expected = (values.double() * x_scale) @ (weight.double() * scale).T + bias.double()
    result = scaled_linear(x, weight, scale, bias)
    assert result.dtype == torch.bfloat16
    assert result.shape == (*shape[:-1], out)
    assert relative_rms(result, expected) < 4 * 2**-8  # roundings of both factors, the bias and the sum


def test_a_row_of_zeros_gives_the_bias():
    x, weight, scale, bias, _ = layer((3, 16), 5)
    x[1] = 0
    torch.testing.assert_close(scaled_linear(x, weight, scale, bias)[1], bias)


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_the_gradient_passes_to_the_input_as_if_it_had_not_been_rounded(size, relative_rms):
    x, weight, scale, bias, _ = layer((6, 33), 7)
    pull = size * torch.randn(6, 7)
    scaled_linear(x.requires_grad_(), weight, scale, bias).backward(pull)
    assert relative_rms(x.grad, pull.double() @ (weight.double() * scale)) < 1e-5
