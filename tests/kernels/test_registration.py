"""Operations as torch knows them: schema, fake tensors, autograd, and compiling without a graph break."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.bridge_step import bridge_step, bridge_step_op
from ebr_engine.kernels.gated_activation import (
    gated_activation,
    gated_activation_backward_op,
    gated_activation_fp8,
    gated_activation_fp8_op,
    gated_activation_op,
    gated_activation_ref,
)
from ebr_engine.kernels.gated_residual_norm import (
    gated_residual_norm,
    gated_residual_norm_backward_op,
    gated_residual_norm_fp8,
    gated_residual_norm_fp8_op,
    gated_residual_norm_op,
    gated_residual_norm_ref,
)
from ebr_engine.kernels.layer_norm_modulate import (
    layer_norm_modulate,
    layer_norm_modulate_backward_op,
    layer_norm_modulate_fp8,
    layer_norm_modulate_fp8_op,
    layer_norm_modulate_op,
    layer_norm_modulate_ref,
)
from ebr_engine.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_op,
    qk_norm_rope_ref,
)
from ebr_engine.kernels.qk_norm_rope_gradient import qk_norm_rope_backward_op
from ebr_engine.kernels.quantize_fp8 import quantize_fp8, quantize_fp8_op


def randn(*shapes, learned=False):
    return [torch.randn(shape, requires_grad=learned) for shape in shapes]


def modulated(learned=False, shared=False):
    table = (1 if shared else 2, 6)
    return [*randn((2, 3, 6), table, table, learned=learned), 1e-6]


def residual(learned=False, gated=True):
    x, y, gate, weight, bias = randn((2, 3, 6), (2, 3, 6), (2, 6), (1, 6), (1, 6), learned=learned)
    return [x, y, gate if gated else None, weight, bias, 1e-6]


def rotated(learned=False, per_head=False, rows=(2, 24)):
    qkv, q_weight, k_weight = randn((2, 3, 24), *2 * [(4,) if per_head else (8,)], learned=learned)
    angle = torch.randn(3, 2)
    rows = None if rows is None else randn(rows, learned=learned)[0]
    return [qkv, q_weight, k_weight, angle.cos(), angle.sin(), 2, 1e-6, rows]


def joined(learned=False, beside=True):
    x, side = randn((2, 3, 12), (2, 3, 4), learned=learned)
    return [x, side if beside else None]


def with_gradients(arguments, results):
    """Arguments of a backward op: gradients of the results, then those of the op."""
    return [*randn(*results), *arguments]


def rotated_backward(**options):
    *tables, _, eps, rows = rotated(**options)
    return with_gradients([*tables, eps, rows], 3 * [(2, 2, 3, 4)])


REGISTERED = [
    (bridge_step_op, lambda: [*randn((2, 5), (2, 5), (2, 5), (3,))]),
    (quantize_fp8_op, lambda: randn((2, 3, 6))),
    (layer_norm_modulate_op, lambda: modulated(learned=True)),
    (layer_norm_modulate_op, lambda: [torch.randn(2, 6, 3).transpose(1, 2), *modulated()[1:]]),
    (layer_norm_modulate_backward_op, lambda: with_gradients(modulated()[:2] + [1e-6], [(2, 3, 6)])),
    (layer_norm_modulate_fp8_op, modulated),
    (gated_residual_norm_op, lambda: residual(learned=True)),
    (gated_residual_norm_op, lambda: residual(learned=True, gated=False)),
    (gated_residual_norm_backward_op, lambda: with_gradients([*randn((2, 3, 6), (2, 6), (1, 6)), 1e-6], 2 * [(2, 3, 6)])),
    (gated_residual_norm_backward_op, lambda: with_gradients([*randn((2, 3, 6)), None, *randn((1, 6)), 1e-6], 2 * [(2, 3, 6)])),
    (gated_residual_norm_fp8_op, residual),
    (gated_activation_op, lambda: joined(learned=True)),
    (gated_activation_op, lambda: joined(learned=True, beside=False)),
    (gated_activation_backward_op, lambda: randn((2, 3, 6), (2, 3, 12))),
    (gated_activation_fp8_op, joined),
    (qk_norm_rope_op, lambda: rotated(learned=True)),
    (qk_norm_rope_op, lambda: rotated(learned=True, per_head=True, rows=None)),
    (qk_norm_rope_backward_op, rotated_backward),
    (qk_norm_rope_backward_op, lambda: rotated_backward(per_head=True, rows=None)),
]

DIFFERENTIABLE = [
    (layer_norm_modulate_ref, modulated),
    (layer_norm_modulate_ref, lambda learned: modulated(learned, shared=True)),
    (gated_residual_norm_ref, residual),
    (gated_residual_norm_ref, lambda learned: residual(learned, gated=False)),
    (gated_activation_ref, joined),
    (gated_activation_ref, lambda learned: joined(learned, beside=False)),
    (qk_norm_rope_ref, rotated),
    (qk_norm_rope_ref, lambda learned: rotated(learned, per_head=True, rows=(2, 1, 24))),
]

PUBLIC = [
    (bridge_step, lambda learned: randn((2, 5), (2, 5), (2, 5), (3,))),
    (quantize_fp8, lambda learned: randn((2, 3, 6))),
    (layer_norm_modulate, modulated),
    (layer_norm_modulate_fp8, lambda learned: modulated()),
    (gated_residual_norm, residual),
    (gated_residual_norm, lambda learned: residual(learned, gated=False)),
    (gated_residual_norm_fp8, lambda learned: residual()),
    (gated_activation, joined),
    (gated_activation, lambda learned: joined(learned, beside=False)),
    (gated_activation_fp8, lambda learned: joined()),
    (qk_norm_rope, rotated),
    (qk_norm_rope, lambda learned: rotated(learned, rows=None)),
]


def named(cases):
    return pytest.mark.parametrize(("op", "make"), cases, ids=[getattr(op, "_name", None) or op.__name__ for op, _ in cases])


def tensors(results):
    """Tensors of a result, however they are nested."""
    return [results] if isinstance(results, torch.Tensor) else [x for part in results for x in tensors(part)]


@named(REGISTERED)
def test_the_registration_is_sound(op, make):
    torch.library.opcheck(op, tuple(make()))


@named(DIFFERENTIABLE)
def test_gradients_of_the_reference_are_those_of_finite_differences(op, make):
    wide = [x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in make(learned=True)]
    assert torch.autograd.gradcheck(op, wide)


@named(DIFFERENTIABLE)
def test_registered_gradients_are_those_of_the_reference(op, make, monkeypatch):
    """In float64, so that the formulas are compared and not their rounding."""
    monkeypatch.setattr(backend, "FORCED", True)
    wide = [x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in make(learned=True)]
    public = next(public for public, _ in PUBLIC if public.__name__ + "_ref" == op.__name__)
    assert torch.autograd.gradcheck(public, wide)


@named(PUBLIC)
def test_it_compiles_without_a_graph_break(op, make, monkeypatch):
    monkeypatch.setattr(backend, "FORCED", True)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    arguments = make(learned=True)
    expected, results = tensors(op(*arguments)), tensors(compiled(*arguments))
    assert [x.dtype for x in results] == [x.dtype for x in expected]
    for value, reference in zip(results, expected):
        assert torch.equal(value.float(), reference.float())
    if not any(x.requires_grad for x in expected):
        return
    leaves = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]
    pulls = [torch.randn_like(x) for x in expected]
    for value, reference in zip(torch.autograd.grad(results, leaves, pulls), torch.autograd.grad(expected, leaves, pulls)):
        torch.testing.assert_close(value, reference)
