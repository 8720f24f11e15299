"""The engine file (`.ebr`): a trunk in its final precision and layout, the tables of one run, and what it was made of.

One safetensors file: `trunk.*` the trunk's state, `tables.N.*` the conditioning of the N-th velocity, `steps.*` the sampler's
table, `codec.*` the codec of a bundled backbone (others name their VAE in the metadata). It is mapped into memory, so that on a
CPU nothing is read before it is used. An exported trunk (`haze.onnx`) has such a file without `trunk.*` beside it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ebr_engine.backbones.base import Backbone, Config, Spec
from ebr_engine.backbones.layers import Fp8Linear, has_fp8_attention, use_fp8_attention
from ebr_engine.backbones.pretrained import find_codec
from ebr_engine.backbones.registry import spec
from ebr_engine.bridge.sampler import StepTable
from ebr_engine.errors import EngineError
from ebr_engine.export.graph import SUFFIXES, TABLES, Graph, load_trunk
from ebr_engine.tensor_files import write_tensors
from ebr_engine.version import __version__

FORMAT = "ebr-engine engine 1"


@dataclass(frozen=True)
class EngineFile:
    """An engine file's content: the backbone without a conditioner, the run's steps and tables, and how it was made."""

    backbone: Backbone
    table: StepTable
    tables: list
    about: dict


def save_engine(path: Path, backbone: Backbone, table: StepTable, tables: list, about: dict, graph: dict | None = None) -> None:
    """Write an engine file, atomically; `about` is given back by `load_engine` and shown by `ebr-engine info`.

    `graph`: the fields of the `Graph` that the trunk was exported as; its tensors are then left out.
    """
    if not graph and not isinstance(backbone.trunk, nn.Module):
        raise EngineError("an exported trunk cannot be written as an engine file; build one from the model itself")
    trunk = {} if graph else backbone.trunk.state_dict()
    tensors = {f"trunk.{name}": tensor for name, tensor in trunk.items()}
    for i, conditioning in enumerate(tables):
        tensors |= {f"tables.{i}.{name}": tensor for name, tensor in conditioning.to_tensors().items()}
    tensors["steps.times"] = torch.tensor(table.times, dtype=torch.float64)
    tensors["steps.coefficients"] = table.coefficients
    if backbone.spec.bundled:
        tensors |= {f"codec.{name}": tensor for name, tensor in backbone.codec.to_tensors().items()}
    # Views of one storage (a conditioning shares its text between steps) are written once each, on their own.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": __version__,
        "backbone": backbone.name,
        "identity": backbone.identity,
        "config": json.dumps(backbone.trunk.config.to_diffusers()),
        "codec": json.dumps(backbone.codec_source),
        "t0": repr(table.t0),
        "about": json.dumps(about),
        "graph": json.dumps(graph),
    }
    if not graph and has_fp8_attention(backbone.trunk):
        metadata["attention"] = "fp8"
    metadata["digest"] = digest(tensors, metadata)
    try:
        write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"cannot write {path}: {error}") from error


def load_engine(path: Path, device: torch.device, vae: Path | None = None, verify: bool = True) -> EngineFile:
    """Map an engine file and put its trunk on `device`; or an exported trunk, with its tables beside it.

    `vae`: a folder in place of the VAE that the file names. `verify` compares the content with its digest, which reads the
    whole file once. Raises `EngineError` for a file that is missing, damaged, changed, or of another format.
    """
    tensors, metadata = _read(_tables_of(path))
    if verify and digest(tensors, metadata) != metadata.get("digest"):
        raise EngineError(f"{_tables_of(path)} is damaged: its content does not match its digest; build it again")
    try:
        family = spec(metadata["backbone"])
        config = family.config.from_diffusers(json.loads(metadata["config"]))
        source, about = json.loads(metadata["codec"]), json.loads(metadata["about"])
        times = tuple(tensors.pop("steps.times").tolist())
        table = StepTable(float(metadata["t0"]), times, tensors.pop("steps.coefficients"))
        kept = [family.conditioning(**_part(tensors, f"tables.{i}.")) for i in range(1 + max(_indices(tensors)))]
        if graph := json.loads(metadata.get("graph", "null")):
            graph = Graph.from_json(graph)
            dtype = getattr(torch, graph.dtype)
            trunk = load_trunk(path, graph, config, kept[0][0], device)
        elif path.suffix in SUFFIXES:
            raise EngineError(f"{_tables_of(path)} is an engine file of its own, not the tables of {path.name}; export again")
        else:
            trunk = _trunk(family, config, _part(tensors, "trunk."), device)
            use_fp8_attention(trunk, metadata.get("attention") == "fp8")
            dtype = next(p.dtype for p in trunk.parameters())
        codec = family.codec(**_part(tensors, "codec.")) if family.bundled else None
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, StopIteration, ArithmeticError) as error:
        if isinstance(error, EngineError):
            raise
        raise EngineError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if codec is None:
        codec = find_codec(family.name, vae, source)
    elif vae is not None:
        raise EngineError(f"{path} holds the codec of {family.name}, which takes no VAE; leave {vae} out")
    fixed = graph.clip if graph else None
    backbone = Backbone(family, None, trunk, codec.to(device), {}, device, dtype, metadata["identity"], source, fixed)
    return EngineFile(backbone, table, [tables.to(device, dtype) for tables in kept], about)


def read_about(path: Path) -> dict:
    """What an engine file says of itself, without reading its tensors."""
    _, metadata = _read(_tables_of(path), tensors=False)
    known = {name: metadata.get(name, "") for name in ("version", "backbone", "identity", "t0")}
    try:
        return known | dict(json.loads(metadata.get("about", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise EngineError(f"{path} is damaged: what it says of itself cannot be read") from error


def _tables_of(path: Path) -> Path:
    """The file of the tables: an engine file itself, or what lies beside an exported trunk."""
    if path.suffix == TABLES:
        raise EngineError(f"{path} holds tables only; name the file that it belongs to, {path.stem}")
    return path.with_name(path.name + TABLES) if path.suffix in SUFFIXES else path


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over metadata, names, types, shapes and every tensor's sum of 64-bit words: it runs at the memory's speed.

    It finds damage and mix-ups; it is no signature.
    """
    content = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != "digest"}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {word_sum(tensor)}".encode())
    return content.hexdigest()


