"""A linear layer in fp8."""

import json

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import scaled_linear as module
from ebr_engine.kernels.quantize_fp8 import quantize_fp8
from ebr_engine.kernels.scaled_linear import bound_ref, choices, implementation, scaled_linear, scaled_linear_ref

# The last fills tiles in all three directions and has some more of each.
SHAPES = [((1, 1), 1), ((5, 33), 7), ((2, 3, 17), 40), ((2, 9, 160), 24), ((129, 256), 200)]


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
    for result in (
        scaled_linear(x, weight, scale, bias),
        scaled_linear_ref(values, x_scale, weight, scale, bias, False, x.dtype),
    ):
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


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_gelu_ends_the_product(shape, out, relative_rms):
    x, weight, scale, bias, _ = layer(shape, out)
    values, x_scale = quantize_fp8(x)
    product = (values.double() * x_scale) @ (weight.double() * scale).T + bias.double()
    result = scaled_linear(x, weight, scale, bias, gelu=True)
    assert relative_rms(result, F.gelu(product, approximate="tanh")) < 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_a_result_in_fp8_is_the_product_rounded_once_and_never_overflows(shape, out, gelu):
    x, weight, scale, bias, _ = layer(shape, out)
    quantised = quantize_fp8(x)
    product = (quantised.values.double() * quantised.scale) @ (weight.double() * scale).T + bias.double()
    product = F.gelu(product, approximate="tanh") if gelu else product
    values, row_scale = scaled_linear(quantised, weight, scale, bias, gelu=gelu, fp8_out=True)
    assert values.dtype == torch.float8_e4m3fn
    assert (product.abs() <= 448 * row_scale.double()).all()  # a bound, so nothing saturates
    error = (values.double() * row_scale - product).abs()
    # Half a step of e4m3: 2^-4 of a normal number, 2^-10 of the scale below 2^-6.
    half = torch.maximum(product.abs() * 2**-4, row_scale.double() * 2**-10)
    assert (error <= half * 1.0001 + 1e-6).all()


def test_the_bound_holds_for_rows_that_reach_it():
    weight, scale = quantize_fp8(torch.ones(4, 32))
    bias = torch.full((4,), 3.0)
    x = quantize_fp8(torch.full((2, 32), 5.0))
    values, row_scale = scaled_linear(x, weight, scale, bias, fp8_out=True, bound=bound_ref(weight, scale, bias))
    torch.testing.assert_close(values.float() * row_scale, torch.full((2, 4), 163.0), rtol=2**-4, atol=0)
    assert values.float().abs().max() > 224  # no binade is given away


def test_what_ends_in_fp8_has_no_gradient():
    x, weight, scale, bias, _ = layer((3, 16), 5)
    x.requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        scaled_linear(x, weight, scale, bias, fp8_out=True, bound=bound_ref(weight, scale, bias))


def test_no_rows_give_no_rows():
    x, weight, scale, bias, _ = layer((0, 16), 5)
    assert scaled_linear(x, weight, scale, bias).shape == (0, 5)
    assert scaled_linear(x, weight, scale, bias, fp8_out=True, bound=bound_ref(weight, scale, bias)).values.shape == (0, 5)


def test_the_gradient_passes_through_gelu(relative_rms):
    x, weight, scale, bias, _ = layer((6, 33), 7)
    pull = torch.randn(6, 7)
    scaled_linear(x.requires_grad_(), weight, scale, bias, gelu=True).backward(pull)
    matrix = weight.double() * scale
    values, x_scale = quantize_fp8(x.detach())
    y = ((values.double() * x_scale) @ matrix.T + bias).requires_grad_()
    F.gelu(y, approximate="tanh").backward(pull.double())
    assert relative_rms(x.grad, y.grad @ matrix) < 1e-5


def test_a_quantised_input_gives_bf16_unless_told():
    x, weight, scale, bias, _ = layer((3, 16), 5)
    assert scaled_linear(quantize_fp8(x), weight, scale, bias).dtype == torch.bfloat16
    wide = scaled_linear(quantize_fp8(x), weight, scale, bias, dtype=torch.float32)
    assert torch.equal(wide, scaled_linear(x, weight, scale, bias))


@pytest.mark.parametrize("channel", [1, 30, 300])
def test_the_bound_costs_no_precision_however_loose_it_is(channel, relative_rms):
    """Wan's feed-forward width, with one channel of the input much larger than the rest."""
    x, weight = torch.randn(32, 1536), quantize_fp8(torch.randn(256, 1536) * 1536**-0.5)
    x[:, 7] *= channel
    quantised, bias = quantize_fp8(x), torch.randn(256) / 10
    exact = scaled_linear(quantised, *weight, bias, gelu=True, dtype=torch.float32)
    bounded = scaled_linear(quantised, *weight, bias, gelu=True, fp8_out=True)
    tight = quantize_fp8(exact)
    assert (bounded.scale > 10 * tight.scale).all()
    errors = [relative_rms(values.float() * scale, exact) for values, scale in (bounded, tight)]
    assert errors[0] < 1.1 * errors[1]  # the row's maximum is a number of the format, so its largest value has no error


@pytest.fixture
def tables(tmp_path):
    """A folder with one GPU's table; `choices` reads from it."""
    entries = [
        {"rows": 1024, "k": 64, "n": 32, "epilogue": "none", "implementation": "triton"},
        {"rows": 1024, "k": 64, "n": 32, "epilogue": "gelu_fp8", "implementation": "library"},
    ]
    table = {"device": "NVIDIA H100 80GB HBM3", "choices": entries}
    (tmp_path / "scaled_linear_nvidia_h100_80gb_hbm3.json").write_text(json.dumps(table))
    return tmp_path


def test_a_gpus_table_is_found_by_its_name(tables):
    table = choices("NVIDIA H100 80GB HBM3", tables)
    assert table == {(1024, 64, 32, "none"): "triton", (1024, 64, 32, "gelu_fp8"): "library"}
    assert choices("NVIDIA H200", tables) == {}


@pytest.mark.parametrize(
    ("rows", "shape", "ending", "library"),
    [
        (1000, (32, 64), "none", False),  # as the table says
        (513, (32, 64), "gelu_fp8", True),
        (1025, (32, 64), "none", True),  # more rows than the table's: what is usual
        (1000, (48, 64), "none", True),
        (1000, (48, 64), "gelu", False),
        (1000, (33, 64), "none", False),  # the library takes multiples of 16 alone
        (1000, (32, 65), "none", False),
        (0, (32, 64), "none", False),
    ],
)
def test_the_library_multiplies_where_the_table_or_the_epilogue_says_so(rows, shape, ending, library, tables, monkeypatch):
    monkeypatch.setattr(module, "choices", lambda device: choices(device, tables))
    assert (implementation("NVIDIA H100 80GB HBM3", rows, torch.empty(shape), ending) == "library") == library


def test_every_table_that_is_shipped_can_be_read():
    folder = module.Path(module.__file__).parent
    for path in folder.glob("scaled_linear_*.json"):
        table = json.loads(path.read_text())
        assert set(choices(table["device"]).values()) <= set(module.IMPLEMENTATIONS)
        assert len(choices(table["device"])) == len(table["choices"]) > 0
