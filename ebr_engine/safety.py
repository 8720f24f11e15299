"""What is done when a result is not finite: the run is made again in the next safer precision, and that is told."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ebr_engine.backbones.loading import Backbone
from ebr_engine.backbones.quantized import has_fp8_layers, safer_trunk
from ebr_engine.errors import EngineError, warn
from ebr_engine.plan import Plan
from ebr_engine.runner import Runner, Tiling

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Safety:
    """The same backbone in safer precisions, made when the first run needs them; they stay beside it in memory."""

    def __init__(self, parts: Backbone, offloads: bool = False):
        self.parts = parts
        self._safe = isinstance(parts.trunk, nn.Module) and not offloads
        self._made: list[Runner] = []

    def run(self, plan: Plan, degraded: Tensor, noise: Tensor, tiling: Tiling | None = None) -> Tensor:
        """The restored latent of a run that was not finite.

        Raises `EngineError` when no precision helps: the picture's own latent is not finite, the transformer is exported or
        float32 already, or float32 overflows too.
        """
        name = precision(self.parts)
        if not degraded.isfinite().all():
            raise EngineError("the codec made a latent of this picture that is not finite; nothing can be restored from it")
        for runner in self._runners():
            latent = runner.run(plan.with_precision(runner.parts), degraded, noise, tiling=tiling)
            if latent.isfinite().all():
                warn(f"the result was not finite in {name}; it was made again in {precision(runner.parts)}")
                return latent
        if not self._safe:
            raise EngineError(f"the result is not finite in {name}, and this transformer cannot change its precision")
        raise EngineError("the result is not finite, in float32 either: the weights, the prompt or t0 are out of bounds")

    def _runners(self):
        """Runs in one safer precision after another."""
        made = 0
        while self._safe:
            if made == len(self._made):
                before = self._made[-1].parts if self._made else self.parts
                trunk = safer_trunk(before.trunk)
                if trunk is None:
                    return
                self._made.append(Runner(replace(before, trunk=trunk, dtype=next(trunk.parameters()).dtype), "off"))
            yield self._made[made]
            made += 1


def precision(parts: Backbone) -> str:
    """The name of a backbone's precision, as `--precision` takes it."""
    return "fp8" if isinstance(parts.trunk, nn.Module) and has_fp8_layers(parts.trunk) else NAMES[parts.dtype]
