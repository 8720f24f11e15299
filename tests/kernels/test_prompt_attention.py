"""Cross-attention to merged text and to prompts."""

import pytest
import torch

from ebr_engine.kernels.prompt_attention import prompt_attention, prompt_attention_ref

OPS = pytest.mark.parametrize("op", [prompt_attention, prompt_attention_ref])
SHAPES = [(1, 1, 1, 4, 1, 1), (2, 3, 5, 10, 2, 7), (3, 2, 17, 24, 3, 33)]  # B, heads, queries, head width, text, prompt
LEARNED = ["q", "prompt_key", "prompt_value", "prompt_weight"]


def softmax_attention(q, key, value, count):
    """Sums over keys, each counted `count` times."""
    likely = torch.einsum("bhnd,bhmd->bhnm", q, key.expand(len(q), -1, -1, -1)).div(q.shape[-1] ** 0.5).exp() * count
    return torch.einsum("bhnm,bhmd->bhnd", likely / likely.sum(-1, keepdim=True), value.expand(len(q), -1, -1, -1))


def formula(q, text_key, text_value, text_log_count, prompt_key, prompt_value, prompt_weight):
    out = softmax_attention(q, text_key, text_value, text_log_count.exp())
    for p in range(len(prompt_weight)):
        out = out + prompt_weight[p] * softmax_attention(q, prompt_key[p : p + 1], prompt_value[p : p + 1], 1)
    return out


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


@OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", [0, 1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_it_is_the_formula(op, shape, prompts, shared, agree):
    agree(op, formula, **inputs(shape, prompts, shared))


@OPS
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("prompts", [1, 3])
def test_gradients_of_queries_prompts_and_their_weights_are_the_formulas(op, shape, prompts, agree):
    agree(op, formula, LEARNED, **inputs(shape, prompts))


@OPS
def test_gradients_of_queries_without_prompts_are_the_formulas(op, agree):
    agree(op, formula, ["q"], **inputs(SHAPES[1], 0))


def test_finite_differences_confirm_the_gradients_that_are_float64_throughout():
    # The softmax is float32 by design, so queries and keys cannot be differenced in float64; the formula covers them.
    given = {name: value.double() for name, value in inputs((2, 2, 3, 4, 2, 5), 2).items()}
    learned = [given.pop(name).requires_grad_() for name in ("prompt_value", "prompt_weight")]

    def run(value, weight):
        return prompt_attention_ref(**given, prompt_value=value, prompt_weight=weight)

    assert torch.autograd.gradcheck(run, learned)


@OPS
def test_equal_keys_may_be_merged_into_one_with_a_log_count(op, relative_rms):
    given = inputs((2, 3, 5, 8, 3, 7), 1)
    count = torch.tensor([1, 225, 4])
    merged = op(**given | {"text_log_count": count.float().log()})
    rows = {name: given[name].repeat_interleave(count, dim=2) for name in ("text_key", "text_value")}
    assert rows["text_key"].shape[2] == 230
    unmerged = op(**given | rows | {"text_log_count": torch.zeros(230)})
    assert relative_rms(merged, unmerged) < 16 * torch.finfo(torch.float32).eps  # sums of 230 products
    ignored = op(**given | {"text_log_count": torch.zeros(3)})
    assert (ignored - unmerged).abs().max() > 0.1  # the counts matter here


@OPS
def test_a_prompt_of_weight_zero_does_nothing(op):
    given = inputs(SHAPES[1], 2) | {"prompt_weight": torch.zeros(2)}
    none = {name: given[name][:0] for name in LEARNED[1:]}
    assert torch.equal(op(**given), op(**given | none))


@OPS
@pytest.mark.parametrize("prompts", [0, 2])
def test_bf16_stays_bf16(op, prompts, relative_rms):
    given = inputs((2, 3, 37, 24, 2, 19), prompts)
    low = {name: value if "weight" in name or "count" in name else value.bfloat16() for name, value in given.items()}
    out = op(**low)
    assert out.dtype == torch.bfloat16
    # Roundings of the query, the logits, the probabilities, each branch and weight, and the sums; at most 2^-8 each.
    assert relative_rms(out, formula(**{name: value.double() for name, value in low.items()})) < 5 * 2**-8
