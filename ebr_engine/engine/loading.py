"""From a request to a loaded `Engine`: a backbone's weights or an engine file, on the devices that it names, as memory allows."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import load_backbone
from ebr_engine.engine import plan as planning
from ebr_engine.engine.devices import choose_device
from ebr_engine.engine.fallback import Fitting, load_with_offload
from ebr_engine.engine.parallel import first_device, leading
from ebr_engine.engine.plan import Plan
from ebr_engine.engine.run import Engine
from ebr_engine.errors import EngineError, check_choice
from ebr_engine.export.engine_file import load_engine
from ebr_engine.kernels import backend
from ebr_engine.request import RestoreRequest

Made = TypeVar("Made")  # what comes with an engine


def engine_of(request: RestoreRequest) -> Engine:
    """The backbone that a request asks for, loaded; `EbrError` for anything that cannot be met."""
    paths = (Path(path).expanduser() if path else None for path in (request.context, request.vae))
    source = ModelSource(request.model, request.revision, request.offline, *paths, request.sample_latents)

    def load(device: torch.device, offload: str, fitting: Fitting) -> tuple[Engine, None]:
        resident = _resident(device, offload)
        loaded = load_backbone(request.backbone, source, resident, request.precision, device, request.fp8_attention)
        return Engine(loaded, device, offload, request.compile, fitting), None

    return _loaded(load, request)[0]


def engine_of_file(request: RestoreRequest) -> tuple[Engine, Plan]:
    """The backbone of a request's engine file, loaded, and the one plan that it runs; `EngineError` for a file that has none."""

    def load(device: torch.device, offload: str, fitting: Fitting) -> tuple[Engine, Plan]:
        vae = Path(request.vae).expanduser() if request.vae else None
        file = load_engine(request.engine, _resident(device, offload), vae)
        if offload == "blocks" and not isinstance(file.backbone.trunk, torch.nn.Module):
            raise EngineError("an exported trunk has no blocks that could wait on the CPU; use offload codec or none")
        plan = planning.of_file(file, device)
        return Engine(file.backbone, device, offload, request.compile, fitting), plan

    return _loaded(load, request)


def _resident(device: torch.device, offload: str) -> torch.device:
    """Where weights are when nothing runs."""
    return torch.device("cpu") if offload == "blocks" else device


def _loaded(load: Callable[[torch.device, str, Fitting], tuple[Engine, Made]], request: RestoreRequest) -> tuple[Engine, Made]:
    """What `load` makes on the request's first device, with the offload that fits; its engine is joined by the other devices."""
    check_choice("EBR_KERNELS", backend.ASKED, backend.CHOICES)
    check_choice("EBR_VERIFY", backend.VERIFY, tuple(backend.VERIFY_CHOICES))
    check_choice("EBR_CPU_LEVEL", backend.CPU_LEVEL, backend.CPU_LEVELS)
    check_choice("EBR_CPU_TUNE", backend.TUNE, backend.TUNES)
    device, fitting = choose_device(first_device(request)), Fitting(request.max_memory, request.low_memory)

    def with_offload(offload: str) -> tuple[Engine, Made]:
        return load(device, offload, fitting)

    with leading(request) as ranks:
        made = load_with_offload(with_offload, device, request.offload, request.compile != "on")
        if ranks:
            made[0].join(ranks)
    return made
