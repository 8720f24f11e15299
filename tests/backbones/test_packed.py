"""A trunk whose layers are packed for a CPU: the same numbers, the same state, the same copies."""

import copy

import pytest
import torch
from torch import nn

from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.flux2.model import Flux2Conditioner
from ebr_engine.backbones.layers import (
    PackedLinear,
    activated,
    linear_with,
    pack_trunk,
    quantize_trunk,
    safer_trunk,
    unpack_trunk,
)
from ebr_engine.kernels.packed_linear import can_pack
from tests.tiny import TINY_FLUX, TINY_FLUX2

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this CPU or this torch has no such products")


@pytest.fixture(params=["wan", "flux", "flux2"])
def model(request, make_wan):
    """A trunk, a latent, and what bakes one step with a prompt."""
    if request.param == "wan":
        _, conditioner, trunk = make_wan()
        prompt = torch.randn(5, trunk.config.width), torch.rand(len(trunk.blocks))
        return trunk, torch.randn(1, 4, 2, 6, 6), lambda: conditioner(torch.tensor([399.0]), torch.randn(9, 10), [prompt])[0]
    if request.param == "flux2":  # whose layers have no bias
        conditioner, trunk = (half(TINY_FLUX2).requires_grad_(False) for half in (Flux2Conditioner, FluxTrunk))
        prompt, times = (torch.randn(5, TINY_FLUX2.width), torch.rand(TINY_FLUX2.blocks)), torch.tensor([399.0])
        return (
            trunk,
            torch.randn(1, 16, 1, 2, 3),
            lambda: conditioner.bake(trunk, times, {"context": torch.randn(7, 10)}, [prompt])[0],
        )
    conditioner, trunk = FluxConditioner(TINY_FLUX).requires_grad_(False), FluxTrunk(TINY_FLUX).requires_grad_(False)
    text = {"context": torch.randn(7, 10), "pooled": torch.randn(8)}
    prompt = (torch.randn(5, TINY_FLUX.width), torch.rand(TINY_FLUX.blocks))
    return trunk, torch.randn(1, 16, 1, 4, 6), lambda: conditioner.bake(trunk, torch.tensor([399.0]), text, [prompt])[0]


@torch.no_grad()
def test_the_velocity_is_the_same(model, relative_rms):
    trunk, latent, bake = model
    torch.manual_seed(3)
    step = bake()
    expected = trunk(latent, step)
    assert pack_trunk(trunk) > 0
    assert relative_rms(trunk(latent, step), expected) < 1e-5
    torch.manual_seed(3)
    assert relative_rms(trunk(latent, bake()), expected) < 1e-5  # FLUX's tables are made of the trunk's weights


def test_prompts_learn_through_a_packed_trunk_as_through_another(make_wan, relative_rms):
    _, conditioner, trunk = make_wan()
    trunk.requires_grad_(False)
    context, latent = torch.randn(9, 10), torch.randn(1, 4, 2, 6, 6)
    prompt = torch.randn(5, trunk.config.width), torch.rand(len(trunk.blocks))
    learned = [part.requires_grad_() for part in prompt]

    def gradients():
        step = conditioner(torch.tensor([399.0]), context, [prompt])[0]
        return torch.autograd.grad(trunk(latent, step).square().sum(), learned)

    expected = gradients()
    for learns in (False, True):
        unpack_trunk(trunk)
        pack_trunk(trunk, learns)
        for gradient, one in zip(gradients(), expected):
            assert relative_rms(gradient, one) < 1e-5


def test_a_state_learns_through_a_packed_trunk(model, relative_rms):
    trunk, latent, bake = model
    trunk.requires_grad_(False)
    state, step = latent.clone().requires_grad_(), bake()
    (expected,) = torch.autograd.grad(trunk(state, step).square().sum(), state)
    for learns in (False, True):
        unpack_trunk(trunk)
        pack_trunk(trunk, learns)
        (gradient,) = torch.autograd.grad(trunk(state, step).square().sum(), state)
        assert relative_rms(gradient, expected) < 1e-5


def test_every_linear_layer_of_the_blocks_is_packed_once(model):
    trunk, *_ = model
    inside = {name for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear) and "." in name}
    assert pack_trunk(trunk) == len(inside)
    assert {name for name, layer in trunk.named_modules() if isinstance(layer, PackedLinear)} == inside
    assert pack_trunk(trunk) == 0
    unpack_trunk(trunk)
    assert {name for name, layer in trunk.named_modules() if type(layer) is nn.Linear and "." in name} == inside


def test_state_and_copies_are_those_of_ordinary_layers(model):
    trunk, *_ = model
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    pack_trunk(trunk)
    for module in (trunk, copy.deepcopy(trunk)):
        state = module.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(state[name], tensor) and not state[name].is_mkldnn for name, tensor in before.items())
    assert not any(isinstance(layer, PackedLinear) for layer in copy.deepcopy(trunk).modules())


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU does not multiply bf16")
def test_a_safer_trunk_is_made_of_a_packed_one(model):
    trunk = model[0].to(torch.bfloat16)
    layers = {name: layer.weight.float() for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear)}
    pack_trunk(trunk)
    safer = safer_trunk(trunk)
    assert all(torch.equal(safer.get_submodule(name).weight, weight) for name, weight in layers.items())
    assert {tensor.dtype for tensor in safer.state_dict().values()} == {torch.float32}


@torch.no_grad()
def test_fp8_layers_stay_and_the_others_are_packed(make_wan, relative_rms):
    _, conditioner, trunk = make_wan()
    step, latent = conditioner(torch.tensor([399.0]), torch.randn(9, 10))[0], torch.randn(1, 4, 2, 6, 6)
    quantize_trunk(trunk)
    expected = trunk(latent, step)
    assert pack_trunk(trunk) == 2 * len(trunk.blocks)
    assert relative_rms(trunk(latent, step), expected) < 1e-5


def test_what_no_product_takes_is_left_alone(make_wan):
    trunk = make_wan()[2].double()
    assert pack_trunk(trunk) == 0


@torch.no_grad()
def test_one_graph_serves_all_steps(model, relative_rms):
    trunk, latent, bake = model
    steps = [bake() for _ in range(3)]
    expected = [trunk(latent, step) for step in steps]
    pack_trunk(trunk)
    torch.compiler.reset()
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(latent, steps[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, velocity in zip(steps, expected):
            assert relative_rms(compiled(latent, step), velocity) < 1e-5


def test_the_helpers_take_either_kind_of_layer():
    linear, x, bias = nn.Linear(5, 7).requires_grad_(False), torch.randn(3, 5), torch.randn(7)
    packed = PackedLinear(linear)
    torch.testing.assert_close(activated(packed, x), activated(linear, x))
    torch.testing.assert_close(linear_with(packed, x, bias), linear_with(linear, x, bias))
    assert torch.equal(packed.dense().weight, linear.weight)
