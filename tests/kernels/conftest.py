"""How an op is compared with its formula in float64, and what makes Triton's interpreter a fair stand-in for a GPU."""

import pytest
import torch

from ebr_engine.kernels import backend

# An op is a handful of float32 roundings, and a sum of up to a few hundred products grows them by its square root.
FLOAT32 = 16 * torch.finfo(torch.float32).eps


def listed(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def agree(relative_rms):
    """`agree(op, formula, learned, **inputs)`: float32 outputs, and gradients of the `learned` inputs, match the formula's.

    The formula gets every tensor in float64; its gradients are autograd's.
    """

    def compare(op, formula, learned=(), **inputs):
        def run(function, dtype):
            given = {k: v.detach().to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            leaves = [given[name].requires_grad_() for name in learned]
            outputs = listed(function(**given))
            torch.manual_seed(1)
            pull = sum((output * torch.randn(output.shape).to(dtype)).sum() for output in outputs)
            return outputs, torch.autograd.grad(pull, leaves) if leaves else ()

        (outputs, gradients), (expected, slopes) = run(op, torch.float32), run(formula, torch.float64)
        assert len(outputs) == len(expected)
        assert {output.dtype for output in outputs} == {torch.float32}
        for value, reference in zip((*outputs, *gradients), (*expected, *slopes)):
            assert relative_rms(value, reference) < FLOAT32

    return compare


@pytest.fixture
def rounded_once():
    """Assert that bf16 or fp16 values are float64 ones rounded a single time; `slack` is the float32 arithmetic before that."""

    def check(value, reference, slack=1e-5):
        assert value.dtype in (torch.bfloat16, torch.float16)
        assert value.shape == reference.shape
        half_step = torch.finfo(value.dtype).eps / 2  # the largest relative error of one rounding
        excess = (value.double() - reference).abs() - half_step * reference.abs()
        assert excess.max() < slack

    return check


@pytest.fixture
def quantised_once():
    """Assert that a quantised tensor is a float64 one with one rounding to e4m3, of half a step at the scale of its row."""

    def check(quantized, reference):
        values, scale = quantized
        assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert values.shape == reference.shape
        largest = reference.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-5, atol=0)
        half_step = torch.maximum(reference.abs() * 2**-4, largest / 448 * 2**-10)
        error = (values.double() * scale.double() - reference).abs()
        assert (error <= half_step * (1 + 1e-4) + 1e-5 * largest).all()

    return check


@pytest.fixture(autouse=True)
def ungated(monkeypatch):
    """The gate would put the reference in a wrong kernel's place: what is to be tested is the kernel."""
    monkeypatch.setattr(backend, "VERIFY", "off")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """In Triton's interpreter: fresh tensors hold NaN, so that an element no kernel writes is seen; casts round as GPUs do.

    The interpreter's own cast from float32 truncates to bf16; to e4m3 it loses carries (7.9 becomes 4) and truncates
    subnormals, errors of up to half of a value. A GPU rounds both to the nearest, even.
    """
    if not backend.INTERPRETED:
        return
    from triton.runtime import interpreter

    def poisoned(create):
        def fresh(*args, **kwargs):
            result = create(*args, **kwargs)
            return result.fill_(torch.nan) if result.is_floating_point() else result

        return fresh

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

    convert, tl = interpreter._convert_float, backend.tl
    rounded = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}

    def to_nearest(values, from_type, to_type, mode):
        if from_type != tl.float32 or to_type not in rounded:
            return convert(values, from_type, to_type, mode)
        dtype, bits = rounded[to_type]
        return torch.from_numpy(values.copy()).to(dtype).view(bits).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", to_nearest)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that what no kernel writes is seen."""

    def fresh(create):
        return lambda *args, **kwargs: create(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty_like", fresh(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fresh(torch.Tensor.new_empty))
