"""The engine's operations: one file an op, each with a plain-torch reference above its kernel."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A way to run the operations: its name, whether this installation can use it, and why (not)."""

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """The kernel backends in order of preference, with the reason for each that is not there."""
    return [
        Backend("cuda", False, "no CUDA kernels in this version"),
        Backend("triton", False, "no Triton kernels in this version"),
        Backend("torch", True, "plain torch operations (the references), on any device"),
    ]
