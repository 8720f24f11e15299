"""The plain writing of the released algorithm computes what the authors' code computed: every call and every result."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors import safe_open

from benchmarks import released
from ebr_engine.backbones.registry import spec
from ebr_engine.bridge.schedules import released_times

FOLDER = Path(__file__).parents[1] / "golden"
FILES = sorted(FOLDER.glob("*.safetensors"))
CLASSES = {"wan": WanTransformer3DModel, "flux": FluxTransformer2DModel}
TOLERANCE = 1e-4  # of the reference's RMS: what the files promise in float32


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request):
    """A file with diffusers' module loaded, its velocity function and the settings of the released run."""
    with safe_open(request.param, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    backbone = metadata["backbone"]
    transformer = CLASSES[backbone](**json.loads(metadata["config"])).eval().requires_grad_(False)
    transformer.load_state_dict(
        {name.removeprefix("weights."): tensor for name, tensor in tensors.items() if name.startswith("weights.")}
    )
    count = sum(name.startswith("prompt.") and name.endswith(".residual") for name in tensors)
    text = [tensors[name][0] for name in ("context", "pooled") if name in tensors]
    if backbone == "wan":
        velocity, set_prompts, run = released.wan_velocity(transformer, *text), released.set_wan_prompts, released.released_wan
    else:
        guidance = float(metadata["guidance"])
        velocity = released.flux_velocity(transformer, *text, guidance)
        set_prompts, run = released.set_flux_prompts, released.released_flux
    return SimpleNamespace(
        backbone=backbone,
        tensors=tensors,
        transformer=transformer,
        text=text,
        prompts=[(tensors[f"prompt.{k}.residual"], tensors[f"prompt.{k}.alpha"]) for k in range(count)],
        velocity=velocity,
        set_prompts=lambda prompts: set_prompts(transformer, prompts),
        run=run,
        schedule={"steps": int(metadata["steps"]), "t0": float(metadata["t0"]), "t_min": float(metadata["t_min"])},
        mixed=metadata["mixed"] == "True" if "mixed" in metadata else count > 1,
        calls=sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".velocity")),
    )


def restored(golden, **changes):
    latents = golden.tensors["degraded_latent"], golden.tensors["noise"]
    settings = golden.schedule | {"mixed": golden.mixed} | changes
    return golden.run(golden.transformer, *latents, *golden.text, golden.prompts, **settings)


def test_there_are_files():
    assert {path.stem for path in FILES} >= {"wan", "wan_mixed", "flux"}


def test_each_call_gives_the_released_velocity(golden, relative_rms):
    assert golden.calls
    for call in golden.calls:
        state, velocity = golden.tensors[f"call.{call}.state"], golden.tensors[f"call.{call}.velocity"]
        golden.set_prompts([golden.prompts[call % len(golden.prompts)]])
        timestep = golden.tensors["timesteps"][call : call + 1]
        assert relative_rms(golden.velocity(state, timestep), velocity) < TOLERANCE, f"call {call}"


def test_without_a_prompt_it_is_the_frozen_backbone(golden, relative_rms):
    golden.set_prompts([])
    velocity = golden.velocity(golden.tensors["call.0.state"], golden.tensors["timesteps"][:1])
    assert relative_rms(velocity, golden.tensors["velocity_prompt_off.0"]) < TOLERANCE
    assert relative_rms(velocity, golden.tensors["call.0.velocity"]) > 100 * TOLERANCE


def test_the_run_gives_the_released_latent(golden, relative_rms):
    result = restored(golden)
    assert result.dtype == torch.float32
    assert relative_rms(result, golden.tensors["restored_latent"]) < TOLERANCE
    assert relative_rms(golden.tensors["degraded_latent"], golden.tensors["restored_latent"]) > 100 * TOLERANCE


def test_a_batch_is_restored_sample_by_sample(golden, relative_rms):
    latents = [torch.cat([golden.tensors[name], golden.tensors[name].flip(-1)]) for name in ("degraded_latent", "noise")]
    both = golden.run(golden.transformer, *latents, *golden.text, golden.prompts[:1], steps=2)
    for i in range(2):
        one = golden.run(golden.transformer, *(x[i : i + 1] for x in latents), *golden.text, golden.prompts[:1], steps=2)
        assert relative_rms(both[i : i + 1], one) < TOLERANCE


def test_prompts_together_are_not_prompts_averaged(golden, relative_rms):
    if len(golden.prompts) < 2:
        pytest.skip("this file has one prompt")
    assert relative_rms(restored(golden, mixed=False), golden.tensors["restored_latent"]) > 100 * TOLERANCE


@pytest.mark.parametrize("backbone", ["wan", "flux"])
@pytest.mark.parametrize(("steps", "t0"), [(20, 0.4), (6, 0.4), (20, 0.2), (7, 0.13)])
def test_timesteps_are_those_of_the_golden_files_and_of_the_engine(backbone, steps, t0):
    times = torch.linspace(t0, released.T_MIN, steps, dtype=torch.float64)
    table = released.table_timesteps(times, backbone)
    assert table.tolist() == spec(backbone).released_timesteps(released_times(steps, t0)).tolist()
    if (backbone, steps, t0) == ("wan", 20, 0.4):
        assert table.tolist()[:3] + table.tolist()[-2:] == [399, 378, 357, 20, 0]


def test_no_steps_are_refused(golden):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        restored(golden, steps=0)
