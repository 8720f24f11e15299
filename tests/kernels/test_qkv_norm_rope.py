"""The projection to q, k and v with norm, rotation and heads in its epilogue."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope_ref
from ebr_engine.kernels.qkv_norm_rope import fits, named_form, qkv_norm_rope, qkv_norm_rope_launch, qkv_norm_rope_op
from ebr_engine.kernels.quantize_fp8 import quantize_fp8

INTERPRETED = pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")
SHAPES = [(1, 1, 1, 16), (2, 21, 2, 48), (1, 70, 1, 96)]  # batch, tokens, heads of 64, inputs


def inputs(batch, tokens, heads, depth, length):
    width, angle = 64 * heads, torch.randn(tokens, 32)
    x, weight = torch.randn(batch, tokens, depth), torch.randn(3 * width, depth)
    rows = torch.randn(length, 3 * width) if length else None
    return x, weight, torch.randn(3 * width), [torch.rand(64), torch.rand(64), angle.cos(), angle.sin(), heads, 1e-6, rows]


def formula(x, weight, bias, rest):
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in rest]
    return qk_norm_rope_ref(x.double() @ weight.double().T + bias.double(), *wide)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompted", [False, True])
def test_it_is_the_product_and_the_pass(shape, prompted, relative_rms):
    x, weight, bias, rest = inputs(*shape, length=(shape[1] + 1) // 2 if prompted else 0)
    found = qkv_norm_rope(x, weight, None, bias, *rest)
    for value, expected in zip(found, formula(x, weight, bias, rest)):
        assert value.shape == (shape[0], shape[2], shape[1], 64)
        assert relative_rms(value, expected) < 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_factors_are_multiplied_as_they_are(shape, relative_rms):
    x, weight, bias, rest = inputs(*shape, length=1)
    quantised, (matrix, scale) = quantize_fp8(x), quantize_fp8(weight)
    exact = quantised.values.double() * quantised.scale, matrix.double() * scale
    for value, expected in zip(qkv_norm_rope(quantised, matrix, scale, bias, *rest), formula(*exact, bias, rest)):
        assert relative_rms(value, expected) < 32 * torch.finfo(torch.float32).eps


def test_rows_may_be_each_samples_own(relative_rms):
    x, weight, bias, rest = inputs(2, 5, 2, 48, length=0)
    rest[-1] = torch.randn(2, 3, 3 * 128)
    for value, expected in zip(qkv_norm_rope(x, weight, None, bias, *rest), formula(x, weight, bias, rest)):
        assert relative_rms(value, expected) < 32 * torch.finfo(torch.float32).eps


@INTERPRETED
def test_both_forms_write_the_same():
    x, weight, bias, rest = inputs(1, 37, 2, 48, length=4)
    results = [qkv_norm_rope_launch(x, None, weight, None, bias, *rest, form) for form in ("persistent", "specialized")]
    assert torch.equal(*results)


def test_it_is_one_operation_to_torch():
    x, weight, bias, rest = inputs(2, 5, 2, 48, length=2)
    torch.library.opcheck(qkv_norm_rope_op, (x, None, weight, None, bias, *rest))


def test_what_the_kernel_takes():
    x, weight, _, rest = inputs(1, 5, 2, 48, length=0)
    assert fits(x, weight, rest[0], 2)
    assert not fits(x, weight, torch.rand(128), 2)  # a norm across heads
    assert not fits(x[..., :47], weight, rest[0], 2)  # rows of 188 bytes
    assert not fits(x, weight, torch.rand(32), 4)
    assert named_form(x, weight) is None  # a CPU has no table
