"""FLUX.2 from a folder in the published layout to a file: what diffusers' classes and the bridge's formula give."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import load_backbone
from ebr_engine.bridge.sampler import draw_noise
from ebr_engine.errors import EngineWarning
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.prompts.prompt import Prompt
from tests.backbones.test_flux2_diffusers import reference
from tests.real_layout import FLUX2, write_flux2

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
WIDTH, BLOCKS = 32, FLUX2["num_layers"] + FLUX2["num_single_layers"]
STEPS, T0, T_MIN = 4, 0.4, 1e-4
CLOSE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model, a prompt in it."""
    folder = write_flux2(tmp_path_factory.mktemp("models") / "klein")
    torch.manual_seed(1)
    prompt = Prompt(torch.randn(40, WIDTH) * 4, torch.rand(BLOCKS), "flux2", task="rain", t0=T0)
    prompt.save(folder / "rain.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))


def picture(path, height=37, width=53):
    """A smooth 16-bit picture, so that rounding does not count."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pixels = np.stack([0.5 + 0.3 * np.sin(x / 9 + c) * np.cos(y / 7) for c in range(3)], axis=2).astype(np.float32)
    write_image(path, Picture(pixels, bits=16))
    return read_image(path).pixels


def arguments(model, *more):
    return ["--backbone", "flux2", "--model", model, "--device", "cpu", *more]


@torch.no_grad()
def composed(model, pixels, prompts):
    """Pixels [H, W, 3], restored by diffusers' classes and the bridge's formula alone."""
    height, width, _ = pixels.shape
    padded = torch.nn.functional.pad(torch.tensor(pixels).movedim(-1, 0)[None], (0, -width % 16, 0, -height % 16), mode="reflect")
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(model / "vae")
    encoder = transformers.Qwen3ForCausalLM.from_pretrained(model / "text_encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model / "tokenizer")
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": None, "transformer": None}
    pipeline = diffusers.Flux2KleinPipeline(**parts)
    context = pipeline.encode_prompt("", device="cpu")[0][0]
    transformer = diffusers.Flux2Transformer2DModel.from_config(
        diffusers.Flux2Transformer2DModel.load_config(model / "transformer")
    ).eval()
    transformer.load_state_dict(load_file(model / "transformer" / "diffusion_pytorch_model.safetensors"))
    degraded = pipeline._encode_vae_image(padded * 2 - 1, None)
    noise = draw_noise((*degraded.shape[:2], 1, *degraded.shape[2:]), 42).squeeze(2)
    times = torch.linspace(T0, T_MIN, STEPS, dtype=torch.float64).tolist()
    state = (1 - T0) * degraded + T0 * noise
    for i, t in enumerate(times):
        clean = state - t * reference(transformer, state, torch.tensor([1000 * t]), context, prompts)
        if i == STEPS - 1:
            break
        s = times[i + 1]
        state = s / t * state + (1 - s / t + s * (s - t) / T0) * clean + s * (t - s) / T0 * degraded
    mean, variance = (x.view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    latent = pipeline._unpatchify_latents(clean * (variance + vae.config.batch_norm_eps).sqrt() + mean)
    return (vae.decode(latent).sample[0, :, :height, :width].movedim(0, -1) / 2 + 0.5).clamp(0, 1).numpy()


def test_a_picture_is_what_diffusers_classes_and_the_formula_give(cli, model):
    pixels, prompt = picture("in.png"), load_file(model / "rain.safetensors")
    how = ["--prompt", model / "rain.safetensors", "--schedule", "released", "--steps", STEPS, "--precision", "fp32"]
    assert cli("restore", "in.png", "-o", "out.png", *map(str, how), *arguments(model))[0] == 0
    expected = composed(model, pixels, [(prompt["residual"], prompt["alpha"])])
    assert expected.std() > 0.01
    assert np.abs(composed(model, pixels, []) - expected).max() > 10 * CLOSE  # the prompt matters
    np.testing.assert_allclose(read_image("out.png").pixels, expected, atol=CLOSE)


@pytest.mark.parametrize("says", [True, False])
def test_a_distilled_model_is_told_in_a_line(model, tmp_path, says):
    from ebr_engine.backbones.checkpoint import find_model

    named = shutil.copytree(model, tmp_path / "flux-2-klein-4b")
    if says:
        index = json.loads((named / "model_index.json").read_text())
        (named / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
        with pytest.warns(EngineWarning, match="klein-4b@.* is distilled to few steps.*FLUX.2-klein-base-4B"):
            load_backbone("flux2", ModelSource(named), torch.device("cpu"), "fp32")
        return
    assert not find_model("flux2", named).distilled  # the index has the last word
    (named / "model_index.json").unlink()
    assert find_model("flux2", named).distilled
    assert not find_model("flux2", named.rename(tmp_path / "flux-2-klein-base-4b")).distilled


def test_a_prompt_is_learned_built_into_an_engine_file_and_restores(cli, model):
    for side, gain in (("input", 0.5), ("target", 1.0)):
        Path("pairs", side).mkdir(parents=True)
        for i in range(2):
            write_image(f"pairs/{side}/{i}.png", Picture(gain * picture("one.png", 40 + i, 40)))
    learn = ["--task", "fog", "--data", "pairs", "--iterations", "2", "--size", "32", "--tokens", "5", "-o", "fog.safetensors"]
    assert cli("train", *learn, *arguments(model))[0] == 0
    assert cli("prompts", "add", "fog.safetensors")[0] == 0
    picture("in.png", 32, 48)
    how = ["--task", "fog", "--steps", "2", *arguments(model, "--precision", "fp32")]
    assert cli("restore", "in.png", "-o", "direct.png", *how)[0] == 0
    assert cli("build", "-o", "fog.ebr", *how)[0] == 0
    assert cli("restore", "in.png", "-o", "engine.png", "--engine", "fog.ebr", "--device", "cpu")[0] == 0
    np.testing.assert_array_equal(read_image("engine.png").pixels, read_image("direct.png").pixels)
