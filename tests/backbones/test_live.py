"""Live tables are the conditioner's own, their gradients too; a block may have a prompt of its own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.weights import load_flux
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.backbones.wan.weights import load_wan

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
TIMES = torch.tensor([120.0, 377.0])


def make_backbone(name, dtype):
    """A tiny random backbone, with its prompt and two latents."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    kind, load = (FluxConfig, load_flux) if name == "flux" else (WanConfig, load_wan)
    halves = load(kind.from_diffusers(config), weights, dtype=dtype)
    text = {"context": tensors["context"][0]} | ({"pooled": tensors["pooled"][0]} if name == "flux" else {})
    backbone = Backbone(spec(name), *halves, None, text, CPU, dtype)
    latents = tensors["degraded_latent"]
    latents = latents if latents.ndim == 5 else latents.unsqueeze(2)
    latents = latents.reshape(1, *latents.shape[-4:])
    return backbone, (tensors["prompt.0.residual"], tensors["prompt.0.alpha"]), torch.cat((latents, latents.flip(-1)))


def gradients(backbone, tables, latents, prompt):
    prompt = [part.clone().requires_grad_() for part in prompt]
    loss = backbone.velocity(latents, tables(*prompt)).square().mean()
    return loss.detach(), *torch.autograd.grad(loss, prompt)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_live_tables_and_their_gradients_are_the_conditioners(name, own, relative_rms):
    backbone, (residual, alpha), latents = make_backbone(name, torch.float32)
    if own:
        residual = residual * torch.linspace(-1, 1, backbone.blocks)[:, None, None]
    live = backbone.live(residual.shape[-2])
    ours = gradients(backbone, lambda *prompt: live(TIMES, *prompt), latents, (residual, alpha))
    theirs = gradients(backbone, lambda *prompt: backbone.bake(TIMES, [prompt]).batch(), latents, (residual, alpha))
    for mine, reference in zip(ours, theirs):
        assert reference.abs().max() > 0
        assert relative_rms(mine, reference) < 1e-5


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_in_bf16_gradients_keep_their_direction(name):
    wide, prompt, latents = make_backbone(name, torch.float32)
    narrow, *_ = make_backbone(name, torch.bfloat16)
    expected, found = (
        gradients(backbone, lambda *live, backbone=backbone: backbone.live(len(prompt[0]))(TIMES, *live), latents, prompt)
        for backbone in (wide, narrow)
    )
    for mine, reference in zip(found[1:], expected[1:]):
        assert torch.nn.functional.cosine_similarity(mine.flatten(), reference.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_prompt_for_each_block_is_that_blocks_alone(name):
    backbone, (residual, alpha), latents = make_backbone(name, torch.float32)
    shared = backbone.velocity(latents, backbone.bake(TIMES, [(residual, alpha)]).batch())
    repeated = residual.expand(backbone.blocks, -1, -1).clone()
    assert torch.allclose(backbone.velocity(latents, backbone.bake(TIMES, [(repeated, alpha)]).batch()), shared, atol=1e-6)
    repeated[-1] = 0.0
    other = backbone.velocity(latents, backbone.bake(TIMES, [(repeated, alpha)]).batch())
    only_last = alpha.clone()
    only_last[-1] = 0.0
    if name == "flux":  # the last block's rows with α = 0 are those with P = 0
        assert torch.allclose(other, backbone.velocity(latents, backbone.bake(TIMES, [(residual, only_last)]).batch()), atol=1e-6)
    assert (other - shared).abs().max() > 1e-4
    mixed = backbone.bake(TIMES, [(repeated, alpha), (residual, alpha)]).batch()  # one of each kind in one run
    assert backbone.velocity(latents, mixed).isfinite().all()


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_finite_differences_confirm_the_gradients(name):
    backbone, prompt, latents = make_backbone(name, torch.float32)
    live = backbone.live(len(prompt[0]))
    loss, *found = gradients(backbone, lambda *live_prompt: live(TIMES, *live_prompt), latents, prompt)
    for which, gradient in enumerate(found):
        step = 2e-3 * loss / gradient.square().sum()  # along the gradient, so far that the loss moves by 0.2 % either way
        sides = []
        for sign in (1, -1):
            moved = list(prompt)
            moved[which] = moved[which] + sign * step * gradient
            with torch.no_grad():
                sides.append(backbone.velocity(latents, live(TIMES, *moved)).double().square().mean())
        assert torch.isclose((sides[0] - sides[1]) / (2 * step), gradient.double().square().sum(), rtol=0.01)
