"""One step of the sampler on the float32 bridge state.

x ← c0·x + c1·v + c2·Y
"""

import torch
from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.gate import gated

BLOCK = 1024


def bridge_step_ref(x: Tensor, velocity: Tensor, degraded: Tensor, coefficients: Tensor) -> Tensor:
    """The formula, out of place; `coefficients` [3] float32."""
    c0, c1, c2 = coefficients.unbind()
    return c0 * x + c1 * velocity.float() + c2 * degraded


@triton.jit
def bridge_step_kernel(x, velocity, degraded, coefficients, out, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    c0, c1, c2 = tl.load(coefficients), tl.load(coefficients + 1), tl.load(coefficients + 2)
    b_x = tl.load(x + offsets, mask=mask)
    b_v = tl.load(velocity + offsets, mask=mask).to(tl.float32)
    b_y = tl.load(degraded + offsets, mask=mask)
    tl.store(out + offsets, c0 * b_x + c1 * b_v + c2 * b_y, mask=mask)


def bridge_step_launch(x: Tensor, velocity: Tensor, degraded: Tensor, coefficients: Tensor) -> Tensor:
    """Run the kernel; contiguous tensors of one shape."""
    x, velocity, degraded = x.contiguous(), velocity.contiguous(), degraded.contiguous()
    out = torch.empty_like(x)
    with backend.on(x):
        grid = (triton.cdiv(x.numel(), BLOCK),)
        if x.numel():
            bridge_step_kernel[grid](
                x, velocity, degraded, coefficients.contiguous(), out, x.numel(), BLOCK, enable_fp_fusion=True
            )
    return out


@torch.library.custom_op("ebr::bridge_step", mutates_args=())
@gated({"x": -1, "velocity": -1, "degraded": -1}, (-1,))
def bridge_step_op(x: Tensor, velocity: Tensor, degraded: Tensor, coefficients: Tensor) -> Tensor:
    step = bridge_step_launch if backend.launches(x) else bridge_step_ref
    return step(x, velocity, degraded, coefficients)


@bridge_step_op.register_fake
def _(x: Tensor, velocity: Tensor, degraded: Tensor, coefficients: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def bridge_step(x: Tensor, velocity: Tensor, degraded: Tensor, coefficients: Tensor) -> Tensor:
    """Move the bridge state one step along; all tensors of one shape, `x` and `degraded` float32, result float32."""
    step = bridge_step_op if backend.registered(x) else bridge_step_ref
    return step(x, velocity, degraded, coefficients)
