"""A backbone from a published model: both halves, the VAE, the empty text."""

from pathlib import Path

import torch
from torch import Tensor

from ebr_engine.backbones import text
from ebr_engine.backbones.base import Backbone, ModelSource
from ebr_engine.backbones.checkpoint import find_model, load_halves
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.tiny_vae import is_tiny, load_tiny
from ebr_engine.backbones.vae import VaeCodec, load_codec
from ebr_engine.errors import BackboneError, warn

POSTERIOR_SEED = 43  # of latents drawn from the VAE: another than the sampler's usual 42, whose noise it would repeat


def load_pretrained(name: str, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The backbone of a name, its trunk in `dtype` on `device`; `BackboneError` for a model that cannot be used."""
    files = find_model(name, source.model, revision=source.revision, offline=source.offline)
    if files.distilled:
        undistilled = spec(name).checkpoints.default
        about = "what it makes of little noise need not be a clean picture"
        warn(f"{files.identity} is distilled to few steps: {about}; the undistilled model is {undistilled}")
    tiny = source.vae if source.vae is not None and is_tiny(Path(source.vae)) else None
    vae = files.vae if tiny else source.vae or files.vae
    if vae is None:
        raise BackboneError(f"{files.identity} has no VAE beside it; name a folder in diffusers' layout with --vae")
    codec = load_codec(name, Path(vae), sample_latents=source.sample_latents, seed=POSTERIOR_SEED)
    preview = load_tiny(name, Path(tiny)) if tiny else None
    for path, one in ((vae, codec), (tiny, preview)):
        if one is not None and one.channels != (channels := files.config.latent_channels):
            raise BackboneError(f"the VAE in {path} makes {one.channels} channels, {files.identity} takes {channels}")
    context = empty_text(name, source, files.identity)
    halves = load_halves(files, device, dtype)
    found = {"folder": str(Path(vae).resolve()), "model": str(source.model or ""), "revision": source.revision or ""}
    parts = *halves, codec.to(device), context, device, dtype, files.identity, found
    return Backbone(spec(name), *parts, boundary=files.boundary, preview=preview)


def find_codec(name: str, folder: Path | None, source: dict[str, str]) -> VaeCodec:
    """The VAE of an engine file: in `folder`, or where the file was built from (`Backbone.codec_source`)."""
    if folder is not None and is_tiny(folder):
        raise BackboneError(f"{folder} is a tiny autoencoder, for previews of a model; an engine takes the folder of a VAE")
    folder = folder or Path(source["folder"])
    if not folder.is_dir():
        model, revision = source["model"] or None, source["revision"] or None
        found = find_model(name, model, revision=revision, parts=("vae",)).vae
        if found is None:
            raise BackboneError(f"the VAE of this engine is not at {folder} any more; name its folder with --vae")
        folder = found
    return load_codec(name, folder)


def empty_text(name: str, source: ModelSource, identity: str) -> dict[str, Tensor]:
    """The text encoders' output for the empty prompt: from the file that the source names, the cache, or made now."""
    if source.context is not None:
        return text.load_context(source.context, name)
    cached = text.cached_context(name, identity)
    if cached is not None:
        return cached
    parts = ("text_encoder", "tokenizer")
    files = find_model(name, source.model, revision=source.revision, offline=source.offline, parts=parts)
    return text.empty_context(name, identity, files.text_encoders, files.tokenizers)
