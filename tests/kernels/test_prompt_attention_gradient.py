"""Gradients of cross-attention to merged text and to prompts."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels import prompt_attention_gradient as module
from ebr_engine.kernels.prompt_attention import prompt_attention, prompt_attention_ref
from ebr_engine.kernels.prompt_attention_gradient import prompt_attention_backward_ref

OPS = pytest.mark.parametrize("op", [prompt_attention, prompt_attention_ref])
SHAPES = [(1, 1, 1, 4, 1, 1), (2, 3, 5, 10, 2, 7), (2, 1, 70, 24, 17, 70)]  # B, heads, queries, head width, text, prompt
PROMPT = ["prompt_key", "prompt_value", "prompt_weight"]
interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")


def formula(q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight):
    def branch(key, value, bias):
        scores = torch.einsum("bhnd,xhmd->bhnm", q, key) if len(key) == 1 else torch.einsum("bhnd,bhmd->bhnm", q, key)
        likely = (scores / q.shape[-1] ** 0.5 + bias).softmax(-1)
        return likely @ value

    prompts = (branch(k[None], v[None], 0) for k, v in zip(prompt_key, prompt_value))
    out = branch(text_key, text_value, text_log_count)
    return out + sum(weight * prompt for weight, prompt in zip(prompt_weight, prompts))


def inputs(shape, prompts, shared=True):
    batch, heads, queries, head, text, length = shape
    text_key, text_value = torch.randn(2, 1 if shared else batch, heads, text, head).unbind()
    prompt_key, prompt_value = torch.randn(2, prompts, heads, length, head).unbind()
    return {
        "q": torch.randn(batch, heads, queries, head),
        "text_key": text_key,
        "text_value": text_value,
        "text_log_count": torch.randint(1, 226, (text,)).float().log(),
        "prompt_key": prompt_key,
        "prompt_value": prompt_value,
        "prompt_weight": torch.randn(prompts),
    }


def gradients(op, given, learned, pull):
    leaves = {name: value.detach().requires_grad_(name in learned) for name, value in given.items()}
    return torch.autograd.grad((op(**leaves) * pull).sum(), [leaves[name] for name in learned])


@OPS
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("prompts", "shared"), [(1, True), (1, False), (2, True)])
def test_gradients_of_queries_prompts_and_their_weights_are_the_formulas(op, shape, prompts, shared, agree):
    agree(op, formula, ["q", *PROMPT], **inputs(shape, prompts, shared))


@OPS
def test_a_single_key_has_no_slope(op):
    given = inputs(SHAPES[0], 1)
    dq, dk, _, dw = gradients(op, given, ["q", *PROMPT], 1)
    torch.testing.assert_close(dq, torch.zeros_like(dq))
    torch.testing.assert_close(dk, torch.zeros_like(dk))
    torch.testing.assert_close(dw, given["prompt_value"].sum()[None])


@OPS
def test_gradients_of_queries_without_prompts_are_the_formulas(op, agree):
    agree(op, formula, ["q"], **inputs(SHAPES[1], 0))


@OPS
def test_text_that_is_learned_gets_its_gradients(op, agree):
    agree(op, formula, ["q", "text_key", "text_value", *PROMPT], **inputs(SHAPES[1], 1))


@OPS
@pytest.mark.parametrize("learned", [["q"], ["prompt_value"], ["prompt_weight"], ["prompt_key", "prompt_weight"]])
def test_only_what_is_learned_needs_a_gradient(op, learned, agree):
    agree(op, formula, learned, **inputs(SHAPES[1], 2))


def test_the_written_out_gradients_are_autograds():
    given = {name: value.double() for name, value in inputs(SHAPES[2], 2, shared=False).items()}
    pull = torch.randn_like(given["q"])
    expected = gradients(prompt_attention_ref, given, ["q", *PROMPT], pull)
    for value, reference in zip(prompt_attention_backward_ref(pull, **given), expected):
        torch.testing.assert_close(value, reference)


@OPS
def test_the_gradient_and_the_queries_may_be_of_any_strides(op):
    given = inputs(SHAPES[1], 1)
    pull = torch.randn_like(given["q"])
    turned = {"q": given["q"].transpose(1, 2).contiguous().transpose(1, 2)}
    expected = gradients(op, given, ["q", *PROMPT], pull)
    for strided in (pull.transpose(1, 2).contiguous().transpose(1, 2), pull.transpose(2, 3).contiguous().transpose(2, 3)):
        for value, reference in zip(gradients(op, given | turned, ["q", *PROMPT], strided), expected):
            torch.testing.assert_close(value, reference)
    for value, reference in zip(gradients(op, given, ["q", *PROMPT], torch.ones(())), gradients(op, given, ["q", *PROMPT], 1)):
        torch.testing.assert_close(value, reference)  # a sum's gradient has no strides at all


@OPS
def test_no_queries_have_gradients_of_zero(op):
    dq, *rest = gradients(op, inputs((2, 3, 0, 8, 2, 7), 2), ["q", *PROMPT], 1)
    assert dq.shape == (2, 3, 0, 8)
    assert all((part == 0).all() for part in rest)


@interpreted
def test_splitting_the_queries_among_programs_changes_a_sums_order_and_no_more(monkeypatch, relative_rms):
    given = inputs((2, 1, 150, 16, 2, 9), 1)
    pull = torch.randn_like(given["q"])
    results = []
    for tiles in (1000, 4, 1):  # of queries a program: all, some, one
        monkeypatch.setattr(module, "TILES_A_SPLIT", tiles)
        results.append(gradients(prompt_attention, given, PROMPT[:2], pull))
    for split in results[1:]:
        for value, reference in zip(split, results[0]):
            assert relative_rms(value, reference) < 16 * torch.finfo(torch.float32).eps
    for value, reference in zip(gradients(prompt_attention, given, PROMPT[:2], pull), results[-1]):
        assert torch.equal(value, reference)


@interpreted
def test_gradients_in_half_precision_are_as_near_as_plain_torchs(relative_rms):
    given = inputs((2, 1, 70, 24, 2, 75), 1)
    low = {name: value if "weight" in name or "count" in name else value.half() for name, value in given.items()}
    pull = torch.randn_like(low["q"])
    exact = gradients(formula, {name: value.double() for name, value in low.items()}, ["q", *PROMPT], pull.double())
    plain = gradients(prompt_attention_ref, low, ["q", *PROMPT], pull)
    for value, near, reference in zip(gradients(prompt_attention, low, ["q", *PROMPT], pull), plain, exact):
        assert value.dtype == near.dtype
        assert relative_rms(value, reference) <= 2 * relative_rms(near, reference)