def word_sum(tensor: Tensor) -> int:
    """The sum of a contiguous tensor's 64-bit words, modulo 2^64; bytes beyond the last whole word count as one each."""
    raw = tensor.reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole]
    if words.storage_offset() % 8 or words.data_ptr() % 8:  # a view as words has to be aligned
        words = words.clone()
    return int(words.view(torch.int64).sum()) + int(raw[whole:].sum())


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise EngineError(f"no such engine file: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{path} is not an engine file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise EngineError(f"{path} is not an engine file: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
    return content, metadata


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _indices(tensors: dict[str, Tensor]) -> list[int]:
    return [int(name.split(".")[1]) for name in tensors if name.startswith("tables.")]


def _trunk(family: Spec, config: Config, tensors: dict[str, Tensor], device: torch.device) -> nn.Module:
    with torch.device("meta"):
        trunk = family.trunk(config)
    for layer in [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]:
        owner, _, attribute = layer.rpartition(".")
        parts = (tensors.pop(f"{layer}.{part}").to(device) for part in ("weight", "scale", "bias"))
        setattr(trunk.get_submodule(owner), attribute, Fp8Linear.from_tensors(*parts))
    for layer, tensor in tensors.items():
        owner, _, attribute = layer.rpartition(".")
        expected = getattr(trunk.get_submodule(owner), attribute)
        if expected.shape != tensor.shape:
            raise EngineError(f"{layer} has shape {tuple(tensor.shape)}, the configuration says {tuple(expected.shape)}")
        setattr(trunk.get_submodule(owner), attribute, nn.Parameter(tensor.to(device), requires_grad=False))
    if missing := [name for name, parameter in trunk.named_parameters() if parameter.is_meta]:
        raise EngineError(f"the file misses {len(missing)} tensor(s): {', '.join(missing[:4])}")
    return trunk
