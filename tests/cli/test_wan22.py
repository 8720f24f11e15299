"""Wan 2.2 from a folder as diffusers' pipeline saves it to files: what the pipeline's own parts give, step by step."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.released import restore, set_wan_prompts
from ebr_engine.bridge.sampler import draw_noise
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.video import VideoInfo, open_video, write_video
from ebr_engine.prompts.prompt import load_prompt
from tests.real_layout import WAN, write_released_prompt, write_wan22, write_wan22_5b

diffusers = pytest.importorskip("diffusers")

CLOSE = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a tiny model of each backbone, and a prompt of each beside them."""
    folder = tmp_path_factory.mktemp("models")
    write_released_prompt(folder / "wan_rain.pt", "wan", 226, 24, WAN["num_layers"])
    return {"wan22": write_wan22(folder / "wan22"), "wan22-5b": write_wan22_5b(folder / "wan22-5b")}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))


@torch.no_grad()
def composed(folder, pixels, prompt):
    """Pixels [F, H, W, 3], restored along the released schedule by the parts of diffusers' pipeline alone."""
    kind, part = diffusers.WanTransformer3DModel, "transformer_2" if (folder / "transformer_2").is_dir() else "transformer"
    transformer = kind.from_config(kind.load_config(folder / part)).eval()  # its own loading needs accelerate
    transformer.load_state_dict(load_file(folder / part / "diffusion_pytorch_model.safetensors"))
    pipeline = diffusers.WanPipeline.from_pretrained(folder, **{"transformer": None, "transformer_2": None, part: transformer})
    vae = pipeline.vae
    context = pipeline._get_t5_prompt_embeds("", max_sequence_length=226)
    set_wan_prompts(transformer, [prompt])
    clip = torch.tensor(pixels).movedim(-1, 0)[None] * 2 - 1
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latent = (vae.encode(clip).latent_dist.mode() - mean) / std

    times = iter(torch.linspace(0.4, 1e-4, 4, dtype=torch.float64).float() * 1000)

    def velocity(state, timestep):
        if pipeline.config.expand_timesteps:  # Wan 2.1's scheduler table is not this model's, and a token has its own time
            timestep = next(times).expand(len(state), state[0, 0, :, ::2, ::2].numel())
        else:
            assert timestep < 1000 * pipeline.config.boundary_ratio  # where the pipeline takes its second transformer
        return transformer(state, timestep, context, return_dict=False)[0]

    result = restore(velocity, latent, draw_noise(latent.shape, 42), "wan", steps=4)
    decoded = vae.decode(result * std + mean).sample
    return (decoded[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1).numpy()


def waves(frames, height, width):
    """A clip [F, H, W, 3] without fine detail."""
    f, y, x = np.mgrid[0:frames, 0:height, 0:width].astype(np.float32)
    return np.stack([0.5 + 0.3 * np.sin(x / 9 + c + f / 3) * np.cos(y / 7) for c in range(3)], axis=-1).astype(np.float32)


def prompt_of(file):
    content = torch.load(file, weights_only=True)
    return content["deep_prompt_bank"]["prompts"][0], torch.stack(content["alphas"])


def options(models, backbone, *more):
    return ["--backbone", backbone, "--model", models[backbone], "--device", "cpu", "--precision", "fp32", *more]


def test_a_picture_is_restored_by_the_transformer_for_little_noise(cli, models, caplog):
    write_image("in.png", Picture(waves(1, 32, 48)[0], bits=16))
    file = models["wan22"].parent / "wan_rain.pt"
    how = ["--prompt", file, "--schedule", "released", "--steps", "4", *options(models, "wan22")]
    assert cli("restore", "in.png", "-o", "out.png", *how)[0] == 0
    assert [record.message[:60] for record in caplog.records] == ["this prompt was learned on another model, of the wan backbon"]
    expected = composed(models["wan22"], read_image("in.png").pixels[None], prompt_of(file))[0]
    assert expected.std() > 0.01
    np.testing.assert_allclose(read_image("out.png").pixels, expected, atol=CLOSE)


@pytest.mark.parametrize("backbone", [pytest.param("wan22", marks=pytest.mark.slow), "wan22-5b"])
def test_a_learned_prompt_is_installed_found_and_built_into_an_engine_file(cli, models, backbone):
    for side, gain in (("input", 0.5), ("target", 1.0)):
        Path("pairs", side).mkdir(parents=True)
        for i, frame in enumerate(waves(2, 40, 40)):
            write_image(Path("pairs", side, f"{i}.png"), Picture(gain * frame))
    learn = ["--task", "fog", "--data", "pairs", "--iterations", "2", "--size", "32", "--frames", "1", "--tokens", "5"]
    assert cli("train", "-o", "fog.safetensors", *learn, *options(models, backbone))[0] == 0
    assert cli("prompts", "add", "fog.safetensors")[0] == 0
    write_image("in.png", Picture(waves(1, 32, 64)[0], bits=16))
    how = ["--task", "fog", "--steps", "2", *options(models, backbone)]
    code, _, stderr = cli("restore", "in.png", "-o", "direct.png", *how)
    assert (code, stderr) == (0, "")
    assert cli("build", "-o", "fog.ebr", *how)[0] == 0
    assert cli("restore", "in.png", "-o", "engine.png", "--engine", "fog.ebr", "--device", "cpu")[0] == 0
    np.testing.assert_array_equal(read_image("engine.png").pixels, read_image("direct.png").pixels)
    assert Path("fog.ebr").stat().st_size > 0


@pytest.mark.parametrize("backbone", [pytest.param("wan22", marks=pytest.mark.slow), "wan22-5b"])
def test_a_clip_is_restored_as_one(cli, models, backbone):
    info = VideoInfo(64, 32, fps=Fraction(25), time_base=Fraction(1, 25), bits=16, pix_fmt="gbrp16le")
    with write_video("in.mkv", info, codec="ffv1", pix_fmt="gbrp16le") as writer:
        for frame in waves(5, 32, 64):
            writer.write(frame)
    file = models["wan22"].parent / "wan_rain.pt"
    replace(load_prompt(file), backbone=backbone).save("own.safetensors")
    how = ["--prompt", "own.safetensors", "--schedule", "released", "--steps", "4", "--codec", "ffv1", "--pix-fmt", "gbrp16le"]
    assert cli("restore", "in.mkv", "-o", "out.mkv", *how, *options(models, backbone))[0] == 0

    def read(path):
        with open_video(path) as reader:
            return np.stack([frame.pixels for frame in reader])

    np.testing.assert_allclose(read("out.mkv"), composed(models[backbone], read("in.mkv"), prompt_of(file)), atol=CLOSE)


def test_a_bridge_above_the_boundary_is_told_in_one_line(cli, models):
    write_image("in.png", Picture(waves(1, 32, 48)[0], bits=16))
    file = models["wan22"].parent / "wan_rain.pt"
    code, _, stderr = cli("restore", "in.png", "-o", "out.png", "--prompt", file, "--t0", "0.9", *options(models, "wan22"))
    assert code == 2
    assert stderr.splitlines()[-1].startswith("error: a bridge from T0 0.9 would meet the wan22 model's other transformer")
    assert not Path("out.png").exists()
