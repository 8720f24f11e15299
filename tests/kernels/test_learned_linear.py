"""A linear layer in bf16 whose weight is learned: torch's own under autocast, its gradients with float32 sums."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import backend
from ebr_engine.kernels.learned_linear import learned_linear, serves, weight_gradient_ref
from ebr_engine.kernels.packed_linear import can_pack

SHAPES = [(1, 32, 64), (37, 64, 32), (300, 96, 32), (256, 544, 1056), (600, 1056, 64), (50, 20, 24)]


def drawn(rows, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator).to(torch.bfloat16) for width in (outputs, inputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_exact_sums_of_rounded_products(shape):
    gradient, x = drawn(*shape)
    weight, bias = torch.ops.ebr.weight_gradient(gradient, x)
    exact = gradient.double().t() @ x.double(), gradient.double().sum(0)
    allowed = 2e-6 if serves() and not (shape[1] % 32 or shape[2] % 32) else 2**-8  # the formula rounds to bf16
    for found, sums in zip((weight, bias), exact):
        assert found.dtype == torch.float32
        assert (found - sums).norm() <= allowed * sums.norm()


@pytest.mark.skipif(not serves(), reason="needs AMX and the native code")
def test_native_code_serves_it_and_threads_change_nothing(monkeypatch):
    from ebr_engine.kernels import cpu

    gradient, x = drawn(700, 544, 1056)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(cpu.weight_gradient(gradient, x))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found))
    assert cpu.weight_gradient(gradient[:, :24], x) is None  # no whole tiles
    assert cpu.weight_gradient(gradient.float(), x) is None
    monkeypatch.setattr(backend, "CPU_LEVEL", "avx2")
    assert cpu.weight_gradient(gradient, x) is None


def test_the_formula_is_what_autograd_finds():
    gradient, x = drawn(40, 16, 8)
    weight = torch.randn(8, 16, requires_grad=True)
    F.linear(x.float(), weight).backward(gradient.float())
    assert torch.allclose(weight_gradient_ref(gradient.float(), x.float())[0], weight.grad, atol=1e-5)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="torch has no products in bf16 on this CPU")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layer_and_gradients_are_those_of_torchs_layer_under_autocast(compiled):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 96)
    x = torch.randn(2, 50, 64)

    def learned(way):
        given, weight, bias = (t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias))
        way = torch.compile(way) if compiled else way
        with torch.autocast("cpu", torch.bfloat16):
            y = way(given, weight, bias)
        y.float().square().mean().backward()
        return y, given.grad, weight.grad, bias.grad

    for ours, theirs in zip(learned(learned_linear), learned(F.linear)):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() < 5e-3 * theirs.double().norm()
