"""What the authors' released code computed on a tiny FLUX: every call, every timestep and the sampler's result.

`EBR_GOLDEN_DIR` names another folder whose files are all checked the same way.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.weights import diffusers_state_dict, load_flux
from ebr_engine.backbones.registry import spec
from ebr_engine.bridge.sampler import mean_velocity, sample, step_table
from ebr_engine.bridge.schedules import released_times

FOLDER = Path(os.environ.get("EBR_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
FILES = sorted(FOLDER.glob("flux*.safetensors"))
TOLERANCE = 1e-4  # of the reference's RMS: what the files promise in float32


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request):
    """A file with its backbone loaded and the released run's tables baked, one table a prompt."""
    with safe_open(request.param, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {name.removeprefix("weights."): tensors[name] for name in tensors if name.startswith("weights.")}
    conditioner, trunk = load_flux(FluxConfig.from_diffusers(json.loads(metadata["config"])), weights)
    t0 = float(metadata["t0"])
    table = step_table(released_times(int(metadata["steps"]), t0, float(metadata["t_min"])), t0)
    timesteps = spec("flux").released_timesteps(table.times)
    plain = conditioner(timesteps, tensors["context"][0], tensors["pooled"][0], float(metadata["guidance"]))
    count = sum(name.startswith("prompt.") and name.endswith(".residual") for name in tensors)
    prompts = [(tensors[f"prompt.{k}.residual"], tensors[f"prompt.{k}.alpha"]) for k in range(count)]
    return SimpleNamespace(
        tensors=tensors,
        weights=weights,
        conditioner=conditioner,
        trunk=trunk,
        velocity=lambda latent, step: trunk(latent.unsqueeze(2), step).squeeze(2),  # the files' latents are of pictures
        table=table,
        timesteps=timesteps,
        plain=plain,
        prompted=[plain.with_prompts(trunk, [prompt]) for prompt in prompts],
        calls=sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".velocity")),
    )


def test_there_are_files():
    assert FILES, f"no FLUX golden files in {FOLDER}"


def test_timesteps_are_those_the_released_code_feeds(golden):
    # The scheduler's table is a thousandth times a thousand in float32, one rounding away from the integer.
    expected = golden.timesteps.repeat_interleave(len(golden.prompted))
    torch.testing.assert_close(expected, golden.tensors["timesteps"], atol=0, rtol=torch.finfo(torch.float32).eps)


def test_each_call_gives_the_released_velocity(golden, relative_rms):
    assert golden.calls
    for call in golden.calls:
        state, velocity = golden.tensors[f"call.{call}.state"], golden.tensors[f"call.{call}.velocity"]
        step, prompt = divmod(call, len(golden.prompted))
        value = golden.velocity(state, golden.prompted[prompt][step])
        assert relative_rms(value, velocity) < TOLERANCE, f"call {call}"


def test_without_a_prompt_it_is_the_frozen_backbone(golden, relative_rms):
    velocity = golden.velocity(golden.tensors["call.0.state"], golden.plain[0])
    assert relative_rms(velocity, golden.tensors["velocity_prompt_off.0"]) < TOLERANCE
    assert relative_rms(velocity, golden.tensors["call.0.velocity"]) > 100 * TOLERANCE  # the prompt matters in this file


def test_the_sampler_restores_the_released_latent(golden, relative_rms):
    latents = golden.tensors["degraded_latent"], golden.tensors["noise"]
    restored = sample(mean_velocity(golden.velocity), list(zip(*golden.prompted)), *latents, golden.table)
    assert relative_rms(restored, golden.tensors["restored_latent"]) < TOLERANCE
    assert relative_rms(latents[0], golden.tensors["restored_latent"]) > 100 * TOLERANCE  # it is not the degraded one


def test_weights_come_back_bit_for_bit(golden):
    state = diffusers_state_dict(golden.conditioner, golden.trunk)
    assert state.keys() == golden.weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in golden.weights.items())
