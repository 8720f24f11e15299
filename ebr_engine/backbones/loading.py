"""From a name to a frozen backbone that can bake and run: both halves, the codec, the empty text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebr_engine.backbones.mini import load_mini
from ebr_engine.backbones.quantized import quantize_trunk, trunk_dtype
from ebr_engine.errors import BackboneError

if TYPE_CHECKING:
    from ebr_engine.codecs import Codec


POSTERIOR_SEED = 43  # of latents drawn from the VAE: another than the sampler's usual 42, whose noise it would repeat


@dataclass(frozen=True)
class ModelSource:
    """Where a backbone comes from; None is the bundled or default one."""

    model: str | Path | None = None  # folder, file or hub id
    revision: str | None = None  # of a hub id
    offline: bool = False  # never ask the hub
    context: Path | None = None  # a file of `ebr-engine cache-text`, in place of the text encoders
    vae: Path | None = None  # a folder in diffusers' layout, in place of the model's own
    sample_latents: bool = False  # draw from the VAE's posterior, as released, rather than take its mode


@dataclass
class Backbone:
    """A frozen backbone. Latents are [B, C, F, H, W], whatever the transformer's own shape is."""

    name: str  # mini, wan or flux
    conditioner: nn.Module | None  # None in an engine file, whose tables are baked
    trunk: nn.Module
    codec: "Codec"
    text: dict[str, Tensor]  # the empty text: context, and pooled (FLUX)
    device: torch.device
    dtype: torch.dtype  # of the trunk's layers that are not fp8
    identity: str = ""  # which model, of which revision
    codec_source: dict[str, str] = field(default_factory=dict)  # where the VAE lies, for an engine file
    fixed: tuple[int, int, int] | None = None  # frames, height, width in pixels: all that an exported trunk takes, if it is so

    @property
    def width(self) -> int:
        return self.trunk.config.width

    @property
    def blocks(self) -> int:
        """Blocks that a prompt has a strength for."""
        return self.trunk.config.blocks if self.name == "flux" else self.trunk.config.num_layers

    @property
    def patch(self) -> int:
        """Latent cells that a token spans, either way."""
        return 2 if self.name == "flux" else self.trunk.config.patch_size[-1]

    @property
    def noise(self) -> float:
        """How much of the bridge's noise a run starts with."""
        return getattr(self.codec, "noise", 1.0)

    @property
    def multiple(self) -> int:
        """Pixels that a token spans, either way."""
        return self.codec.spatial * self.patch

    def bake(self, timesteps: Tensor, prompts: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """The tables of a run at timesteps [S] (0 to 1000) with prompts as (residual, weight·α); on the trunk's device."""
        if self.conditioner is None:
            raise BackboneError("an engine file holds the tables of its own prompt and schedule only; build another one")
        if self.name == "flux":
            table = self.conditioner.bake(self.trunk, timesteps, self.text["context"], self.text["pooled"], prompts)
        else:
            table = self.conditioner(timesteps, self.text["context"], prompts)
        return table.to(self.device, self.dtype)

    def prepare(self, latent: Tensor, step: Any) -> None:
        """Make what the trunk keeps of a latent's shape, so that a graph of it takes that as it is."""
        if self.name == "flux":
            frame = latent[:, :, 0]
            self.trunk.rotary(self.trunk.grid(frame.shape), step.text.shape[0], latent.device)
        else:
            self.trunk.rotary(self.trunk.grid(latent.shape), latent.device)

    def velocity(self, latent: Tensor, step: Any) -> Tensor:
        """Velocity [B, C, F, H, W] float32 of a latent at one step of the tables."""
        if self.name != "flux":
            return self.trunk(latent, step)
        frames = latent.shape[2]
        return self.trunk(latent.transpose(1, 2).flatten(0, 1), step).unflatten(0, (-1, frames)).transpose(1, 2)


def load_backbone(name: str, source: ModelSource, device: torch.device, precision: str) -> Backbone:
    """Load a backbone by name (`mini`, `wan`, `flux`), its trunk in `precision` on `device`.

    Raises `BackboneError` for a model that is missing, damaged or of another kind.
    """
    dtype = trunk_dtype(precision, device)
    backbone = _mini(source, device, dtype) if name == "mini" else _pretrained(name, source, device, dtype)
    if precision == "fp8":
        quantize_trunk(backbone.trunk)
    return backbone


def _mini(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Backbone:
    mini = load_mini(*([Path(source.model)] if source.model else []), device=device, dtype=dtype)
    return Backbone("mini", mini.conditioner, mini.trunk, mini.codec.to(device), {"context": mini.context}, device, dtype, "mini")


def _pretrained(name: str, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Backbone:
    from ebr_engine.backbones import checkpoint
    from ebr_engine.vae import load_codec

    files = checkpoint.find_model(name, source.model, revision=source.revision, offline=source.offline)
    vae = source.vae or files.vae
    if vae is None:
        raise BackboneError(f"{files.identity} has no VAE beside it; name a folder in diffusers' layout with --vae")
    codec = load_codec(name, Path(vae), sample_latents=source.sample_latents, seed=POSTERIOR_SEED)
    if codec.channels != (channels := latent_channels(files.config)):
        raise BackboneError(f"the VAE in {vae} makes {codec.channels} channels, {files.identity} takes {channels}")
    text = empty_text(name, source, files.identity)
    conditioner, trunk = checkpoint.load_backbone(files, device, dtype)
    found = {"folder": str(Path(vae).resolve()), "model": str(source.model or ""), "revision": source.revision or ""}
    return Backbone(name, conditioner, trunk, codec.to(device), text, device, dtype, files.identity, found)


def latent_channels(config: Any) -> int:
    """Channels of the latents that a transformer of this configuration takes."""
    return getattr(config, "latent_channels", None) or config.in_channels


def find_codec(name: str, folder: Path | None, source: dict[str, str]) -> "Codec":
    """The VAE of an engine file: in `folder`, or where the file was built from (`Backbone.codec_source`)."""
    from ebr_engine.backbones import checkpoint
    from ebr_engine.vae import load_codec

    folder = folder or Path(source["folder"])
    if not folder.is_dir():
        model, revision = source["model"] or None, source["revision"] or None
        found = checkpoint.find_model(name, model, revision=revision, parts=("vae",)).vae
        if found is None:
            raise BackboneError(f"the VAE of this engine is not at {folder} any more; name its folder with --vae")
        folder = found
    return load_codec(name, folder)


def empty_text(name: str, source: ModelSource, identity: str) -> dict[str, Tensor]:
    """The text encoders' output for the empty prompt: from the file that the source names, the cache, or made now."""
    from ebr_engine.backbones import checkpoint, text

    if source.context is not None:
        return text.load_context(source.context, name)
    cached = text.cached_context(name, identity)
    if cached is not None:
        return cached
    parts = ("text_encoder", "tokenizer")
    files = checkpoint.find_model(name, source.model, revision=source.revision, offline=source.offline, parts=parts)
    return text.empty_context(name, identity, files.text_encoders, files.tokenizers)
