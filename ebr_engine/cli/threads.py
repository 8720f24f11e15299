"""How many threads the command computes with, and how they wait for each other: decided before torch is imported.

OpenMP counts the cores that a process may run on, but not what a container's quota leaves of them; and its threads wait by
turning round and round, for milliseconds (GNU) or longer, which is lost where another process could have run meanwhile.
"""

import math
import os
from pathlib import Path

from ebr_engine import settings


def use_cores() -> None:
    """Have OpenMP take the cores that there are, and its threads give them away while they wait; the user's own words stand."""
    settings.wait_asleep()
    cores, quota = affinity(), cpu_quota()
    if quota is not None and math.ceil(quota) < cores:
        settings.use_threads(math.ceil(quota))


def affinity() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups of this process have, the least of all above it; None for no limit.

    `cpu.max` of version 2, `cpu.cfs_quota_us` of version 1 (Linux, "Control Group v2", "CFS Bandwidth Control"). In a container
    the path that a process is told may be the host's; then the group that is mounted counts.
    """
    listed = root / "proc/self/cgroup"
    if not listed.exists():  # not Linux
        return None
    found = []
    for line in listed.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            found += [_quota_2(folder) for folder in _upwards(root / "sys/fs/cgroup", path)]
        elif "cpu" in controllers.split(","):
            mounted = [root / "sys/fs/cgroup" / name for name in (controllers, "cpu")]
            found += [_quota_1(folder) for top in mounted for folder in _upwards(top, path)]
    return min((quota for quota in found if quota), default=None)


def _upwards(top: Path, path: str) -> list[Path]:
    """A group's folder and all above it, up to where groups are mounted."""
    folder = top / path.strip("/")
    return [folder, *(parent for parent in folder.parents if parent == top or top in parent.parents)]


def _quota_2(folder: Path) -> float | None:
    file = folder / "cpu.max"
    quota, period = file.read_text().split() if file.is_file() else ("max", "1")
    return None if quota == "max" else int(quota) / int(period)


def _quota_1(folder: Path) -> float | None:
    quota, period = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
    if not (quota.is_file() and period.is_file()):
        return None
    allowed = int(quota.read_text())
    return allowed / int(period.read_text()) if allowed > 0 else None
