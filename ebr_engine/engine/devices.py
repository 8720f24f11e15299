"""Which device computes, and what its memory does."""

import torch

from ebr_engine.errors import EngineError


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU; `EngineError` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise EngineError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise EngineError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"there is no device {device}: {torch.cuda.device_count()} CUDA device(s) found")
    return chosen


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
