"""The tables that FLUX's conditioner makes and its trunk reads: modulations, text tokens, and what a prompt adds to them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from ebr_engine.backbones.base import Conditioning, Prompts
from ebr_engine.errors import BackboneError


class FluxStep(NamedTuple):
    """What the trunk needs besides the latent, for one step; B is the batch or 1, T the text tokens, L the prompt's rows.

    Where all blocks of a kind share their modulation (FLUX.2), it has one row in place of one a block.
    """

    double_modulation: Tensor  # [B, double blocks or 1, 2, 6, D] float32: text stream, image stream
    single_modulation: Tensor  # [B, single blocks or 1, 3, D] float32
    head: Tensor  # [B, 2, D] float32: shift, 1 + scale
    text: Tensor  # [T, D]: the text tokens that enter the first block
    double_rows: Tensor  # [double blocks, L, 3D]: what the prompt adds to q, k, v of the first L text tokens
    single_rows: Tensor  # [single blocks, L, 3D]

    @property
    def text_rows(self) -> int:
        """Text tokens in the trunk's sequence."""
        return self.text.shape[0]

    def double(self, i: int) -> "BlockStep":
        """The rows of double-stream block i."""
        return BlockStep(row_of(self.double_modulation, i), self.double_rows[i])

    def single(self, i: int) -> "BlockStep":
        """The rows of single-stream block i."""
        return BlockStep(row_of(self.single_modulation, i), self.single_rows[i])

    def double_norms(self, i: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shift and 1 + scale, [B, D] each, of the text and of the image stream's norm that double-stream block i reads.

        After the last one comes the first single-stream block, whose norm is the same for both streams.
        """
        if i < self.double_rows.shape[0]:
            modulation = row_of(self.double_modulation, i)[:, :, :2]
        else:
            modulation = self.single_modulation[:, :1, :2].expand(-1, 2, -1, -1)
        return (stream.unbind(1) for stream in modulation.unbind(1))

    def single_norm(self, i: int) -> tuple[Tensor, Tensor]:
        """Shift and 1 + scale, [B, D] each, of the norm that single-stream block i reads; after the last one, of the head's."""
        return (row_of(self.single_modulation, i)[:, :2] if i < self.single_rows.shape[0] else self.head).unbind(1)


def row_of(table: Tensor, block: int) -> Tensor:
    """A block's row of a table [B, blocks or 1, ...]: its own, or the one that all share."""
    return table[:, min(block, table.shape[1] - 1)]


class BlockStep(NamedTuple):
    """The part of a `FluxStep` that one block reads."""

    modulation: Tensor  # double-stream: [B, 2, 6, D]; single-stream: [B, 3, D]
    rows: Tensor  # [L, 3D]


@dataclass(frozen=True)
class FluxConditioning(Conditioning):
    """The tables of a whole run: a row of modulations a step, text tokens and prompt rows shared by all steps."""

    double_modulation: Tensor  # [S, double blocks or 1, 2, 6, D]
    single_modulation: Tensor  # [S, single blocks or 1, 3, D]
    head: Tensor  # [S, 2, D]
    text: Tensor  # the others as in `FluxStep`
    double_rows: Tensor
    single_rows: Tensor

    step: ClassVar[type] = FluxStep
    by_step: ClassVar[tuple[str, ...]] = ("double_modulation", "single_modulation", "head")
    in_trunk_dtype: ClassVar[tuple[str, ...]] = ("text", "double_rows", "single_rows")

    def with_prompts(self, trunk: nn.Module, prompts: Prompts) -> "FluxConditioning":
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
