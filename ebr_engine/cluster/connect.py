"""A Ray cluster: found or started, and how many workers it has room for."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ebr_engine.errors import EbrError

WHERE = "local, auto or ray://HOST:PORT"
START = "start one with `ray start --head`, or use --cluster local"


@dataclass(frozen=True)
class Share:
    """What of a cluster one worker takes."""

    cores: int = 1
    gpus: int = 0

    def fit(self, nodes: list[dict[str, Any]]) -> int:
        """How many workers these nodes, as `ray.nodes` tells of them, have room for."""
        return sum(self._on(node["Resources"]) for node in nodes if node["Alive"])

    def _on(self, there: dict[str, float]) -> int:
        if self.gpus:
            return int(there.get("GPU", 0) // self.gpus)
        return int(there.get("CPU", 0) // self.cores)

    def options(self) -> dict[str, Any]:
        """As `ray.remote` takes it. A GPU's worker takes no core away: what it computes is on the GPU."""
        return {"num_gpus": self.gpus, "num_cpus": 0} if self.gpus else {"num_cpus": self.cores}


def needed_ray() -> Any:
    """The module; `EbrError` with the line that installs it."""
    try:
        import ray
    except ImportError as error:
        raise EbrError("a cluster needs Ray: pip install 'ebr-engine[cluster]'") from error
    return ray


@contextmanager
def connected(where: str) -> Iterator[Any]:
    """Ray, connected while this is entered: to a cluster that is there, or to one on this machine that ends with it.

    `where`: `local`, `auto` (the cluster that this machine is part of) or `ray://host:port`. `EbrError` where there is none.
    """
    if where not in ("local", "auto") and not where.startswith("ray://"):
        raise EbrError(f"--cluster {where}: it is {WHERE}")
    ray = needed_ray()
    if ray.is_initialized():  # by a program that uses us
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if where == "local":
        options |= {"include_dashboard": False, "num_cpus": _cores()}
    try:
        ray.init(address=where, **options)
    except Exception as error:  # Ray raises bare ones too, where a busy machine starts it too slowly
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise EbrError(f"--cluster {where}: no cluster answers; {START} ({said})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def share_of(ray: Any, device: str, cores: int) -> Share:
    """One GPU a worker where the device may be one and the cluster has some, else so many cores."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if device.startswith("cuda") and not gpus:
        raise EbrError(f"--device {device}: this cluster has no GPU")
    return Share(cores, int(device != "cpu" and gpus > 0))


def _cores() -> int | None:
    """Cores that this process may run on, where they are not all that there are; None: Ray counts, and knows of quotas."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return mine if mine != os.cpu_count() else None
