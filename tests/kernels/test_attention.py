"""Self-attention, by whichever of its paths."""

import logging

import pytest
import torch

from ebr_engine.kernels import attention as module
from ebr_engine.kernels import backend
from ebr_engine.kernels.attention import attention, attention_blocks, attention_cpu_op, attention_cuda, attention_ref

asks_the_driver = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a torch for CUDA asks the driver which kernels there are, and there is none",
)
CUDA = pytest.param(attention_cuda, marks=asks_the_driver)
OPS = pytest.mark.parametrize("op", [attention, CUDA, attention_ref])
ALL = pytest.mark.parametrize("op", [attention, CUDA, attention_ref, attention_blocks])
SHAPES = [(1, 1, 1, 4), (2, 3, 5, 10), (1, 2, 67, 24), (3, 1, 33, 128)]


def formula(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    likely = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", likely, v)


def inputs(shape):
    return dict(zip("qkv", torch.randn(3, *shape).unbind()))


@OPS
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula(op, shape, agree):
    agree(op, formula, [], **inputs(shape))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 0, 5, 8), (0, 2, 5, 8)])
@pytest.mark.parametrize("scores", [1, 67 * 20, 2**19])
def test_blocks_of_queries_make_no_difference(shape, scores, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(shape).values())
    torch.testing.assert_close(attention_blocks(q, k, v), attention_ref(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_a_cpus_way_is_one_operation_to_torch(asked, dtype, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", asked)
    given = tuple(x.to(dtype) for x in inputs((2, 3, 37, 24)).values())
    torch.library.opcheck(attention_cpu_op, given)
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), attention(given[0] * 2, *given[1:]) + 1)


def test_what_is_learned_from_has_a_gradient():
    q, k, v = (x.bfloat16() for x in inputs((1, 2, 5, 8)).values())
    assert not attention(q, k, v).requires_grad
    assert attention(q.requires_grad_(), k, v).requires_grad


@pytest.mark.parametrize("way", ["native", "library", "blocks"])
def test_the_way_that_was_chosen_serves(way, monkeypatch):
    offered = []

    def chosen(operation, kind, work, ways):
        offered.append((operation, *ways))
        return way if way in ways else "library"

    monkeypatch.setattr(module.tune, "chosen", chosen)
    monkeypatch.setattr(backend, "ASKED", "auto" if way == "native" else "torch")
    q, k, v = (x.bfloat16() for x in inputs((1, 2, 40, 64)).values())
    torch.testing.assert_close(attention(q, k, v), attention_ref(q, k, v), rtol=0.05, atol=0.02)
    assert offered[0][-2:] == ("library", "blocks")


@OPS
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gradients_are_the_formulas(op, shape, agree):
    agree(op, formula, ["q", "k", "v"], **inputs(shape))


def test_gradients_of_many_tokens_take_the_librarys_path(agree, monkeypatch):
    monkeypatch.setattr(module, "EXPLICIT_TOKENS", 4)
    monkeypatch.setattr(module, "attention_ref", None)
    agree(attention, formula, ["q", "k", "v"], **inputs((2, 3, 5, 10)))


@ALL
def test_large_scores_do_not_overflow(op):
    given = inputs((1, 2, 9, 8))
    out = op(given["q"] * 1e3, given["q"] * 1e3, given["v"])
    assert out.isfinite().all()
    wide = {name: value.double() for name, value in given.items()}
    scores = torch.einsum("bhid,bhjd->bhij", wide["q"], wide["q"]) * 1e6 / 8**0.5
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ wide["v"], atol=1e-5, rtol=0)


@ALL
def test_bf16_stays_bf16(op, relative_rms):
    given = {name: value.bfloat16() for name, value in inputs((2, 3, 37, 24)).items()}
    out = op(**given)
    assert out.dtype == torch.bfloat16
    # Roundings of the query, the scores, the probabilities and the result, at most 2^-8 each; scores are of size 1.
    assert relative_rms(out, formula(**{name: value.double() for name, value in given.items()})) < 4 * 2**-8


@asks_the_driver
def test_what_serves_a_device_is_logged_once(caplog):
    module.served_by.cache_clear()
    given = inputs((1, 2, 5, 8))
    with caplog.at_level(logging.INFO, "ebr_engine"):
        for _ in range(3):
            attention_cuda(**given)
    assert caplog.messages == [
        "attention on cpu, float32, heads of 8: MATH"
    ]  # none of the device's kernels takes a CPU's tensors


@asks_the_driver
def test_the_order_of_kernels_is_left_as_it_was():
    before = torch._C._get_sdp_priority_order(), torch.backends.cuda.flash_sdp_enabled()
    attention_cuda(**inputs((1, 2, 5, 8)))
    assert (torch._C._get_sdp_priority_order(), torch.backends.cuda.flash_sdp_enabled()) == before


@pytest.mark.parametrize("op", [attention, attention_cuda])
@pytest.mark.parametrize("learned", [False, True])
def test_it_compiles_without_a_graph_break(op, learned):
    torch.compiler.reset()
    given = {name: value.requires_grad_(learned) for name, value in inputs((1, 2, 5, 8)).items()}
    out = torch.compile(op, fullgraph=True, backend="aot_eager")(**given)
    torch.testing.assert_close(out, attention_ref(**given))
