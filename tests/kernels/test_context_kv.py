"""Keys and values of a context for all blocks."""

import pytest
import torch

from ebr_engine.kernels.context_kv import context_kv, context_kv_ref

OPS = pytest.mark.parametrize("op", [context_kv, context_kv_ref])
SHAPES = [(1, 1, 1, 1, 4), (2, 5, 3, 3, 10), (1, 7, 4, 2, 16), (3, 2, 1, 12, 128)]  # contexts, rows, blocks, heads, head width


def formula(context, weight, bias, norm, heads, eps):
    """Row by row and block by block."""
    width = context.shape[-1]
    keys, values = [], []
    for w, b, n in zip(weight, bias, norm):
        key, value = context @ w[:width].T + b[:width], context @ w[width:].T + b[width:]
        key = key / (key.square().mean(-1, keepdim=True) + eps).sqrt() * n
        for part, parts in ((key, keys), (value, values)):
            parts.append(torch.stack(part.split(width // heads, dim=-1), dim=1))
    return torch.stack(keys), torch.stack(values)


def inputs(contexts, rows, blocks, heads, head):
    width = heads * head
    return {
        "context": torch.randn(contexts, rows, width),
        "weight": torch.randn(blocks, 2 * width, width) * width**-0.5,
        "bias": torch.randn(blocks, 2 * width),
        "norm": 1 + torch.randn(blocks, width) / 2,
        "heads": heads,
    }


@OPS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_it_and_its_gradient_are_the_formula(op, shape, eps, agree):
    agree(op, formula, ["context"], **inputs(*shape), eps=eps)


@OPS
def test_shapes_are_blocks_contexts_heads_rows(op):
    for part in op(**inputs(2, 5, 4, 3, 10), eps=1e-6):
        assert part.shape == (4, 2, 3, 5, 10)


@OPS
@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_it_can_be_learned(op, shape, agree):
    agree(op, formula, ["context", "weight", "bias", "norm"], **inputs(*shape), eps=1e-3)


def test_finite_differences_confirm_the_references_gradients():
    given = {name: value.double() for name, value in inputs(2, 3, 2, 2, 4).items() if name != "heads"}
    leaves = [value.requires_grad_() for value in given.values()]
    assert torch.autograd.gradcheck(lambda *tensors: context_kv_ref(*tensors, heads=2, eps=1e-6), leaves)


@OPS
@pytest.mark.parametrize("contexts", [0, 2])
def test_no_rows_give_no_rows(op, contexts):
    given = inputs(contexts, 0 if contexts else 5, 3, 2, 4)
    for part in op(**given, eps=1e-6):
        assert part.shape == (3, contexts, 2, 0 if contexts else 5, 4)


@OPS
def test_bf16_stays_bf16(op, relative_rms):
    given = inputs(2, 9, 3, 4, 16)
    low = given | {"context": given["context"].bfloat16(), "weight": given["weight"].bfloat16().float()}
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in low.items()}
    for part, reference in zip(op(**low, eps=1e-6), formula(**wide, eps=1e-6)):
        assert part.dtype == torch.bfloat16
        assert relative_rms(part, reference) < 2 * 2**-8  # roundings of the product and of the result
