"""Folders and switches taken from the environment; the only module that reads it."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for what can be made again (compiled graphs, text contexts): `EBR_CACHE_DIR`, or the platform's cache folder."""
    if folder := os.environ.get("EBR_CACHE_DIR"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base).expanduser() / "ebr-engine"


def prompt_dir() -> Path:
    """Folder for prompts that the user installs: `EBR_PROMPT_DIR`, or the platform's data folder."""
    if folder := os.environ.get("EBR_PROMPT_DIR"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".local" / "share"
    return Path(base).expanduser() / "ebr-engine" / "prompts"


def debug() -> bool:
    """Whether the CLI shows tracebacks for expected errors too (`EBR_DEBUG=1`)."""
    return os.environ.get("EBR_DEBUG", "0") not in ("", "0")


def process() -> tuple[int, int, int]:
    """This process's rank, its rank on this machine, and how many there are, as `torchrun` says; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def several_processes() -> bool:
    """Whether `torchrun` has started this process as one of several."""
    return process()[2] > 1


# What says how OpenMP's threads wait: any of them, set by the user, stands for all.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_asleep() -> None:
    """Have OpenMP's threads fall asleep soon when they wait, unless the user has said how they should; before torch is imported.

    GNU's, which torch has on Linux, turn a thousand times first, some 50 microseconds: to be woken by the system takes longer,
    and transformers have hundreds of regions in an evaluation. LLVM's and Intel's count in milliseconds.
    """
    if not any(os.environ.get(name) for name in WAITING):
        os.environ.update(GOMP_SPINCOUNT="1000", KMP_BLOCKTIME="0")


def use_threads(count: int) -> None:
    """Have OpenMP use so many threads, unless the user has said how many; before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(count))
