"""Settings of encoders by which they write the same bytes on every machine, whatever its cores and instructions."""

import platform

import numpy as np

THREADS = 4  # some encoders cut, search or number by it
SINGLE = {"libvpx": 1}  # VP8's threads wait for each other: seen once to wait for ever, on a busy core


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


def _has_avx512() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    core = getattr(np, "_core", None) or np.core  # NumPy 2, or 1
    features = getattr(getattr(core, "_multiarray_umath", None), "__cpu_features__", {})
    return bool(features.get("AVX512F"))
