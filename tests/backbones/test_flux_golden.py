"""What the authors' released code computed on a tiny FLUX: every call, every timestep and the sampler's result."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from ebr_engine.backbones.flux import FluxConfig
from ebr_engine.backbones.flux_weights import diffusers_state_dict, load_flux
from ebr_engine.bridge import make_table, released_timesteps
from ebr_engine.sampler import sample

FILE = Path(__file__).parents[1] / "golden" / "flux.safetensors"
TOLERANCE = 1e-4  # of the reference's RMS: what the file promises in float32


@pytest.fixture(scope="module")
def golden():
    """The file with its backbone loaded and the released run's tables baked."""
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {name.removeprefix("weights."): tensors[name] for name in tensors if name.startswith("weights.")}
    conditioner, trunk = load_flux(FluxConfig.from_diffusers(json.loads(metadata["config"])), weights)
    table = make_table("released", float(metadata["t0"]), int(metadata["steps"]))
    timesteps = released_timesteps(table.times, "flux")
    text = tensors["context"][0], tensors["pooled"][0]
    prompts = [(tensors["prompt.0.residual"], tensors["prompt.0.alpha"])]
    guidance = float(metadata["guidance"])
    return SimpleNamespace(
        tensors=tensors,
        weights=weights,
        conditioner=conditioner,
        trunk=trunk,
        table=table,
        timesteps=timesteps,
        conditioning=conditioner.bake(trunk, timesteps, *text, prompts, guidance),
        without_prompt=conditioner(timesteps, *text, guidance),
    )


def test_timesteps_are_those_the_released_code_feeds(golden):
    # The scheduler's table is a thousandth times a thousand in float32, one rounding away from the integer.
    torch.testing.assert_close(golden.timesteps, golden.tensors["timesteps"], atol=0, rtol=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("call", [0, 1, 10, 18, 19])
def test_each_call_gives_the_released_velocity(golden, relative_rms, call):
    state, timestep, velocity = (golden.tensors[f"call.{call}.{name}"] for name in ("state", "timestep", "velocity"))
    assert golden.timesteps[call] == timestep.item()
    assert relative_rms(golden.trunk(state, golden.conditioning[call]), velocity) < TOLERANCE


def test_without_a_prompt_it_is_the_frozen_backbone(golden, relative_rms):
    velocity = golden.trunk(golden.tensors["call.0.state"], golden.without_prompt[0])
    assert relative_rms(velocity, golden.tensors["velocity_prompt_off.0"]) < TOLERANCE
    assert relative_rms(velocity, golden.tensors["call.0.velocity"]) > 100 * TOLERANCE  # the prompt matters in this file


def test_the_sampler_restores_the_released_latent(golden, relative_rms):
    latents = golden.tensors["degraded_latent"], golden.tensors["noise"]
    restored = sample(golden.trunk, golden.conditioning, *latents, golden.table)
    assert relative_rms(restored, golden.tensors["restored_latent"]) < TOLERANCE
    assert relative_rms(latents[0], golden.tensors["restored_latent"]) > 100 * TOLERANCE  # it is not the degraded one


def test_weights_come_back_bit_for_bit(golden):
    state = diffusers_state_dict(golden.conditioner, golden.trunk)
    assert state.keys() == golden.weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in golden.weights.items())
