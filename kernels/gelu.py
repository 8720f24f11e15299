"""GELU in its tanh form, x/2 · (1 + tanh(sqrt(2/π)·(x + 0.044715·x³))), for a CPU: native code where it is built.

Elsewhere it lies in the passes of other operations, or torch's serves.
"""

from torch import Tensor
from torch.nn import functional as F

from ebr_engine.kernels import backend


def gelu_ref(x: Tensor) -> Tensor:
    """The formula."""
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """Any shape, in the dtype of `x`."""
    cpu = backend.native(x)
    if cpu and (out := cpu.gelu(x)) is not None:
        return out
    return gelu_ref(x)
