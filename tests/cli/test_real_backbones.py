"""From a folder in the published layout and a released prompt to a file: what diffusers' classes and the released code give."""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.released import released_flux, released_wan
from ebr_engine.bridge.sampler import draw_noise
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from tests.real_layout import FLUX, WAN, write_flux, write_released_prompt, write_wan

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH = {"wan": 24, "flux": 24}
BLOCKS = {"wan": WAN["num_layers"], "flux": FLUX["num_layers"] + FLUX["num_single_layers"]}
CLOSE = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a tiny model of each backbone, and released prompts beside them."""
    folder = tmp_path_factory.mktemp("models")
    found = {"wan": write_wan(folder / "wan"), "flux": write_flux(folder / "flux")}
    for backbone, rows in (("wan", 226), ("flux", 40)):
        for i, name in enumerate(("rain", "haze")):
            write_released_prompt(folder / f"{backbone}_{name}.pt", backbone, rows, WIDTH[backbone], BLOCKS[backbone], i)
    return found


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


def released_prompts(models, backbone, *names):
    loaded = [torch.load(models[backbone].parent / f"{backbone}_{name}.pt", weights_only=True) for name in names]
    return [(bank["deep_prompt_bank"]["prompts"][0], torch.stack(bank["alphas"])) for bank in loaded]


def transformer_of(kind, folder):
    module = kind.from_config(kind.load_config(folder / "transformer")).eval()
    module.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return module


@torch.no_grad()
def composed(models, backbone, pixels, prompts, mixed=False):
    """Pixels [F, H, W, 3], restored by diffusers' classes and the released algorithm alone."""
    folder = models[backbone]
    frames, height, width, _ = pixels.shape
    clip = torch.tensor(pixels).movedim(-1, 0)[None]  # [1, 3, F, H, W]
    clip = torch.nn.functional.pad(clip.flatten(0, 2)[None], (0, -width % 16, 0, -height % 16), mode="reflect")
    clip = clip.reshape(1, 3, frames, *clip.shape[-2:]) * 2 - 1
    if backbone == "wan":
        vae = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae")
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        latent = (vae.encode(clip).latent_dist.mode() - mean) / std
        parts = dict.fromkeys(("vae", "scheduler", "transformer"))
        encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        pipeline = diffusers.WanPipeline(tokenizer=tokenizer, text_encoder=encoder, **parts)
        context = pipeline._get_t5_prompt_embeds("", max_sequence_length=226)[0]
        transformer = transformer_of(diffusers.WanTransformer3DModel, folder)
        result = released_wan(transformer, latent, draw_noise(latent.shape, 42), context, prompts, mixed=mixed)
        decoded = vae.decode(result * std + mean).sample
    else:
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
        latent = (vae.encode(clip[:, :, 0]).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        parts = dict.fromkeys(("vae", "scheduler", "transformer"))
        for i in ("", "_2"):
            kind = transformers.T5EncoderModel if i else transformers.CLIPTextModel
            parts[f"text_encoder{i}"] = kind.from_pretrained(folder / f"text_encoder{i}")
            kind = transformers.T5TokenizerFast if i else transformers.CLIPTokenizer
            parts[f"tokenizer{i}"] = kind.from_pretrained(folder / f"tokenizer{i}")
        context, pooled, _ = diffusers.FluxPipeline(**parts).encode_prompt("", None, max_sequence_length=512)
        transformer = transformer_of(diffusers.FluxTransformer2DModel, folder)
        noise = draw_noise(latent.shape, 42)
        result = released_flux(transformer, latent, noise, context[0], pooled[0], prompts, mixed=mixed)
        decoded = vae.decode(result / vae.config.scaling_factor + vae.config.shift_factor).sample.unsqueeze(2)
    return (decoded[0, :, :, :height, :width].movedim(0, -1) / 2 + 0.5).clamp(0, 1).numpy()


def arguments(models, backbone, *more):
    return ["--backbone", backbone, "--model", models[backbone], "--device", "cpu", "--precision", "fp32", *more]


@pytest.mark.parametrize("backbone", ["wan", "flux"])
def test_a_picture_and_a_released_prompt_give_what_the_released_algorithm_gives(cli, models, backbone):
    pixels = picture("in.png")
    prompt = models[backbone].parent / f"{backbone}_rain.pt"
    code, _, stderr = cli(
        "restore", "in.png", "-o", "out.png", "--prompt", prompt, "--schedule", "released", *arguments(models, backbone)
    )
    assert (code, stderr) == (0, "")
    expected = composed(models, backbone, pixels[None], released_prompts(models, backbone, "rain"))[0]
    assert expected.std() > 0.01
    np.testing.assert_allclose(read_image("out.png").pixels, expected, atol=CLOSE)


@pytest.mark.parametrize("backbone", ["wan", "flux"])
def test_two_prompts_mix_by_velocity_as_released(cli, models, backbone):
    pixels = picture("in.png", 32, 48)
    prompts = [models[backbone].parent / f"{backbone}_{name}.pt" for name in ("rain", "haze")]
    how = ["--prompt", prompts[0], "--prompt", prompts[1], "--mix", "velocity", "--schedule", "released"]
    assert cli("restore", "in.png", "-o", "out.png", *how, *arguments(models, backbone))[0] == 0
    expected = composed(models, backbone, pixels[None], released_prompts(models, backbone, "rain", "haze"), mixed=True)[0]
    np.testing.assert_allclose(read_image("out.png").pixels, expected, atol=CLOSE)


def test_a_clip_is_restored_as_one(cli, models):
    from ebr_engine.media.video import VideoInfo, open_video, write_video

    y, x = np.mgrid[0:32, 0:48].astype(np.float32)
    frames = [np.repeat((0.5 + 0.3 * np.sin(x / 9 + y / 7 + i / 3))[..., None], 3, 2).astype(np.float32) for i in range(5)]
    info = VideoInfo(48, 32, fps=Fraction(25), time_base=Fraction(1, 25), bits=16, pix_fmt="gbrp16le")
    with write_video("in.mkv", info, codec="ffv1", pix_fmt="gbrp16le") as writer:
        for frame in frames:
            writer.write(frame)
    prompt = models["wan"].parent / "wan_rain.pt"
    how = ["--prompt", prompt, "--schedule", "released", "--codec", "ffv1", "--pix-fmt", "gbrp16le"]
    code, _, stderr = cli("restore", "in.mkv", "-o", "out.mkv", *how, *arguments(models, "wan"))
    assert (code, stderr) == (0, "")

    def read(path):
        with open_video(path) as reader:
            return np.stack([frame.pixels for frame in reader])

    expected = composed(models, "wan", read("in.mkv"), released_prompts(models, "wan", "rain"))
    np.testing.assert_allclose(read("out.mkv"), expected, atol=CLOSE)


@pytest.mark.parametrize("backbone", ["wan", "flux"])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_an_engine_file_gives_the_same_and_names_what_is_wrong(cli, models, backbone, precision, monkeypatch):
    monkeypatch.setattr("ebr_engine.backbones.layers.can_int8", lambda: False)  # a file's fp8 stays fp8
    picture("in.png", 32, 48)
    prompt = models[backbone].parent / f"{backbone}_rain.pt"
    how = ["--prompt", prompt, "--steps", "3", "--backbone", backbone, "--model", models[backbone], "--device", "cpu"]
    how += ["--precision", precision]
    assert cli("restore", "in.png", "-o", "direct.png", *how)[0] == 0
    code, stdout, stderr = cli("build", "-o", "rain.ebr", *how)
    assert (code, stderr) == (0, "")
    assert "3 steps" in stdout
    assert cli("restore", "in.png", "-o", "engine.png", "--engine", "rain.ebr", "--device", "cpu")[0] == 0
    np.testing.assert_array_equal(read_image("engine.png").pixels, read_image("direct.png").pixels)
    content = bytearray(Path("rain.ebr").read_bytes())
    content[-100] ^= 1
    Path("bad.ebr").write_bytes(content)
    code, _, stderr = cli("restore", "in.png", "-o", "x.png", "--engine", "bad.ebr", "--device", "cpu")
    assert code == 2
    assert "digest" in stderr


def test_flux_restores_clips_frame_by_frame_only_when_told(cli, models):
    from ebr_engine.media.video import VideoInfo, write_video

    with write_video("in.mkv", VideoInfo(32, 16, fps=Fraction(25), time_base=Fraction(1, 25)), codec="ffv1") as writer:
        for value in (0.2, 0.6):
            writer.write(np.full((16, 32, 3), value, np.float32))
    how = ["--prompt", models["flux"].parent / "flux_rain.pt", "--steps", "1", *arguments(models, "flux")]
    code, _, stderr = cli("restore", "in.mkv", "-o", "out.mkv", *how)
    assert code == 2
    assert "--per-frame" in stderr
    code, stdout, stderr = cli("restore", "in.mkv", "-o", "out.mkv", "--per-frame", *how)
    assert (code, stderr) == (0, "")
    assert "2 frames" in stdout


@pytest.mark.parametrize("backbone", ["wan", "flux"])
def test_weights_that_wait_on_the_cpu_change_nothing(models, backbone):
    from ebr_engine import Restorer

    image = torch.rand(3, 16, 32)
    prompt = models[backbone].parent / f"{backbone}_rain.pt"
    results = []
    for offload in ("none", "codec", "blocks"):
        restorer = Restorer(backbone, model=models[backbone], device="cpu", precision="fp32", offload=offload)
        results.append(restorer.restore(image, prompt=prompt, steps=2))
    assert torch.equal(results[0], results[1])
    # Blocks that wait are not laid out for the CPU's products: other sums, rounded otherwise.
    assert (results[0] - results[2]).abs().max() < 1e-4


def test_an_installed_prompt_is_found_by_its_task(cli, models):
    picture("in.png", 16, 16)
    code, _, stderr = cli("restore", "in.png", "-o", "out.png", "--task", "rain", *arguments(models, "wan"))
    assert code == 2
    assert "prompts add" in stderr
    assert cli("prompts", "add", models["wan"].parent / "wan_rain.pt")[0] == 0
    assert cli("restore", "in.png", "-o", "out.png", "--task", "rain", "--steps", "1", *arguments(models, "wan"))[0] == 0


def test_the_text_encoders_are_not_needed_once_the_context_is_there(cli, models, tmp_path):
    picture("in.png", 16, 16)
    bare = tmp_path / "bare"
    for part in ("transformer", "vae"):
        shutil.copytree(models["wan"] / part, bare / part)
    how = [
        "--prompt",
        models["wan"].parent / "wan_rain.pt",
        "--steps",
        "1",
        "--backbone",
        "wan",
        "--model",
        bare,
        "--device",
        "cpu",
    ]
    code, _, stderr = cli("restore", "in.png", "-o", "out.png", *how)
    assert code == 2
    assert "--context" in stderr
    assert cli("cache-text", "--backbone", "wan", "--model", models["wan"], "-o", "empty.safetensors")[0] == 0
    assert cli("restore", "in.png", "-o", "out.png", *how, "--context", "empty.safetensors")[0] == 0
    assert read_image("out.png").width == 16


@pytest.mark.slow
def test_a_preview_goes_through_the_tiny_autoencoder_and_the_file_through_the_vae(cli, models):
    picture("in.png")
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(latent_channels=16, scaling_factor=1.0).save_pretrained("tiny")
    options = ["--prompt", models["flux"].parent / "flux_rain.pt", *arguments(models, "flux")]
    assert cli("restore", "in.png", "-o", "plain.png", *options, "--preview", "--yes")[0] == 0
    code, _, stderr = cli("restore", "in.png", "-o", "out.png", *options, "--vae", "tiny", "--preview", "--yes")
    assert (code, stderr) == (0, "")
    assert np.array_equal(read_image("out.png").pixels, read_image("plain.png").pixels)
    shown, usual = (read_image(f"{name}_preview.png").pixels for name in ("out", "plain"))
    assert np.array_equal(shown[:, :50], usual[:, :50])  # the input
    assert not np.allclose(shown[:, -50:], usual[:, -50:], atol=0.02)
