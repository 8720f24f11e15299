"""The backbones by name. What one is and does is said by its folder's `spec` module, which is imported when it is asked for."""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from ebr_engine.errors import BackboneError
from ebr_engine.media import PICTURES, SOUND

if TYPE_CHECKING:
    import torch

    from ebr_engine.backbones.base import Backbone, Config, ModelSource, Spec

BACKBONES = {  # a line each: the module with its SPEC
    "mini": "ebr_engine.backbones.mini.spec",
    "wan": "ebr_engine.backbones.wan.spec",
    "flux": "ebr_engine.backbones.flux.spec",
    "wan22": "ebr_engine.backbones.wan22.a14b",
    "wan22-5b": "ebr_engine.backbones.wan22.ti2v",
    "flux2": "ebr_engine.backbones.flux2.spec",
    "mini-audio": "ebr_engine.backbones.mini_audio.spec",
}

MEDIA = {"mini-audio": SOUND}  # what they restore, known without importing them: pictures and clips, unless it is said here


def medium_of(name: str) -> str:
    """What a backbone restores: `pictures`, which clips are made of, or `sound`."""
    return MEDIA.get(name, PICTURES)


def restores(medium: str) -> list[str]:
    """The backbones that restore a medium."""
    return [name for name in BACKBONES if medium_of(name) == medium]


def spec(name: str) -> "Spec":
    """What the engine knows of a backbone; `BackboneError` for a name that there is not."""
    if name not in BACKBONES:
        near = get_close_matches(name, BACKBONES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BackboneError(f"unknown backbone {name!r}; {hint}choose one of {', '.join(BACKBONES)}")
    return import_module(BACKBONES[name]).SPEC


def published() -> "list[Spec]":
    """The backbones whose weights are read from checkpoints."""
    return [one for one in map(spec, BACKBONES) if not one.bundled]


def named_configs() -> "dict[str, tuple[Spec, Config]]":
    """All published sizes by name, with their backbone's spec."""
    return {name: (one, config) for one in map(spec, BACKBONES) for name, config in one.configs.items()}


def named_config(name: str) -> "Config":
    """The configuration of a published size; `BackboneError` lists the names there are."""
    if name not in (configs := named_configs()):
        raise BackboneError(f"unknown configuration {name!r}; there is: {', '.join(configs)}")
    return configs[name][1]


def load_backbone(
    name: str,
    source: "ModelSource",
    device: "torch.device",
    precision: str,
    runs_on: "torch.device | None" = None,
    fp8_attention: bool = False,
) -> "Backbone":
    """Load a backbone by name, its trunk in `precision` on `device`.

    `runs_on`: where it will compute, if its weights wait elsewhere: what `auto` means goes by that. Where that has no arithmetic
    of the precision, another takes its place, with a warning.

    Raises `BackboneError` for a model that is missing, damaged or of another kind, for a source that names what the
    backbone does not take, and for `fp8_attention` on a device that has none.
    """
    from ebr_engine.backbones import layers

    chosen = spec(name)
    chosen.check_source(source)
    precision = layers.taken_precision(precision, runs_on or device)
    if fp8_attention:
        layers.check_fp8_attention(runs_on or device)
    backbone = chosen.load(source, device, layers.trunk_dtype(precision, runs_on or device))
    if precision in ("fp8", "int8"):
        layers.quantize_trunk(backbone.trunk, layers.Int8Linear if precision == "int8" else layers.Fp8Linear)
    if fp8_attention:
        layers.use_fp8_attention(backbone.trunk)
    return backbone
