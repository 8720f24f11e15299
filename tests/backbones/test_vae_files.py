"""A VAE's folder is read without diffusers; one that is damaged or another model's is an error of one line that names it."""

import json
import shutil
import sys

import pytest
import torch

from ebr_engine.backbones.vae import load_codec
from ebr_engine.errors import BackboneError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def damaged(vae_folders, tmp_path, damage):
    """A copy of Wan's folder that is damaged in one way."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(vae_folders / "wan", tmp_path / "vae")
    weights, config = folder / WEIGHTS, folder / "config.json"
    tensors = load_file(weights)
    if damage == "no folder":
        shutil.rmtree(folder)
    elif damage in ("no config", "no weights"):
        (config if damage == "no config" else weights).unlink()
    elif damage == "no JSON":
        config.write_text('{"_class_name"')
    elif damage == "a list":
        config.write_text("[]")
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage in ("wider", "Wan 2.2", "fewer statistics"):
        change = {"wider": {"base_dim": 8}, "Wan 2.2": {"patch_size": 1}, "fewer statistics": {"latents_std": [1.0]}}[damage]
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    else:
        if damage == "missing tensor":
            del tensors["decoder.conv_in.bias"]
        else:
            tensors["decoder.more"] = torch.zeros(2)
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


DAMAGES = {
    "no folder": "is no VAE in diffusers' layout",
    "no config": "config.json is missing",
    "no weights": f"cannot load the VAE in .*{WEIGHTS}",
    "no JSON": "no JSON object",
    "a list": "no JSON object",
    "cut short": "cannot load the VAE in",
    "wider": "cannot load the VAE in .*size mismatch",
    "Wan 2.2": "of another Wan than 2.1",
    "fewer statistics": "statistics of 16 and 1 channels for 16",
    "missing tensor": "missing tensors decoder.conv_in.bias",
    "extra tensor": "unexpected tensors decoder.more",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_an_error_of_one_line_that_names_it(vae_folders, tmp_path, damage):
    with pytest.raises(BackboneError, match=DAMAGES[damage]) as error:
        load_codec("wan", damaged(vae_folders, tmp_path, damage))
    assert "\n" not in str(error.value)


def test_the_vae_of_another_backbone_is_an_error(vae_folders):
    with pytest.raises(BackboneError, match="class AutoencoderKLWan, but flux takes AutoencoderKL"):
        load_codec("flux", vae_folders / "wan")
    with pytest.raises(BackboneError, match="class AutoencoderKL, but wan takes AutoencoderKLWan"):
        load_codec("wan", vae_folders / "flux")


def test_diffusers_is_not_needed(vae_folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert load_codec("wan", vae_folders / "wan").channels == 16
