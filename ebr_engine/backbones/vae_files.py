"""A VAE's network from a folder in diffusers' layout: config.json and safetensors, on the CPU; diffusers is not needed."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ebr_engine.backbones.checkpoint import INDEX, WEIGHTS, shards
from ebr_engine.errors import BackboneError

FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names in attention of early files


def read_network(folder: Path, backbone: str, published: str, network: type[nn.Module], config: type) -> nn.Module:
    """The network of a backbone's VAE, whose class diffusers calls `published`, with its weights in float32.

    Raises `BackboneError` for a folder that is missing, incomplete, damaged or of another model.
    """
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = said.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise BackboneError(f"{folder} is no VAE in diffusers' layout: config.json is missing or no JSON object") from error
    if found != published:
        raise BackboneError(f"{folder} holds a model of class {found}, but {backbone} takes {published}")
    try:
        with torch.device("meta"):
            vae = network(config(**{field.name: said[field.name] for field in fields(config) if field.name in said}))
        vae.to_empty(device="cpu")
        missing, unexpected = _load(vae, folder)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, SafetensorError) as error:
        raise BackboneError(f"cannot load the VAE in {folder}: {' '.join(str(error).split())}") from error
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            listed = ", ".join(sorted(names)[:3])
            raise BackboneError(f"the VAE in {folder} does not fit its config.json: {kind} tensors {listed} …")
    return vae


def _load(vae: nn.Module, folder: Path) -> tuple[set[str], set[str]]:
    """Copy the folder's tensors into the network, one by one; which are missing, and which it does not know."""
    index, single = folder / f"{WEIGHTS}{INDEX}", folder / WEIGHTS
    to: dict[str, Any] = vae.state_dict()
    missing, unexpected = set(to), set()
    for file in shards(index) if index.is_file() else [single]:
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (no mapping)
                name = _current(stored)
                if name not in to:
                    unexpected.add(stored)
                    continue
                found = tensors.get_tensor(stored)
                if found.shape != to[name].shape:
                    shapes = f"{tuple(found.shape)} for {tuple(to[name].shape)}"
                    raise ValueError(f"{file.name} does not fit config.json: size mismatch of {stored}, {shapes}")
                to[name].copy_(found)
                missing.discard(name)
    return missing, unexpected


def _current(name: str) -> str:
    parts = name.rsplit(".", 2)
    if len(parts) == 3 and parts[1] in FORMER and ".attentions." in name:
        return f"{parts[0]}.{FORMER[parts[1]]}.{parts[2]}"
    return name
