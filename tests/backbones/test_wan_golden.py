"""What the authors' released code computed on tiny backbones: every call, every timestep and the sampler's result.

`EBR_GOLDEN_DIR` names another folder whose files are all checked the same way.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.backbones.wan.weights import diffusers_state_dict, load_wan
from ebr_engine.bridge.sampler import mean_velocity, sample, step_table
from ebr_engine.bridge.schedules import exact_times, released_times

FOLDER = Path(os.environ.get("EBR_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
FILES = sorted(FOLDER.glob("*.safetensors"))
TOLERANCE = 1e-4  # of the reference's RMS: what the files promise in float32


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request):
    """A file with its backbone loaded; files of backbones that have tests of their own are skipped."""
    with safe_open(request.param, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["backbone"] != "wan":
        pytest.skip(f"{request.param.name} is of the {metadata['backbone']} backbone")
    weights = {name.removeprefix("weights."): tensors[name] for name in tensors if name.startswith("weights.")}
    conditioner, trunk = load_wan(WanConfig.from_diffusers(json.loads(metadata["config"])), weights)
    count = sum(name.startswith("prompt.") and name.endswith(".residual") for name in tensors)
    schedule = {"steps": int(metadata["steps"]), "t0": float(metadata["t0"]), "t_min": float(metadata["t_min"])}
    return SimpleNamespace(
        tensors=tensors,
        weights=weights,
        mixed=metadata["mixed"] == "True",
        conditioner=conditioner,
        trunk=trunk,
        context=tensors["context"][0],
        prompts=[(tensors[f"prompt.{k}.residual"], tensors[f"prompt.{k}.alpha"]) for k in range(count)],
        schedule=schedule,
        calls=sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".velocity")),
    )


def restore(golden, times):
    """Sample through `times` as the released code does: a call for each prompt a step, the velocities averaged."""
    timesteps = spec("wan").released_timesteps(times)
    runs = [golden.conditioner(timesteps, golden.context, [prompt]) for prompt in golden.prompts]
    table = step_table(times, golden.schedule["t0"])
    latents = golden.tensors["degraded_latent"], golden.tensors["noise"]
    return sample(mean_velocity(golden.trunk), list(zip(*runs)), *latents, table)


def test_there_are_files():
    assert FILES, f"no golden files in {FOLDER}"


def test_files_are_whole(golden):
    assert golden.calls
    assert (len(golden.prompts) > 1) == golden.mixed


def test_each_call_gives_the_released_velocity(golden, relative_rms):
    for call in golden.calls:
        state, timestep, velocity = (golden.tensors[f"call.{call}.{name}"] for name in ("state", "timestep", "velocity"))
        prompt = golden.prompts[call % len(golden.prompts)]
        step = golden.conditioner(timestep, golden.context, [prompt])[0]
        assert relative_rms(golden.trunk(state, step), velocity) < TOLERANCE, f"call {call}"


def test_without_a_prompt_it_is_the_frozen_backbone(golden, relative_rms):
    step = golden.conditioner(golden.tensors["call.0.timestep"], golden.context)[0]
    velocity = golden.trunk(golden.tensors["call.0.state"], step)
    assert relative_rms(velocity, golden.tensors["velocity_prompt_off.0"]) < TOLERANCE
    assert relative_rms(velocity, golden.tensors["call.0.velocity"]) > 100 * TOLERANCE  # the prompt matters in this file


def test_timesteps_are_the_released_ones(golden):
    timesteps = spec("wan").released_timesteps(released_times(**golden.schedule))
    assert timesteps.repeat_interleave(len(golden.prompts)).tolist() == golden.tensors["timesteps"].tolist()


def test_sampling_gives_the_released_latent(golden, relative_rms):
    restored = restore(golden, released_times(**golden.schedule))
    assert relative_rms(restored, golden.tensors["restored_latent"]) < TOLERANCE
    assert relative_rms(restored, golden.tensors["degraded_latent"]) > 100 * TOLERANCE


def test_the_last_evaluation_is_not_needed(golden, relative_rms):
    times = exact_times(**golden.schedule)
    assert len(times) == golden.schedule["steps"]  # one evaluation less, and the end
    assert relative_rms(restore(golden, times), golden.tensors["restored_latent"]) < 2 * TOLERANCE


def test_weights_go_in_and_come_out_bit_for_bit(golden):
    state = diffusers_state_dict(golden.conditioner, golden.trunk)
    assert state.keys() == golden.weights.keys()
    assert all((state[name] == golden.weights[name]).all() for name in state)
