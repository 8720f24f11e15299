"""Cross-attention to merged text and to prompts."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.prompt_attention import (
    log_sums_ref,
    prompt_attention,
    prompt_attention_launch,
    prompt_attention_ref,
)

OPS = pytest.mark.parametrize("op", [prompt_attention, prompt_attention_ref])
# B, heads, queries, head width, text rows, prompt rows; the last is of Wan's width, with a tile and a bit of everything
SHAPES = [(1, 1, 1, 4, 1, 1), (2, 3, 5, 10, 2, 7), (3, 2, 17, 24, 3, 33), (1, 2, 131, 128, 2, 226)]
PROMPT = ["prompt_key", "prompt_value", "prompt_weight"]


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


def test_finite_differences_confirm_the_references_gradients():
    given = {name: value.double() for name, value in inputs((2, 2, 3, 4, 2, 5), 2, shared=False).items()}
    count = given.pop("text_log_count")

    def run(q, text_key, text_value, *prompts):
        return prompt_attention_ref(q, text_key, text_value, count, *prompts)

    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in given.values()])


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
    none = {name: given[name][:0] for name in PROMPT}
    # Beside a weighted zero the text is added to zeros: the same products, in the same order.
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


@OPS
@pytest.mark.parametrize("text", [1, 16, 17, 150])
def test_text_may_have_any_number_of_rows(op, text, agree):
    agree(op, formula, **inputs((2, 1, 5, 16, text, 9), 1, shared=False))


@OPS
def test_large_logits_do_not_overflow(op):
    given = inputs(SHAPES[2], 2)
    big = given | {name: 100 * given[name] for name in ("q", "text_key", "prompt_key")}
    wide = {name: value.double() for name, value in big.items()}
    out = op(**big)
    assert out.isfinite().all()
    # Logits of some 10^5 keep 2 digits in float32: a bound for what that moves a softmax of well separated keys.
    assert (out.double() - prompt_attention_ref(**wide)).abs().median() < 1e-3


@OPS
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_queries_may_be_a_view_of_any_strides(op, shape):
    given = inputs(shape, 1)
    expected = op(**given)
    views = {
        "tokens first": given["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "dimensions apart": given["q"].transpose(2, 3).contiguous().transpose(2, 3),
        "part of a wider row": torch.cat((given["q"], given["q"]), dim=-1)[..., : shape[3]],
    }
    for q in views.values():
        assert not q.is_contiguous()
        torch.testing.assert_close(op(**given | {"q": q}), expected)


@OPS
@pytest.mark.parametrize("shape", [(0, 3, 5, 8, 2, 7), (2, 3, 0, 8, 2, 7)])
def test_no_queries_give_no_rows(op, shape):
    assert op(**inputs(shape, 1)).shape == (shape[0], 3, shape[2], 8)


@pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")
@pytest.mark.parametrize("prompts", [0, 1, 2])
def test_the_kernel_in_half_precision_is_as_near_as_plain_torch(prompts, relative_rms):
    given = inputs((2, 3, 37, 24, 2, 75), prompts)
    low = {name: value if "weight" in name or "count" in name else value.half() for name, value in given.items()}
    exact = formula(**{name: value.double() for name, value in low.items()})
    out = prompt_attention(**low)
    assert out.dtype == torch.float16
    assert relative_rms(out, exact) <= 2 * relative_rms(prompt_attention_ref(**low), exact)


@pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")
def test_the_kernel_writes_heads_side_by_side():
    out = prompt_attention(**inputs((2, 3, 5, 8, 2, 7), 1))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")
@pytest.mark.parametrize("prompts", [0, 1, 3])
def test_the_kernels_log_sums_are_the_references(prompts):
    given = inputs(SHAPES[2], prompts, shared=False)
    _, sums = prompt_attention_launch(**given, save=True)
    expected = log_sums_ref(given["q"], given["text_key"], given["text_log_count"], given["prompt_key"])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
