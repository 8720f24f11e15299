"""Rows to e4m3 with a scale."""

import pytest
import torch

from ebr_engine.kernels.quantize_fp8 import Quantized, quantize_fp8, quantize_fp8_ref

OPS = pytest.mark.parametrize("op", [quantize_fp8, quantize_fp8_ref])
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
VALUES = CODES[CODES.isfinite()].unique()  # every number of the format


def rows(*shape):
    """Rows of very different sizes, whose numbers span from subnormal to the row's largest."""
    return torch.randn(shape) * 10.0 ** torch.randint(-4, 1, shape) * 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1))


def test_the_format_is_e4m3():
    assert VALUES.max() == 448
    assert VALUES[VALUES > 0].min() == 2**-9
    assert len(VALUES) == 253


@OPS
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 17), (3, 1536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_element_gets_the_nearest_number_at_its_rows_scale(op, shape, dtype):
    x = rows(*shape).to(dtype)
    values, scale = op(x)
    assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert values.shape == shape
    torch.testing.assert_close(scale.double(), x.double().abs().amax(-1, keepdim=True) / 448, rtol=1e-6, atol=0)
    wanted = x.double() / scale.double()
    distance = (values.double() - wanted).abs()
    nearest = (wanted.unsqueeze(-1) - VALUES).abs().amin(-1)
    assert (distance <= nearest + 1e-6 * wanted.abs()).all()  # float32 division moves what lies at a middle


@OPS
def test_the_error_is_half_a_step_of_the_format(op):
    x = rows(16, 257)
    values, scale = op(x)
    error = (values.double() * scale.double() - x.double()).abs()
    # Three fraction bits: half a step is 2^-4 of a normal number, and 2^-10 of the scale below 2^-6, where steps are even.
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double() * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > bound / 2).any()  # and no smaller


@OPS
def test_halfway_values_go_to_the_even_one(op):
    values, scale = op(torch.tensor([[448.0, 17.0, 19.0, -17.0, 2**-10, 3 * 2**-10]]))
    assert scale.item() == 1
    assert values.float().tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2 * 2**-9]]


@OPS
def test_the_largest_of_a_row_is_the_largest_of_the_format(op):
    values, _ = op(rows(20, 33))
    assert (values.float().abs().amax(-1) == 448).all()


@OPS
def test_rows_of_zeros_and_of_almost_nothing_stay_finite(op):
    x = torch.zeros(3, 8)
    x[1] = 1e-30
    x[2, 0] = 1.0
    values, scale = op(x)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (values[0].float() == 0).all()
    back = values.float() * scale
    assert back.isfinite().all()
    assert back[1].abs().max() <= 1e-12
    torch.testing.assert_close(back[2], x[2])


def test_every_implementation_gives_the_same_bits():
    x = rows(20, 257)
    values, scale = quantize_fp8(x)
    expected = quantize_fp8_ref(x)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(values.view(torch.uint8), expected.values.view(torch.uint8))


@OPS
def test_what_is_not_a_number_stays_so(op):
    x = rows(3, 33)
    x[1, 5] = torch.nan
    x[2, 5] = torch.inf
    values, scale = op(x)
    back = values.float() * scale
    assert back[0].isfinite().all()
    assert back[1, 5].isnan()
    assert not back[2, 5].isfinite()


@OPS
def test_views_and_nothing_are_quantised(op):
    x = rows(5, 2, 12)
    view = op(x.transpose(0, 1))
    assert torch.equal(view.values.view(torch.uint8), op(x).values.view(torch.uint8).transpose(0, 1))
    assert isinstance(view, Quantized)
    for shape in ((0, 12), (2, 0, 12)):
        values, scale = op(torch.randn(shape))
        assert (values.shape, scale.shape) == (shape, (*shape[:-1], 1))


@OPS
def test_rows_do_not_share_a_scale(op):
    x = rows(6, 40)
    values, scale = op(x)
    for i in range(6):
        alone, own = op(x[i : i + 1])
        assert torch.equal(alone[0].view(torch.uint8), values[i].view(torch.uint8))
        assert torch.equal(own[0], scale[i])
