"""The trunks as one graph: no break, and one compilation for all steps and prompts of a shape."""

import pytest
import torch

from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.flux2.model import Flux2Conditioner
from ebr_engine.backbones.layers import ROTARY_KEPT, quantize_trunk
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanTrunk
from ebr_engine.kernels import backend
from tests.tiny import TINY_FLUX, TINY_FLUX2

WAN = WanConfig(num_attention_heads=2, attention_head_dim=12, text_dim=10, freq_dim=16, ffn_dim=40, num_layers=2)


def shaken(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.requires_grad_(False)


def made(name):
    """A trunk, a latent, and the tables of three steps with either of two prompts."""
    timesteps, context = torch.tensor([399.0, 200.0, 20.0]), torch.randn(7, 10)
    prompts = [(torch.randn(5, 24), torch.rand(2 if name == "wan" else 3)) for _ in range(2)]
    if name == "wan":
        conditioner, trunk = shaken(WanConditioner(WAN)), shaken(WanTrunk(WAN))
        tables = [conditioner(timesteps, context, [prompt]) for prompt in prompts]
        return trunk, torch.randn(1, 16, 2, 4, 6), tables
    if name == "flux2":
        conditioner, trunk = shaken(Flux2Conditioner(TINY_FLUX2)), shaken(FluxTrunk(TINY_FLUX2))
        return (
            trunk,
            torch.randn(1, 16, 1, 2, 3),
            [conditioner.bake(trunk, timesteps, {"context": context}, [p]) for p in prompts],
        )
    conditioner, trunk = shaken(FluxConditioner(TINY_FLUX)), shaken(FluxTrunk(TINY_FLUX))
    tables = [conditioner.bake(trunk, timesteps, {"context": context, "pooled": torch.randn(8)}, [prompt]) for prompt in prompts]
    return trunk, torch.randn(1, 16, 1, 4, 6), tables


@pytest.mark.parametrize("name", ["wan", "flux", "flux2"])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("registered", [False, True], ids=["inline", "registered"])
@torch.no_grad()
def test_one_graph_serves_all_steps_and_prompts(name, precision, registered, monkeypatch, relative_rms):
    monkeypatch.setattr(backend, "FORCED", registered)
    trunk, latent, tables = made(name)
    if precision == "fp8":
        quantize_trunk(trunk)
    steps = [table[i] for table in tables for i in range(3)]
    expected = [trunk(latent, step) for step in steps]
    torch.compiler.reset()
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, velocity in zip(steps, expected):
            assert relative_rms(compiled(latent, step), velocity) < 1e-5


@pytest.mark.parametrize("name", ["wan", "flux"])
@torch.no_grad()
def test_a_fresh_trunk_is_compiled_once_too(name, relative_rms):
    trunk, latent, tables = made(name)
    torch.compiler.reset()
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        velocities = [compiled(latent, tables[0][i]) for i in range(3)]
    for i, velocity in enumerate(velocities):
        assert relative_rms(velocity, trunk(latent, tables[0][i])) < 1e-5


@pytest.mark.parametrize("name", ["wan", "flux"])
@torch.no_grad()
def test_tables_of_positions_that_come_and_go_compile_nothing_again(name, relative_rms):
    trunk, latent, tables = made(name)
    step = tables[0][0]
    expected, wider = trunk(latent, step), torch.cat((latent, latent), -1)
    torch.compiler.reset()
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    for one in (latent, wider):
        trunk.prepare(one, step)
        compiled(one, step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for side in range(1, 2 * ROTARY_KEPT):
            trunk.prepare(torch.zeros(*latent.shape[:-1], 2 * side), step)
        for one in (wider, latent):
            trunk.prepare(one, step)
            velocity = compiled(one, step)
    assert relative_rms(velocity, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("registered", [False, True], ids=["inline", "registered"])
@torch.no_grad()
def test_inductor_takes_the_same_graph(name, registered, monkeypatch, relative_rms):
    monkeypatch.setattr(backend, "FORCED", registered)
    trunk, latent, tables = made(name)
    expected = [trunk(latent, tables[0][i]) for i in range(3)]
    torch.compiler.reset()
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(3):
            assert relative_rms(compiled(latent, tables[0][i]), expected[i]) < 1e-5


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_gradients_to_the_latent_pass_through_the_graph(name, relative_rms):
    trunk, latent, tables = made(name)
    torch.compiler.reset()
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    gradients = []
    for run in (trunk, compiled):
        leaf = latent.clone().requires_grad_()
        run(leaf, tables[0][1]).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_rms(gradients[1], gradients[0]) < 1e-5
