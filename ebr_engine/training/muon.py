"""Muon for matrices of a few shapes: those of one shape are orthogonalised together, in the precision that is asked for.

m ← μ·m + (1 − μ)·g;  u = orthogonalise((1 − μ)·g + μ·m);  w ← (1 − η·λ)·w − η·0.2·sqrt(max(rows, columns))·u

torch.optim.Muon does the same one matrix after the other and always in bfloat16, which on a CPU without such products takes
longer than the step that it follows. Sources: Jordan et al. 2024 (the iteration and its coefficients); Liu et al.,
arXiv 2502.16982 (the scale, which lets it share AdamW's rates).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
SCALE = 0.2


class Muon(torch.optim.Optimizer):
    """`params`: matrices; `precision`: of the products. Its state is that of torch.optim.Muon, so a checkpoint serves either."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        precision: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.precision = precision
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices only")

    @torch.no_grad()
    def step(self) -> None:
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.device, p.dtype].append(p)
            for matrices in alike.values():
                self._step(matrices, **{name: group[name] for name in ("lr", "weight_decay", "momentum")})

    def _step(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        gradients = [p.grad for p in matrices]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        directions = orthogonalised(torch.stack(torch._foreach_lerp(gradients, buffers, momentum)).to(self.precision))
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        scale = lr * SCALE * max(matrices[0].shape) ** 0.5
        torch._foreach_add_(matrices, list(directions.to(matrices[0].dtype).unbind()), alpha=-scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [K, rows, columns] with their singular values near 1, by a Newton-Schulz iteration of fifth order."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp(min=1e-7).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
