"""From a folder, a file or a hub id to a backbone's two halves.

Sources: diffusers' folder layout, sharded or not, local or from the hub, and the original layouts as one safetensors file or
sharded ones. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ebr_engine.backbones.base import Config
from ebr_engine.backbones.hub import HUB_ID, fetch
from ebr_engine.backbones.hub import INDEX as PIPELINE
from ebr_engine.backbones.parameters import OriginalState, State, TensorFiles
from ebr_engine.backbones.registry import published, spec
from ebr_engine.errors import BackboneError

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of the transformer, in files that hold other models too
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = ".index.json"
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
READABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
LORA = re.compile(r"lora_(A|B|up|down)|\.lora\.|\.(hada|lokr)_")
QUANTISED = re.compile(r"(scale_weight|weight_scale(_inv)?|scale_input|input_scale|scaled_fp8|absmax|quant_map|qweight|SCB)$")


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: its sizes, and where its parts are."""

    backbone: str
    config: Config
    state: Mapping[str, Tensor]  # diffusers' names; a tensor is read when it is asked for
    identity: str  # "org/name@commit" of the hub, "name@hash of the sizes" of local files
    boundary: float  # see `Backbone.boundary`
    distilled: bool  # to few steps
    vae: Path | None  # folders in diffusers' layout, where there are any
    text_encoders: tuple[Path, ...]
    tokenizers: tuple[Path, ...]


def find_model(
    backbone: str,
    source: str | Path | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    parts: Collection[str] = ("transformer", "vae"),
) -> ModelFiles:
    """Find a model, fetching what is not here, without reading a weight.

    Args: `backbone`: its name. `source`: a folder, a .safetensors file or a hub id; None is the backbone's default.
    `revision`: commit, branch or tag of a hub id. `offline`: never ask the hub, use what it has cached. `parts`: of
    `transformer`, `vae`, `text_encoder`, `tokenizer`, those to fetch; without `transformer` the state is empty.
    Raises: `BackboneError` for a source that is missing, damaged, of another model or of a format that is not supported.
    """
    path, hub_id = locate(backbone, source, revision, offline, parts)
    root, home = model_folders(path, backbone)
    boundary = read_pipeline(root / PIPELINE, backbone)
    settings = read_settings(home / "config.json", backbone)
    sized = settings.get("_class_name") == spec(backbone).checkpoints.transformer
    state = open_state(home if path.is_dir() else path, backbone) if "transformer" in parts or not sized else {}
    try:
        config = read_config(backbone, settings, state)
    except BackboneError as error:
        raise BackboneError(f"{home if sized else path}: {error}") from error
    weights = [path] if path.is_file() else root.glob("*/*.safetensors")
    files = sorted((file.relative_to(root).as_posix(), file.stat().st_size) for file in weights)
    digest = hashlib.sha256(json.dumps([config.to_diffusers(), files], sort_keys=True).encode()).hexdigest()
    name = path.stem if path.is_file() else root.name

    def present(*names: str) -> tuple[Path, ...]:
        return tuple(root / name for name in names if (root / name).is_dir())

    return ModelFiles(
        backbone,
        config,
        state if "transformer" in parts else {},
        f"{hub_id}@{path.name}" if hub_id else f"{name}@{digest[:12]}",
        boundary,
        is_distilled(root / PIPELINE, backbone, hub_id or name),
        next(iter(present("vae")), None),
        present("text_encoder", "text_encoder_2"),
        present("tokenizer", "tokenizer_2"),
    )


def locate(
    backbone: str, source: str | Path | None, revision: str | None, offline: bool, parts: Collection[str]
) -> tuple[Path, str | None]:
    """The absolute path of a model on this machine, and its hub id if it was fetched."""
    if spec(backbone).bundled:
        names = ", ".join(one.name for one in published())
        raise BackboneError(f"the {backbone!r} backbone has no checkpoints of its own; there is: {names}")
    default = spec(backbone).checkpoints.default
    hub_id = default if source is None else Path(source).as_posix()
    path = Path(os.path.abspath(Path(hub_id).expanduser()))  # resolve() would leave the hub's folders for its store
    if source is not None and path.exists():
        if revision is not None:
            raise BackboneError(f"{path} is on this machine; a revision ({revision!r}) pins a hub id only")
        return path, None
    if not HUB_ID.fullmatch(hub_id) or path.suffix in (".safetensors", ".gguf", *PICKLES):
        raise BackboneError(f"no such file or folder: {source} (and not a hub id, such as {default})")
    folders = spec(backbone).checkpoints.folders
    if "transformer" in parts:  # a model of another backbone is told before its weights are fetched
        read_pipeline(fetch(hub_id, revision, offline, (), folders) / PIPELINE, backbone)
    path = fetch(hub_id, revision, offline, parts, folders)
    if not any((path / folder).is_dir() for folder in folders):
        raise BackboneError(f"{hub_id} has no {folders[0]} folder; name a repository in diffusers' layout, or a local file")
    return path, hub_id


