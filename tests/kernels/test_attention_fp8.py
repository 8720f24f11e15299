"""Self-attention in eight bits."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.kernels import attention_fp8 as module
from ebr_engine.kernels import backend
from ebr_engine.kernels.attention import attention
from ebr_engine.kernels.attention_fp8 import (
    attention_fp8,
    attention_fp8_op,
    attention_fp8_ref,
    quantize_heads_launch,
    quantize_heads_op,
    quantize_heads_ref,
)

INTERPRETED = pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")
# Heads of 16 fill a part of a tile, 48 no power of two; the keys of the last two fill several tiles and a part of one.
SHAPES = [(1, 1, 1, 16), (2, 3, 5, 16), (1, 2, 67, 48), (1, 2, 96, 64)]


def exact(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def photo_heads(tokens, heads, head):
    """q, k, v of `tokens` patches of a photograph, by random weights: normed, projected, q and k normed over the width, as Wan's.

    Tokens of pictures are alike, so rounding a query moves all of its logits together; independent numbers average it away.
    """
    data = pytest.importorskip("skimage.data")
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 127.5 - 1
    patches = F.unfold(picture, 16, stride=16)[0].T[:tokens]
    width = heads * head
    x = F.layer_norm(patches @ torch.randn(patches.shape[1], width) / patches.shape[1] ** 0.5, (width,))
    q, k, v = (x @ torch.randn(width, 3 * width) / width**0.5).chunk(3, -1)
    q, k = F.rms_norm(q, (width,)), F.rms_norm(k, (width,))
    return tuple(x.unflatten(-1, (heads, head)).transpose(0, 1)[None] for x in (q, k, v))


@pytest.mark.parametrize("shape", SHAPES)
def test_its_error_is_that_of_its_roundings(shape, relative_rms):
    q, k, v = torch.randn(3, *shape).unbind()
    assert relative_rms(attention_fp8(q, k, v), exact(q, k, v)) < 0.08  # e4m3 in P and V, 2.7 % each, and more of few numbers


@pytest.mark.parametrize("model", [(12, 128), (24, 128)])
def test_at_the_width_of_a_model_tokens_of_a_photograph_lose_less_than_two_percent(model, relative_rms):
    heads, head = model
    q, k, v = photo_heads(150, heads, head)
    q, k, v = (x[:, :2] for x in (q, k, v))  # of the heads of the whole width, as slow as an interpreter is
    error = relative_rms(attention_fp8(q, k, v), exact(q, k, v))
    assert 1e-3 < error < 2e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_what_all_keys_and_all_values_share_costs_no_precision(shape, relative_rms):
    q, k, v = torch.randn(3, *shape).unbind()
    usual = relative_rms(attention_fp8(q, k, v), exact(q, k, v))
    moved = k + 30 * torch.randn(shape[-1]), v + 30
    assert relative_rms(attention_fp8(q, *moved) - 30, exact(q, *moved) - 30) < 1.5 * usual + 1e-3


def test_bf16_stays_bf16_and_heads_may_be_views_of_any_strides():
    q, k, v = (torch.randn(2, 20, 3, 32).bfloat16().transpose(1, 2) for _ in range(3))
    out = attention_fp8(q, k, v)
    assert out.dtype == torch.bfloat16
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, attention_fp8(*(x.contiguous() for x in (q, k, v))))


def test_it_is_attentions_on_request():
    q, k, v = torch.randn(3, 1, 2, 9, 16).unbind()
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, fp8=True), attention_fp8(q, k, v))
        assert not torch.equal(attention(q, k, v), attention_fp8(q, k, v))
    assert torch.equal(attention(q, k, v, fp8=True), attention(q, k, v))  # what may be learned from has gradients


def test_large_logits_do_not_overflow():
    q, k, v = torch.randn(3, 1, 2, 33, 16).unbind()
    out = attention_fp8(1e3 * q, 1e3 * k, v)
    assert out.isfinite().all()


def test_equal_tokens_are_their_own_mean():
    q = k = v = torch.randn(1, 2, 1, 16).expand(1, 2, 40, 16)
    torch.testing.assert_close(attention_fp8(q, k, v), v, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_none_and_a_gradient_is_refused():
    q = torch.zeros(0, 2, 5, 16)
    assert attention_fp8(q, q, q).shape == (0, 2, 5, 16)
    learned = torch.randn(1, 1, 3, 16, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient"):
        attention_fp8(learned, learned, learned)


def test_both_halves_are_operations_to_torch():
    q, k, v = torch.randn(3, 2, 3, 21, 16).unbind()
    torch.library.opcheck(quantize_heads_op, (q, k, v))
    rest = ("test_faketensor", "test_aot_dispatch_dynamic")  # of the schema it asks for arithmetic in e4m3
    torch.library.opcheck(attention_fp8_op, (*quantize_heads_ref(q, k, v), torch.bfloat16), test_utils=rest)
    compiled = torch.compile(lambda *x: attention_fp8(*x) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attention_fp8(q, k, v) + 1)


def test_blocks_of_queries_make_no_difference(monkeypatch):
    quantised = quantize_heads_ref(*torch.randn(3, 2, 2, 37, 16).unbind())
    whole = attention_fp8_ref(*quantised, torch.float32)
    monkeypatch.setattr(module, "SCORES", 2 * 2 * 37 * 5)
    torch.testing.assert_close(attention_fp8_ref(*quantised, torch.float32), whole)


@INTERPRETED
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_quantises_as_the_reference(shape):
    q, k, v = torch.randn(3, *shape).unbind()
    found, expected = quantize_heads_launch(q, k, 3 * v + 5), quantize_heads_ref(q, k, 3 * v + 5)
    for value, reference in zip(found[3:], expected[3:]):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    for value, reference in zip(found[:2], expected[:2]):
        assert (value.int() - reference.int()).abs().max() <= 1  # where a mean in another order moves a number over a half
        assert (value == reference).float().mean() > 0.98
    torch.testing.assert_close(found[2].float(), expected[2].float(), rtol=2**-3, atol=2**-8)
    assert not found[2][..., shape[2] :].float().any()


@INTERPRETED
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_as_near_to_the_formula_as_the_reference(shape, relative_rms):
    q, k, v = torch.randn(3, *shape).unbind()
    quantised = quantize_heads_ref(q, k, v)
    reference = relative_rms(attention_fp8_ref(*quantised, torch.float32), exact(q, k, v))
    assert relative_rms(attention_fp8(q, k, v), exact(q, k, v)) <= 2 * reference + 1e-5
    result = attention_fp8_op(*quantised, torch.float32)  # its p is rounded at a maximum that is not yet the last
    assert relative_rms(result, attention_fp8_ref(*quantised, torch.float32)) < 0.05
