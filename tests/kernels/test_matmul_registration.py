"""Operations that multiply, as torch knows them: schema, fake tensors, autograd, and compiling without a graph break."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.context_kv import context_kv, context_kv_op
from ebr_engine.kernels.prompt_attention import log_sums_ref, prompt_attention, prompt_attention_op
from ebr_engine.kernels.prompt_attention_gradient import prompt_attention_backward_op
from ebr_engine.kernels.quantize_fp8 import quantize_fp8
from ebr_engine.kernels.scaled_linear import bound_ref, scaled_linear, scaled_linear_fp8_op, scaled_linear_op


def attended(learned=False, prompts=2, shared=True):
    """q as it comes from a projection, text, and prompts."""
    q = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_(learned)
    text = [*torch.randn(2, 1 if shared else 2, 3, 2, 4).unbind(), torch.tensor([0.0, 5.4])]
    prompt = [*torch.randn(2, prompts, 3, 7, 4).unbind(), torch.randn(prompts)]
    return [q, *text, *(x.requires_grad_(learned) for x in prompt)]


def attended_backward(**options):
    q, text_key, text_value, count, key, value, weight = attended(**options)
    sums = log_sums_ref(q, text_key, count, key)
    return [torch.randn_like(q), q, text_key, text_value, count, key, value, weight, sums]


def projected(learned=False):
    return [
        x.requires_grad_(learned) for x in (torch.randn(2, 5, 6), torch.randn(3, 12, 6), torch.randn(3, 12), torch.rand(3, 6))
    ]


def finished(learned=False):
    product, bias, norm = (x.requires_grad_(learned) for x in (torch.randn(3, 2, 5, 12), torch.randn(3, 12), torch.rand(3, 6)))
    return [product, bias, norm, 2, 1e-6]


def layer():
    return [*quantize_fp8(torch.randn(8, 16)), torch.randn(8)]


def linear(learned=False, gelu=False):
    return [torch.randn(2, 3, 16, requires_grad=learned), None, *layer(), gelu, torch.float32]


def linear_fp8(gelu):
    weights = layer()
    return [*quantize_fp8(torch.randn(2, 3, 16)), *weights, bound_ref(*weights), gelu]


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
REGISTERED = {
    "prompt_attention": (prompt_attention_op, lambda: [*attended(), False]),
    "prompt_attention learned": (prompt_attention_op, lambda: [*attended(learned=True), True]),
    "prompt_attention without prompts": (prompt_attention_op, lambda: [*attended(prompts=0, shared=False), False]),
    "prompt_attention_backward": (prompt_attention_backward_op, attended_backward),
    "prompt_attention_backward without prompts": (prompt_attention_backward_op, lambda: attended_backward(prompts=0)),
    "context_kv": (context_kv_op, finished),
    "context_kv learned": (context_kv_op, lambda: finished(learned=True)),
    "scaled_linear": (scaled_linear_op, linear),
    "scaled_linear learned": (scaled_linear_op, lambda: linear(learned=True)),
    "scaled_linear learned, gelu": (scaled_linear_op, lambda: linear(learned=True, gelu=True)),
    "scaled_linear quantised": (scaled_linear_op, lambda: [*quantize_fp8(torch.randn(3, 16)), *layer(), True, torch.bfloat16]),
    "scaled_linear_fp8": (scaled_linear_fp8_op, lambda: linear_fp8(False)),
    "scaled_linear_fp8 gelu": (scaled_linear_fp8_op, lambda: linear_fp8(True)),
}


@pytest.mark.parametrize("case", REGISTERED)
def test_the_registration_is_sound(case):
    op, make = REGISTERED[case]
    # The check of the schema compares inputs before and after, which torch cannot do in e4m3.
    checks = CHECKS[1:] if "scaled_linear" in case else CHECKS
    torch.library.opcheck(op, tuple(make()), test_utils=checks)


def test_a_product_leaves_its_inputs_alone():
    given = linear_fp8(True)
    before = [x.clone() for x in given[:-1]]
    scaled_linear_fp8_op(*given)
    scaled_linear_op(*given[:5], True, torch.float32)
    assert all(torch.equal(x.view(torch.uint8), copy.view(torch.uint8)) for x, copy in zip(given, before))


def wide(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize("prompts", [0, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_registered_gradients_of_attention_are_those_of_finite_differences(prompts, shared, monkeypatch):
    monkeypatch.setattr(backend, "FORCED", True)
    assert torch.autograd.gradcheck(prompt_attention, wide(attended(learned=True, prompts=prompts, shared=shared)))


def test_registered_gradients_of_keys_and_values_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(backend, "FORCED", True)
    assert torch.autograd.gradcheck(lambda *tensors: context_kv(*tensors, 2), wide(projected(learned=True)))


def feed_forward(x, up, down, bound):
    hidden = scaled_linear(x, *up, gelu=True, fp8_out=True, bound=bound)
    return scaled_linear(hidden, *down, dtype=torch.float32)


def test_a_feed_forward_in_fp8_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(backend, "FORCED", True)
    torch.compiler.reset()
    up = layer()
    down = [*quantize_fp8(torch.randn(5, 8)), torch.randn(5)]
    given = (torch.randn(2, 3, 16), up, down, bound_ref(*up))
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), feed_forward(*given))


PUBLIC = {
    "prompt_attention": (prompt_attention, attended),
    "prompt_attention without prompts": (prompt_attention, lambda learned: attended(learned, prompts=0)),
    "context_kv": (lambda *tensors: context_kv(*tensors, 2), projected),
    "scaled_linear": (lambda x, *given: scaled_linear(x, *given), lambda learned: [linear(learned)[0], *layer()]),
    "scaled_linear gelu": (lambda x, *given: scaled_linear(x, *given, gelu=True), lambda learned: [linear(learned)[0], *layer()]),
}


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("case", PUBLIC)
def test_it_compiles_without_a_graph_break(case, learned, forced, monkeypatch):
    monkeypatch.setattr(backend, "FORCED", forced)
    torch.compiler.reset()
    op, make = PUBLIC[case]
    arguments = make(learned=learned)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results, expected = (x if isinstance(x, tuple) else (x,) for x in (compiled(*arguments), op(*arguments)))
    for value, reference in zip(results, expected):
        torch.testing.assert_close(value, reference)
    leaves = [x for x in arguments if x.requires_grad and x.numel()]
    if leaves:
        pulls = [torch.randn_like(x) for x in expected]
        for value, reference in zip(torch.autograd.grad(results, leaves, pulls), torch.autograd.grad(expected, leaves, pulls)):
            torch.testing.assert_close(value, reference)
