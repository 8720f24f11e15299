"""One step of the sampler on the float32 bridge state.

x ← c0·x + c1·v + c2·Y
"""

from torch import Tensor


def bridge_step_ref(x: Tensor, velocity: Tensor, degraded: Tensor, coefficients: Tensor) -> Tensor:
    """The formula, out of place; `coefficients` [3] float32."""
    c0, c1, c2 = coefficients.unbind()
    return c0 * x + c1 * velocity.float() + c2 * degraded


def bridge_step(x: Tensor, velocity: Tensor, degraded: Tensor, coefficients: Tensor) -> Tensor:
    """Move the bridge state one step along; all tensors of one shape, `x` and `degraded` float32, result float32."""
    return bridge_step_ref(x, velocity, degraded, coefficients)
