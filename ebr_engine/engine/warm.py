"""Code and choices prepared on this machine before they are needed, and what is known of them: `ebr-engine warm`.

Compiled code lies in the compiler's own cache, choices in `kernels/tune.py`'s; here is only what they are for, and how long a
process takes to have the code again. It belongs to a machine, a number of threads and a version of torch.
"""

import json
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from ebr_engine import settings
from ebr_engine.backbones.base import Backbone
from ebr_engine.engine.costs import precision
from ebr_engine.engine.devices import device_name, synchronise
from ebr_engine.kernels import tune

if TYPE_CHECKING:
    from ebr_engine.engine.restorer import Restorer

FILE = "prepared.json"


def machine(device: torch.device) -> str:
    """What prepared code belongs to."""
    if device.type == "cpu":
        return tune.machine(torch.get_num_threads())
    return f"{device_name(device)}, torch {torch.__version__}"


def prepared(device: torch.device) -> dict[str, dict[str, Any]]:
    """What was prepared here: backbone, precision and size in words → seconds that compiling took, and takes with code kept."""
    before = f"{machine(device)}: "
    return {key.removeprefix(before): one for key, one in _stored().items() if key.startswith(before)}


def compile_seconds(backbone: Backbone, cells: tuple[int, int]) -> float | None:
    """Seconds that compiling for latents of a size takes where `prepare` has been; None where it has not."""
    height, width = (side * backbone.codec.spatial for side in cells)
    return prepared(backbone.device).get(_kind(backbone, height, width), {}).get("kept")


def prepare(restorer: "Restorer", task: str, size: int) -> dict[str, Any]:
    """Restore a picture of `size` pixels either way, so that ways are chosen and, unless `compile` is off, code is compiled and
    kept; the seconds of it, which are also remembered."""
    plan, pixels = restorer.plan(task), torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))

    def seconds() -> float:
        started = time.perf_counter()
        restorer.run(pixels, plan)
        synchronise(restorer.device)
        return time.perf_counter() - started

    first = seconds()
    found: dict[str, Any] = {"first": first, "compiled": None, "kept": None}
    if restorer.runner.compiled is not None:
        torch._dynamo.reset()  # as a new process finds it
        again, ready = seconds(), seconds()
        found |= {"compiled": max(0.0, first - ready), "kept": max(0.0, again - ready)}
    _remember(f"{machine(restorer.device)}: {_kind(restorer.backbone, size, size)}", found)
    return found


def _kind(backbone: Backbone, height: int, width: int) -> str:
    return f"{backbone.name}, {precision(backbone)}, {height} x {width}"


def _stored() -> dict[str, dict[str, Any]]:
    """What the file holds; nothing where there is none, or where it is damaged: it can be made again."""
    try:
        found = json.loads((settings.cache_dir() / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def _remember(key: str, found: dict[str, Any]) -> None:
    path = settings.cache_dir() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(_stored() | {key: found}, indent=1) + "\n")
    partial.replace(path)
