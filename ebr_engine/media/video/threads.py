"""Encoders' threads: settings by which they write the same bytes on every machine, and that none comes before all other work."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

THREADS = 4  # some encoders cut, search or number by it


def own_settings(encoder: str) -> dict[str, str]:
    """Parameters of libx264, libx265 and libsvtav1, in their own words."""
    if encoder.startswith("libx264"):
        # Its AVX-512 code reads registers that it has not set (core 165): other bytes after other work of the same thread.
        return {"asm": "AVX2"} if _has_avx512() else {}
    if encoder == "libx265":
        return {"frame-threads": "2", "pools": str(THREADS)}
    if encoder == "libsvtav1":
        return {"lp": str(THREADS)}
    return {}


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """Within it an encoder is opened; no thread leaves it with real-time priority that had none before.

    Where it may, as root, SVT-AV1 gives the highest there is to all of its threads and to the one that opens it, which keeps it,
    and so does every process that this one begins: other work waits until they are idle, and what waits by spinning for another
    thread of its core waits for ever (`findings/svt_av1_takes_real_time.sh`).
    """
    before = _real_time()
    try:
        yield
    finally:
        for thread in _real_time() - before:
            with suppress(OSError):  # it has ended
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _real_time() -> set[int]:
    """Threads of this process that come before all ordinary ones; none where that is not to be known."""
    found = set()
    with suppress(OSError, AttributeError):  # a system without /proc, or without such calls
        for name in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):
                if os.sched_getscheduler(int(name)) in (os.SCHED_FIFO, os.SCHED_RR):
                    found.add(int(name))
    return found


def _has_avx512() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    core = getattr(np, "_core", None) or np.core  # NumPy 2, or 1
    features = getattr(getattr(core, "_multiarray_umath", None), "__cpu_features__", {})
    return bool(features.get("AVX512F"))