def load_halves(files: ModelFiles, device: torch.device | str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Build both halves, frozen, tensor by tensor: the trunk in `dtype` on `device`, the conditioner on the CPU.

    Wan's conditioner is float32, FLUX's stays as it is stored. Raises `BackboneError` for missing or unexpected keys and for
    shapes that do not fit the configuration.
    """
    if not files.state:
        raise BackboneError(f"{files.identity} was found without its transformer")
    try:
        return spec(files.backbone).checkpoints.load(files.config, files.state, device, dtype)
    except BackboneError as error:
        raise BackboneError(f"{files.identity}: {error}") from error


def model_folders(path: Path, backbone: str) -> tuple[Path, Path]:
    """The folder of all parts of a model, and that of its transformer; they are one where there is nothing but a transformer."""
    checkpoints = spec(backbone).checkpoints
    for folder in checkpoints.folders:
        if (path / folder).is_dir():
            return path, path / folder
    home = path if path.is_dir() else path.parent
    for name in (home.name, path.name):
        if re.fullmatch(checkpoints.passed_over, name, re.IGNORECASE):
            names = " or ".join(checkpoints.folders)
            raise BackboneError(f"{path} is the transformer of {backbone} that is not run, by its name; name its {names}")
    return (home.parent if home.name in checkpoints.folders else home), home


def read_pipeline(path: Path, backbone: str) -> float:
    """The boundary (see `Backbone`) that a pipeline's index says; `BackboneError` where the pipeline is of another backbone."""
    chosen = spec(backbone).checkpoints
    index = read_json(path) if path.is_file() else {}
    alike = [one for one in published() if one.checkpoints.transformer == chosen.transformer]
    named = {mark for one in alike for mark in one.checkpoints.marks if index.get(mark) not in (None, False, [None, None])}
    if index and named != set(chosen.marks):
        found = next((one.name for one in alike if set(one.checkpoints.marks) == named), None)
        if found is None:
            raise BackboneError(f"{path} is of a pipeline that is not known: it names {', '.join(sorted(named))}")
        raise other_backbone(path.parent, found, backbone)
    boundary = index.get("boundary_ratio") or chosen.boundary
    if not isinstance(boundary, (int, float)) or not 0 < boundary <= 1:
        raise BackboneError(f"{path} is damaged: boundary_ratio is {boundary!r}, expected a number between 0 and 1")
    return boundary


def is_distilled(path: Path, backbone: str, name: str) -> bool:
    """Whether a model was distilled to few steps, as its pipeline's index or, where that says nothing, its name has it."""
    index = read_json(path) if path.is_file() else {}
    pattern = spec(backbone).checkpoints.distilled
    return bool(index.get("is_distilled", pattern and re.search(pattern, name, re.IGNORECASE)))


def read_settings(path: Path, backbone: str) -> dict:
    """What a configuration file says, {} where there is none; `BackboneError` when it is of another backbone."""
    if not path.is_file():
        return {}
    settings = read_json(path)
    if settings.get("quantization_config"):
        raise BackboneError(f"{path.parent} is quantised, which is not supported; use the bf16 checkpoint")
    name = settings.get("_class_name")
    for other in published():
        if spec(backbone).checkpoints.transformer != name == other.checkpoints.transformer:
            raise other_backbone(path.parent, other.name, backbone)
    return settings


def read_config(backbone: str, settings: dict, state: State | dict) -> Config:
    """The sizes of a model from diffusers' settings or, where there are none, from the shapes of its tensors."""
    chosen, name = spec(backbone), settings.get("_class_name")
    if name != chosen.checkpoints.transformer:
        if name is not None and not isinstance(state, OriginalState):
            raise BackboneError(f"its config.json is of {name}; a {backbone} model has {chosen.checkpoints.transformer}")
        settings = chosen.checkpoints.sizes(state, settings)
    try:
        config = chosen.config.from_diffusers(settings)
    except TypeError as error:
        raise BackboneError(f"its config.json is damaged: {error}") from error
    for field, value in vars(config).items():
        counts = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, type(getattr(chosen.config, field))) or (counts and value < 1):
            raise BackboneError(f"its config.json is damaged: {field}={value!r}")
    if (out := vars(config).get("out_channels", config.in_channels)) != config.in_channels:
        found = f"in_channels={config.in_channels} and out_channels={out}"
        raise BackboneError(f"it has {found}: models with extra image inputs (image-to-video) are not supported")
    return config


