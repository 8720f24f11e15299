"""The VAE of a backbone from a folder."""

import json
from pathlib import Path

import torch

from ebr_engine.backbones.flux.codec import FluxCodec
from ebr_engine.backbones.vae import VaeCodec
from ebr_engine.backbones.wan.codec import WanCodec
from ebr_engine.errors import BackboneError

CODECS: dict[str, type[VaeCodec]] = {"wan": WanCodec, "flux": FluxCodec}


def load_codec(
    backbone: str,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    sample_latents: bool = False,
    seed: int = 42,
    tile: int | None = None,
    overlap: int | None = None,
) -> VaeCodec:
    """The codec of a backbone (`wan`, `flux`) from a folder in diffusers' layout (config.json and safetensors), on the CPU.

    Options as for `VaeCodec`. Raises `BackboneError` for a folder that is missing, incomplete, damaged or of another model.
    """
    folder, codec = Path(folder), CODECS[backbone]
    try:
        import diffusers
    except ImportError as error:
        raise BackboneError(f"the VAE of {backbone} needs diffusers: pip install 'ebr-engine[models]'") from error
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise BackboneError(f"{folder} is no VAE in diffusers' layout: config.json is missing or no JSON object") from error
    if found != codec.published:
        raise BackboneError(f"{folder} holds a model of class {found}, but {backbone} takes {codec.published}")
    try:
        vae, report = getattr(diffusers, codec.published).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise BackboneError(f"cannot load the VAE in {folder}: {' '.join(str(error).split())}") from error
    for kind in ("missing", "unexpected"):
        if names := sorted(report[f"{kind}_keys"]):
            raise BackboneError(f"the VAE in {folder} does not fit its config.json: {kind} tensors {', '.join(names[:3])} …")
    return codec(vae, dtype=dtype, sample_latents=sample_latents, seed=seed, tile=tile, overlap=overlap)
