"""Norm, rotary embedding and layout of query and key."""

import pytest
import torch

from ebr_engine.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

OPS = pytest.mark.parametrize("op", [qk_norm_rope, qk_norm_rope_ref])
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 10), (3, 17, 2, 16), (1, 7, 12, 128)]  # batch, tokens, heads, head width


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
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_it_is_the_formula(op, shape, per_head, eps, agree):
    agree(op, formula, ["qkv"], **inputs(*shape, per_head), eps=eps)


@OPS
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shape", [(1, 90), (4, 90), (5, 90), (2, 4, 90)])
def test_rows_are_added_to_the_first_tokens_before_the_norm(op, per_head, shape, agree):
    agree(op, formula, ["qkv", "rows"], **inputs(2, 5, 3, 10, per_head), eps=1e-6, rows=torch.randn(shape))


@OPS
def test_no_rows_are_as_none(op):
    given = inputs(2, 5, 3, 10)
    for with_none, without in zip(op(**given, eps=1e-6, rows=torch.zeros(0, 90)), op(**given, eps=1e-6)):
        assert torch.equal(with_none, without)


@OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_rows", [False, True])
def test_bf16_is_rounded_once(op, shape, with_rows, rounded_once):
    given = inputs(*shape)
    given["qkv"] = given["qkv"].bfloat16()
    if with_rows:
        given["rows"] = torch.randn(1, given["qkv"].shape[-1]).bfloat16()
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    for value, reference in zip(op(**given, eps=1e-6), formula(**wide, eps=1e-6)):
        rounded_once(value, reference)


@OPS
def test_the_value_is_only_laid_out(op):
    given = inputs(2, 5, 3, 10)
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
