"""What a number was made with, as data: machine, versions, commit and command; weights and prompts; schedule; the files."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ebr_engine.backbones.checkpoint import locate
from ebr_engine.backbones.layers import trunk_dtype
from ebr_engine.backbones.registry import spec
from ebr_engine.engine.devices import choose_device, device_name
from ebr_engine.engine.plan import run_table
from ebr_engine.evaluation.paired import Item
from ebr_engine.evaluation.run import Restoring
from ebr_engine.export.engine_file import read_about
from ebr_engine.prompts.catalogue import ASSETS, find_prompts, with_fine
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.version import __version__

PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "pyvips", "av", "numpy", "torchmetrics", "pyiqa")
SHA256 = re.compile(r"[0-9a-f]{64}")


def provenance(device: str | torch.device) -> dict[str, Any]:
    """The machine and the program: what every result has to be read with."""
    device = choose_device(str(device))
    return {
        "engine": __version__,
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "processor": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The commit of a checkout, with ` modified` where its files differ from it; None for an installed package."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        modified = " modified" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + modified
    except (OSError, subprocess.CalledProcessError):
        return None


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content; the hub's store names its files by it, so that those are not read."""
    stored = path.resolve()
    if stored.parent.name == "blobs" and SHA256.fullmatch(stored.name):
        return stored.name
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def joint_hash(hashes: Iterable[str]) -> str:
    """One SHA-256 for several."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def weights(backbone: str, model: str | None, revision: str | None = None, offline: bool = True) -> dict[str, Any]:
    """Where a transformer's weights came from, and their hash: of the file, or of the hashes of several."""
    if spec(backbone).bundled:
        files, source = [Path(model) if model else ASSETS / backbone / f"{backbone}.safetensors"], None
    else:
        path, source = locate(backbone, model, revision, offline, ("transformer",))
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        files = [path] if path.is_file() else sorted(folder.glob("*.safetensors"))
        source = f"{source}@{path.name}" if source else None
    hashes = [file_hash(file) for file in files]
    return {
        "source": source or (Path(model).name if model else "bundled"),
        "files": len(files),
        "sha256": hashes[0] if len(hashes) == 1 else joint_hash(hashes),
    }


def prompt_facts(path: str | Path, weight: float = 1.0) -> dict[str, Any]:
    """A prompt file's name, task, T0, fineness, weight and hash."""
    prompt, digest = load_prompt(Path(path)), file_hash(Path(path))
    learned = {"task": prompt.task, "t0": prompt.t0, "supersample": prompt.supersample, "deconvolve": prompt.deconvolve}
    return {"file": Path(path).name, **learned, "weight": weight, "sha256": digest}


def data_facts(items: Sequence[Item]) -> dict[str, Any]:
    """How many items, and a digest of their names and contents: equal for equal data, wherever it lies."""
    lines = []
    for item in items:
        roles = (item.source, item.target, item.restored)
        lines.append(" ".join([item.name, *(joint_hash(map(file_hash, media.files())) if media else "-" for media in roles)]))
    return {"items": len(items), "sha256": joint_hash(lines)}


def restoration_facts(restoring: Restoring, device: str) -> dict[str, Any]:
    """How files were restored: weights, prompts, and every number that the sampler had."""
    request, seeds = restoring.request, list(restoring.seeds)
    if request.engine:
        path = Path(request.engine)
        return {"engine": {"file": path.name, "sha256": file_hash(path), **read_about(path)}, "seeds": seeds}
    chosen = find_prompts(request.backbone, request.task) if request.task else request.prompt
    prompts = [prompt_facts(path, weight) for path, weight in (with_fine(chosen) if request.task else chosen)]
    mix = spec(request.backbone).mix if request.mix == "auto" else request.mix
    runs = [[path] for path, _ in chosen] if mix == "turn" else [[path for path, _ in chosen]]
    tables = [run_table(request, [load_prompt(Path(path)) for path in run]) for run in runs]
    schedule = {
        "name": request.schedule,
        "order": request.order,
        "runs": [{"t0": x.t0, "times": list(x.times)} for x in tables],
    }
    dtype = trunk_dtype(request.precision, choose_device(device))
    return {
        "backbone": request.backbone,
        "weights": weights(request.backbone, request.model, request.revision),
        "prompts": prompts,
        "schedule": schedule,
        **{
            name: getattr(request, name)
            for name in ("strength", "supersample", "precision", "tile", "tile_overlap", "detail", "deconvolve")
        },
        "seeds": seeds,
        "mix": mix,
        "dtype": str(dtype).removeprefix("torch."),
    }
