"""How an op is compared with its formula in float64."""

import pytest
import torch

# An op is a handful of float32 roundings, and a sum of up to a few hundred products grows them by its square root.
FLOAT32 = 16 * torch.finfo(torch.float32).eps
BF16_HALF_STEP = 2.0**-8  # the largest relative error of one rounding to bf16


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
    """Assert that bf16 values are float64 ones rounded a single time; `slack` is the float32 arithmetic before that."""

    def check(value, reference, slack=1e-5):
        assert value.dtype == torch.bfloat16
        assert value.shape == reference.shape
        excess = (value.double() - reference).abs() - BF16_HALF_STEP * reference.abs()
        assert excess.max() < slack

    return check