def open_state(path: Path, backbone: str) -> State:
    """The tensors of a transformer's file or folder under diffusers' names, whatever the layout."""
    paths = weight_files(path)
    files = TensorFiles(paths)
    for key in files:
        if LORA.search(key):
            raise BackboneError(f"{paths[0]} is a LoRA ({key}): LoRA merge is not supported; use a checkpoint it is merged into")
        if QUANTISED.search(key) or files.dtype(key) not in READABLE:
            raise BackboneError(
                f"{paths[0]} is quantised ({key} is {files.dtype(key)}): scaled fp8, int8 and 4-bit checkpoints are not "
                "supported; use the bf16 checkpoint"
            )
    files = without_prefix(files)
    found, original = layout(files, backbone)
    if found is None:
        some = ", ".join(sorted(files)[:3]) or "none"
        titles = " or ".join(one.title for one in published())
        raise BackboneError(f"{paths[0]} holds no transformer of {titles}; its first keys are: {some}")
    if found != backbone:
        raise other_backbone(path, found, backbone)
    return OriginalState(spec(backbone).checkpoints.original, files) if original else files


def without_prefix(files: TensorFiles) -> TensorFiles:
    """The transformer of a file that puts its name before its keys, or all there is."""
    return next((part for prefix in PREFIXES if (part := files.under(prefix))), files)


def layout(keys: Collection[str], backbone: str | None = None) -> tuple[str | None, bool]:
    """The backbone whose transformer has such keys (None: no one's), and whether they are those of the original layout.

    `backbone`: the one that is meant, where several have the same keys.
    """
    for one in sorted(published(), key=lambda one: one.name != backbone):
        for pattern, original in one.checkpoints.layouts.items():
            if any(re.match(pattern, key) for key in keys):
                return one.name, original
    return None, False


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a transformer: a file or its shards, or what a folder has; `BackboneError` if there are none."""
    if path.is_file():
        if path.suffix == ".gguf":
            raise BackboneError(f"{path}: GGUF is not supported; use the safetensors checkpoint")
        if path.suffix in PICKLES:
            raise BackboneError(f"{path}: pickled checkpoints can run code and are never read; use the safetensors checkpoint")
        if not path.name.endswith((".safetensors", f".safetensors{INDEX}")):
            raise BackboneError(f"{path} is not a safetensors checkpoint")
        return shards(path)
    for file in (path / f"{WEIGHTS}{INDEX}", path / WEIGHTS, *sorted(path.glob(f"*.safetensors{INDEX}"))):
        if file.is_file():
            return shards(file)
    files = sorted(path.glob("*.safetensors"))
    sets = {tuple(shards(file)) for file in files}
    transformers = [paths for paths in sets if len(sets) == 1 or layout(without_prefix(TensorFiles(paths)))[0]]
    if len(transformers) == 1:
        return list(transformers[0])
    if transformers:
        names = ", ".join(sorted(paths[0].name for paths in transformers))
        raise BackboneError(f"{path} holds several transformers ({names}); name one of the files")
    others = sorted(file.name for file in path.iterdir() if file.suffix in (".gguf", *PICKLES))
    hint = f"; {others[0]} is in a format that is not supported (GGUF and pickles are not)" if others else ""
    raise BackboneError(f"{path} holds no safetensors checkpoint of a transformer{hint}")


def shards(path: Path) -> list[Path]:
    """The files that a checkpoint is spread over, from its index or from one of them; `BackboneError` names a missing one."""
    if path.name.endswith(INDEX):
        index = read_json(path)
        try:
            files = [path.with_name(name) for name in sorted(set(index["weight_map"].values()))]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BackboneError(f"{path} is not an index of shards") from error
    elif match := SHARD.fullmatch(path.name):
        files = [path.with_name(f"{match[1]}-{i:05}-of-{match[2]}.safetensors") for i in range(1, int(match[2]) + 1)]
    else:
        files = [path]
    if missing := [file.name for file in files if not file.is_file()]:
        listed = ", ".join(missing[:4])
        raise BackboneError(f"{path.parent} misses {len(missing)} of {len(files)} shard(s): {listed}; fetch them again")
    return files


def read_json(path: Path) -> dict:
    """A JSON object of a file; `BackboneError` when it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path} does not hold a JSON object")
    return content


def other_backbone(path: Path, found: str, asked: str) -> BackboneError:
    """What to say when a model is of another backbone than was asked for."""
    return BackboneError(f"{path} holds a {found} transformer, not {asked}: use it with the {found} backbone")
