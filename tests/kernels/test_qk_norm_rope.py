"""Norm, rotary embedding and layout of query and key."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

OPS = pytest.mark.parametrize("op", [qk_norm_rope, qk_norm_rope_ref])
SHAPES = [(1, 1, 1, 2), (2, 3, 3, 10), (1, 2, 2, 16), (1, 1, 12, 128)]  # batch, tokens, heads, head width


def formula(qkv, q_weight, k_weight, cos, sin, heads, eps, rows=None):
    """Pairs (i, i + half) as complex numbers, turned by e^{iθ}."""
    batch, tokens, width = qkv.shape
    if rows is not None:
        length = rows.shape[-2]
        qkv = torch.cat((qkv[:, :length] + rows, qkv[:, length:]), dim=1)

    def split(x):
        return x.reshape(batch, tokens, heads, -1).permute(0, 2, 1, 3)

    def rotate(x, weight):
        x = x.reshape(batch, tokens, -1, len(weight))  # normed in groups as long as the weight: all heads, or each
        normed = split(x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight)
        half = normed.shape[-1] // 2
        turned = torch.complex(normed[..., :half], normed[..., half:]) * torch.complex(cos, sin)
        return torch.cat((turned.real, turned.imag), dim=-1)

    width //= 3
    q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
    return rotate(q, q_weight), rotate(k, k_weight), split(v)


def inputs(batch, tokens, heads, head, per_head=False):
    width = heads * head
    q_weight, k_weight = (1 + torch.randn(2, head if per_head else width) / 2).unbind()
    angle = torch.rand(tokens, head // 2) * 6.3
    tables = {"q_weight": q_weight, "k_weight": k_weight, "cos": angle.cos(), "sin": angle.sin()}
    return {"qkv": 2 * torch.randn(batch, tokens, 3 * width), **tables, "heads": heads}


@OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_head", [False, True])
def test_it_is_the_formula(op, shape, per_head, agree):
    agree(op, formula, ["qkv"], **inputs(*shape, per_head), eps=1e-6)


@OPS
@pytest.mark.parametrize("per_head", [False, True])
def test_eps_is_added_to_the_mean_square(op, per_head, agree):
    agree(op, formula, ["qkv"], **inputs(1, 3, 3, 10, per_head), eps=0.5)


@OPS
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shape", [(1, 90), (2, 90), (3, 90), (1, 2, 90), (2, 2, 90)])
def test_rows_are_added_to_the_first_tokens_before_the_norm(op, per_head, shape, agree):
    agree(op, formula, ["qkv", "rows"], **inputs(2, 3, 3, 10, per_head), eps=1e-6, rows=torch.randn(shape))


@OPS
def test_no_rows_are_as_none(op):
    given = inputs(1, 3, 3, 10)
    for with_none, without in zip(op(**given, eps=1e-6, rows=torch.zeros(0, 90)), op(**given, eps=1e-6)):
        assert torch.equal(with_none, without)


@OPS
@pytest.mark.parametrize("per_head", [False, True])
def test_the_norms_weights_have_gradients_too(op, per_head, agree):
    given = inputs(2, 2, 3, 10, per_head) | {"rows": torch.randn(1, 90)}
    agree(op, formula, ["qkv", "q_weight", "k_weight", "rows"], **given, eps=1e-6)
    agree(op, formula, ["k_weight"], **given, eps=1e-6)


@OPS
@pytest.mark.parametrize("i", [0, 1, 2])
def test_any_output_alone_has_gradients(op, i, agree):
    agree(lambda **given: op(**given)[i], lambda **given: formula(**given)[i], ["qkv"], **inputs(1, 3, 3, 10), eps=1e-6)


@OPS
@pytest.mark.parametrize(("shape", "per_head"), [*((shape, False) for shape in SHAPES), ((1, 1, 24, 128), True)])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(op, shape, per_head, with_rows, dtype, rounded_once):
    given = inputs(*shape, per_head)
    given["qkv"] = given["qkv"].to(dtype)
    if with_rows:
        given["rows"] = torch.randn(1, given["qkv"].shape[-1]).to(dtype)
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    for value, reference in zip(op(**given, eps=1e-6), formula(**wide, eps=1e-6)):
        rounded_once(value, reference)


@OPS
def test_the_value_is_only_laid_out(op):
    given = inputs(2, 3, 3, 10)
    value = op(**given, eps=1e-6)[2]
    assert torch.equal(value.transpose(1, 2).flatten(2), given["qkv"][..., 60:])


@OPS
def test_products_of_query_and_key_depend_on_the_angle_between_them(op):
    given = inputs(1, 6, 2, 8)
    given["qkv"] = given["qkv"][:, :1].expand(-1, 6, -1)  # one token at six positions
    angle = torch.arange(6)[:, None] * torch.tensor([1.0, 0.4, 0.1, 0.03])
    q, k, _ = op(**given | {"cos": angle.cos(), "sin": angle.sin()}, eps=1e-6)
    products = (q @ k.transpose(-1, -2))[0]
    for offset in range(-4, 5):
        diagonal = products.diagonal(offset, dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert (products[:, 0, 1] - products[:, 0, 0]).abs().max() > 0.1


@OPS
def test_views_are_read_where_they_lie(op):
    given = inputs(2, 3, 3, 10)
    wide, rows = torch.randn(2, 7, 100), torch.randn(3, 2, 90)
    views = given | {"qkv": wide[:, 4:, 10:], "rows": rows[:, 1]}
    copies = given | {"qkv": wide[:, 4:, 10:].clone(), "rows": rows[:, 1].clone()}
    for value, reference in zip(op(**views, eps=1e-6), op(**copies, eps=1e-6)):
        assert torch.equal(value, reference)


@OPS
def test_gradients_may_lie_in_any_order(op):
    given = inputs(2, 3, 3, 10)
    given["qkv"].requires_grad_()
    outputs = op(**given, eps=1e-6)
    dense = [torch.randn(2, 3, 3, 10) for _ in range(3)]
    by_token = [pull.transpose(1, 2).contiguous().transpose(1, 2) for pull in dense]
    by_token[2] = torch.stack((dense[2], dense[2]), dim=-1)[..., 0]
    one, other = (torch.autograd.grad(outputs, given["qkv"], pulls, retain_graph=True)[0] for pulls in (dense, by_token))
    assert torch.equal(one, other)


@OPS
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_nothing_gives_nothing(op, batch, tokens):
    given = inputs(batch, tokens, 3, 10)
    given["qkv"].requires_grad_()
    results = op(**given, eps=1e-6)
    assert [result.shape for result in results] == 3 * [(batch, 3, tokens, 10)]
    sum(result.sum() for result in results).backward()
    assert given["qkv"].grad.shape == given["qkv"].shape


@pytest.mark.parametrize(("name", "shape"), [("q_weight", (29,)), ("cos", (2, 5)), ("sin", (3, 4)), ("rows", (4, 90))])
def test_shapes_that_do_not_fit_are_refused(name, shape, monkeypatch):
    monkeypatch.setattr(backend, "FORCED", True)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        qk_norm_rope(**inputs(2, 3, 3, 10) | {name: torch.randn(shape)})


def test_results_are_laid_out_as_attention_wants_them(monkeypatch):
    monkeypatch.setattr(backend, "FORCED", True)
    given = inputs(2, 3, 3, 10)
    assert all(result.is_contiguous() for result in qk_norm_rope(**given))
    given = inputs(2, 3, 1, 10)  # one head: the value of a reference is a view of its input
    value = qk_norm_rope(**given)[2]
    value.zero_()
    assert given["qkv"].count_nonzero() == given["qkv"].numel()
