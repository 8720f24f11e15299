"""The tables that FLUX's conditioner makes and its trunk reads: modulations, text tokens, and what a prompt adds to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ebr_engine.errors import BackboneError

if TYPE_CHECKING:
    from ebr_engine.backbones.flux.model import FluxTrunk

# (residual [L, D], or a block's own [blocks, L, D]; weight [blocks]) each, the weight being mixing weight × α
Prompts = Sequence[tuple[Tensor, Tensor]]


class FluxStep(NamedTuple):
    """What the trunk needs besides the latent, for one step; B is the batch or 1, T the text tokens, L the prompt's rows."""

    double_modulation: Tensor  # [B, double blocks, 2, 6, D] float32: text stream, image stream
    single_modulation: Tensor  # [B, single blocks, 3, D] float32
    head: Tensor  # [B, 2, D] float32: shift, 1 + scale
    text: Tensor  # [T, D]: the text tokens that enter the first block
    double_rows: Tensor  # [double blocks, L, 3D]: what the prompt adds to q, k, v of the first L text tokens
    single_rows: Tensor  # [single blocks, L, 3D]

    def double(self, i: int) -> "BlockStep":
        """The rows of double-stream block i."""
        return BlockStep(self.double_modulation[:, i], self.double_rows[i])

    def single(self, i: int) -> "BlockStep":
        """The rows of single-stream block i."""
        return BlockStep(self.single_modulation[:, i], self.single_rows[i])

    def double_norms(self, i: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shift and 1 + scale, [B, D] each, of the text and of the image stream's norm that double-stream block i reads.

        After the last one comes the first single-stream block, whose norm is the same for both streams.
        """
        if i < self.double_modulation.shape[1]:
            modulation = self.double_modulation[:, i, :, :2]
        else:
            modulation = self.single_modulation[:, :1, :2].expand(-1, 2, -1, -1)
        return (stream.unbind(1) for stream in modulation.unbind(1))

    def single_norm(self, i: int) -> tuple[Tensor, Tensor]:
        """Shift and 1 + scale, [B, D] each, of the norm that single-stream block i reads; after the last one, of the head's."""
        return (self.single_modulation[:, i, :2] if i < self.single_modulation.shape[1] else self.head).unbind(1)


class BlockStep(NamedTuple):
    """The part of a `FluxStep` that one block reads."""

    modulation: Tensor  # double-stream: [B, 2, 6, D]; single-stream: [B, 3, D]
    rows: Tensor  # [L, 3D]


@dataclass(frozen=True)
class FluxConditioning:
    """The tables of a whole run: a row of modulations a step, text tokens and prompt rows shared; `conditioning[i]` is step i."""

    double_modulation: Tensor  # [S, double blocks, 2, 6, D]
    single_modulation: Tensor  # [S, single blocks, 3, D]
    head: Tensor  # [S, 2, D]
    text: Tensor  # the last three fields of FluxStep
    double_rows: Tensor
    single_rows: Tensor

    def __len__(self) -> int:
        return self.head.shape[0]

    def __getitem__(self, step: int) -> FluxStep:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        one = slice(step, step + 1)
        shared = (self.text, self.double_rows, self.single_rows)
        return FluxStep(self.double_modulation[one], self.single_modulation[one], self.head[one], *shared)

    def batch(self) -> FluxStep:
        """All steps at once, as the batch of one trunk run: sample i of the batch is at step i."""
        return FluxStep(*(getattr(self, name) for name in FluxStep._fields))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "FluxConditioning":
        """Move the tables to the trunk's device; text tokens and prompt rows get its dtype, the modulations stay float32."""
        shared = {name: getattr(self, name).to(device, dtype) for name in ("text", "double_rows", "single_rows")}
        own = {name: getattr(self, name).to(device) for name in ("double_modulation", "single_modulation", "head")}
        return FluxConditioning(**own, **shared)

    def with_prompts(self, trunk: "FluxTrunk", prompts: Prompts) -> "FluxConditioning":
        """The same run with other prompts: (residual [L, D], weight [blocks]) each, the weight being mixing weight × α.

        Needs no conditioner: nothing else in the tables depends on a prompt. Several prompts are mixed as residuals in one
        run. `BackboneError` when a prompt does not fit the backbone or has more rows than there are text tokens.
        """
        tokens, config = self.text.shape[0], trunk.config
        for residual, weight in prompts:
            if residual.shape[-1] != config.width or weight.shape != (config.blocks,):
                raise BackboneError(
                    f"a prompt of shape {tuple(residual.shape)} with {weight.numel()} weights does not fit a backbone of "
                    f"width {config.width} with {config.blocks} blocks"
                )
            if residual.shape[-2] > tokens:
                raise BackboneError(f"a prompt of {residual.shape[-2]} rows does not fit on {tokens} text tokens")
        none = self.double_rows[:, :0], self.single_rows[:, :0]
        double_rows, single_rows = trunk.prompt_rows(prompts) if prompts else none
        return replace(self, double_rows=double_rows, single_rows=single_rows)
