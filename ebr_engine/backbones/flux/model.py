"""FLUX.1's transformer in two halves: a conditioner that never sees a pixel, and a trunk that sees nothing else.

The trunk is FLUX.2's too (`flux2/model.py`): its configuration says where the two differ.

The conditioner turns timesteps, guidance, the pooled text and the text context into tables (every AdaLN modulation, the first
text tokens); with the rows that a prompt adds to the text tokens' q, k and v they are all that the trunk needs besides a
latent. The conditioner runs once, the trunk once a step.

Source: FLUX.1 (github.com/black-forest-labs/flux); prompts as residuals on the text tokens: arXiv 2604.04924. Parameter names
of checkpoints are those of diffusers' `FluxTransformer2DModel`; `flux/weights.py` maps them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.base import Prompts
from ebr_engine.backbones.flux.conditioning import BlockStep, FluxConditioning, FluxStep
from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.layers import (
    PackedLinear,
    RotaryCache,
    activated,
    dense_weight,
    feed_forward,
    gated_feed_forward,
    gated_for,
    heads_of,
    kept_rotary,
    normed_for,
    residual_normed_for,
)
from ebr_engine.backbones.sharding import WHOLE, Shards, Ulysses, Whole
from ebr_engine.backbones.wan.model import sinusoid
from ebr_engine.errors import BackboneError
from ebr_engine.kernels.attention import attention
from ebr_engine.kernels.quantize_fp8 import Quantized

EPS = 1e-6
FREQUENCIES = 256  # width of the sinusoids that time and guidance are embedded with
DOUBLE_MODULATIONS = 6  # shift, 1 + scale, gate of attention; the same of the feed-forward
SINGLE_MODULATIONS = 3  # shift, 1 + scale, gate of the whole block


class FluxConditioner(nn.Module):
    """Time, guidance, pooled-text and context embedders and every AdaLN linear: all that does not depend on a pixel.

    Its parameters stay in the dtype they are given in (3.2 of 12 billion: 6 GB in bf16) and are multiplied in float32.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        width, doubles = config.width, config.num_layers
        self.time_in = nn.Linear(FREQUENCIES, width)
        self.time_out = nn.Linear(width, width)
        if config.guidance_embeds:
            self.guidance_in = nn.Linear(FREQUENCIES, width)
            self.guidance_out = nn.Linear(width, width)
        self.pooled_in = nn.Linear(config.pooled_projection_dim, width)
        self.pooled_out = nn.Linear(width, width)
        self.context_in = nn.Linear(config.joint_attention_dim, width)
        self.text = nn.ModuleList(nn.Linear(width, DOUBLE_MODULATIONS * width) for _ in range(doubles))
        self.image = nn.ModuleList(nn.Linear(width, DOUBLE_MODULATIONS * width) for _ in range(doubles))
        self.single = nn.ModuleList(nn.Linear(width, SINGLE_MODULATIONS * width) for _ in range(config.num_single_layers))
        self.head = nn.Linear(width, 2 * width)

    def embed(self, timestep: Tensor, pooled: Tensor, guidance: float) -> Tensor:
        """The vector that every modulation is read from, [S, D] float32."""
        vector = wide(self.time_out, F.silu(wide(self.time_in, sinusoid(timestep, FREQUENCIES))))
        vector = vector + wide(self.pooled_out, F.silu(wide(self.pooled_in, pooled)))
        if self.config.guidance_embeds:
            scaled = torch.full_like(timestep[:1], 1000 * guidance)
            vector = vector + wide(self.guidance_out, F.silu(wide(self.guidance_in, sinusoid(scaled, FREQUENCIES))))
        return vector

    def forward(self, timestep: Tensor, context: Tensor, pooled: Tensor, guidance: float = 1.0) -> FluxConditioning:
        """Bake the tables of a run without a prompt.

        Args: `timestep` [S] float32 in 0..1000; `context` [T, joint_attention_dim] and `pooled` [pooled_projection_dim], the
        text encoders' outputs; `guidance` is not read by a model without guidance embedding (schnell).
        """
        vector = F.silu(self.embed(timestep, pooled, guidance))

        def modulation(layer: nn.Linear, names: int) -> Tensor:
            table = wide(layer, vector).unflatten(-1, (names, -1))
            table[:, 1::SINGLE_MODULATIONS] += 1  # scales, which are second of every three
            return table

        streams = [
            torch.stack([modulation(layer, DOUBLE_MODULATIONS) for layer in pair], 1) for pair in zip(self.text, self.image)
        ]
        single = torch.stack([modulation(layer, SINGLE_MODULATIONS) for layer in self.single], 1)
        text = wide(self.context_in, context)
        double_rows, single_rows = (text.new_zeros(len(part), 0, 3 * self.config.width) for part in (self.text, self.single))
        return FluxConditioning(torch.stack(streams, 1), single, modulation(self.head, 2), text, double_rows, single_rows)

    def bake(
        self,
        trunk: "FluxTrunk",
        timestep: Tensor,
        text: dict[str, Tensor],
        prompts: Prompts = (),
        guidance: float = 1.0,
    ) -> FluxConditioning:
        """Bake the tables of a run with its prompts; differentiable in the prompts. `text`: context and pooled.

        A prompt's rows are products with the blocks' own QKV weights, which the trunk needs at every step, so they are
        borrowed from it for the call: no second copy, and no reference that a moved or quantised trunk leaves behind.
        """
        return self(timestep, text["context"], text["pooled"], guidance).with_prompts(trunk, prompts)


class FluxTrunk(nn.Module):
    """Everything that touches a pixel: packing, both streams' blocks, the joined blocks, the head."""

    exchange: Whole | Ulysses = WHOLE  # with the other devices that share its tokens

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.image_in = nn.Linear(config.in_channels, config.width, config.biased)
        self.double_blocks = nn.ModuleList(FluxDoubleBlock(config) for _ in range(config.num_layers))
        self.single_blocks = nn.ModuleList(FluxSingleBlock(config) for _ in range(config.num_single_layers))
        self.image_out = nn.Linear(config.width, config.in_channels, config.biased)
        self._rotary: RotaryCache = {}

    def forward(self, latent: Tensor, step: FluxStep) -> Tensor:
        """Velocity [B, C, F, H, W] float32 of `latent` [B, C, F, H, W] at one step of the tables.

        Frames are pictures of their own. H and W must be multiples of a token's cells (`BackboneError`).
        """
        grid = self.grid(latent.shape)
        shards = self.exchange.over(step.text_rows, math.prod(grid[1:]))
        step, cos, sin = self.shard(shards, step, *self.rotary(grid, step.text_rows, latent.device))
        tokens = step.text_rows  # T, or those of a shard, as N below
        image = self.image_in(shards.shard(self.pack(latent, grid), part=1).to(self.image_in.weight.dtype))  # [B·F, N, D]
        streams = (step.text.expand(image.shape[0], -1, -1), image)
        # A block returns its last branch unadded, so that the sum is fused with the norm that reads it.
        readers = [[(block.text.qkv,), (block.image.qkv,)] for block in self.double_blocks]
        readers += [[self.single_blocks[0].readers] * 2]
        normed = [
            normed_for(layers, x, scale, shift, EPS)
            for layers, x, (shift, scale) in zip(readers[0], streams, step.double_norms(0))
        ]
        for i, block in enumerate(self.double_blocks):
            updates = block(streams, normed, step.double(i), cos, sin, shards)
            sums = (
                residual_normed_for(layers, *update, scale, shift, EPS)
                for layers, update, (shift, scale) in zip(readers[i + 1], updates, step.double_norms(i + 1))
            )
            streams, normed = zip(*sums)
        x, normed = torch.cat(streams, dim=1), joined(normed)  # [B, T + N, D]
        last = len(self.single_blocks) - 1
        readers = [block.readers for block in self.single_blocks[1:]] + [(self.image_out,)]
        for i, block in enumerate(self.single_blocks):
            branch, gate = block(normed, step.single(i), cos, sin, shards)
            if i == last:  # the head reads the image alone
                x, branch = x[:, tokens:], branch[:, tokens:]
            shift, scale = step.single_norm(i + 1)
            x, normed = residual_normed_for(readers[i], x, branch, gate, scale, shift, EPS)
        return self.unpack(shards.gather(self.image_out(normed), part=1), grid).float()

    def shard(self, shards: Whole | Shards, step: FluxStep, cos: Tensor, sin: Tensor) -> tuple[FluxStep, Tensor, Tensor]:
        """What this device reads of a step's text and of the position tables of text and image."""
        if shards is WHOLE:
            return step, cos, sin
        parts = (
            (shards.shard(text, 0), shards.shard(image, 0, 1)) for text, image in (x.split(shards.counts) for x in (cos, sin))
        )
        rows = (shards.rows(x) for x in (step.double_rows, step.single_rows))
        step = step._replace(text=shards.shard(step.text, 0), **dict(zip(("double_rows", "single_rows"), rows)))
        return step, *(torch.cat(pair) for pair in parts)

    def prompt_rows(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """W_qkv·Σ weight·residual for every block, [double blocks, L, 3D] and [single blocks, L, 3D], in the trunk's dtype.

        `prompts`: at least one (residual [Lp, D] or [blocks, Lp, D], weight [blocks]); L is the longest's rows.
        """
        longest = max(residual.shape[-2] for residual, _ in prompts)
        padded = [F.pad(residual, (0, 0, 0, longest - residual.shape[-2])) for residual, _ in prompts]
        mixing = torch.stack([weight for _, weight in prompts], dim=1)  # [blocks, P]

        def rows(qkv: nn.Linear, block: int) -> Tensor:
            own = torch.stack([residual[block] if residual.ndim == 3 else residual for residual in padded])
            mixed = torch.einsum("p,pld->ld", mixing[block], own)
            if isinstance(qkv, PackedLinear):
                return qkv(mixed.to(qkv.weight.dtype), torch.zeros_like(qkv.bias))
            matrix = dense_weight(qkv)
            return F.linear(mixed.to(matrix), matrix)

        layers = [block.text.qkv for block in self.double_blocks] + [block.qkv for block in self.single_blocks]
        every, doubles = [rows(qkv, block) for block, qkv in enumerate(layers)], len(self.double_blocks)
        return torch.stack(every[:doubles]), torch.stack(every[doubles:])

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Frames, and number of tokens along height and width, of a latent of `shape` [B, C, F, H, W]."""
        channels, (_, *cells) = self.config.latent_channels, self.config.patch
        if len(shape) != 5 or shape[1] != channels:
            raise BackboneError(f"expected a latent [B, {channels}, F, H, W], got {tuple(shape)}")
        if shape[3] % cells[0] or shape[4] % cells[1]:
            raise BackboneError(f"latent size {tuple(shape[3:])} is not a multiple of {cells[0]}")
        return shape[2], shape[3] // cells[0], shape[4] // cells[1]

    def pack(self, latent: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, C, F, H, W] → [B·F, N, C·cells], a token's channels in the released order."""
        _, rows, columns = self.config.patch
        x = latent.unflatten(-1, (grid[2], columns)).unflatten(3, (grid[1], rows))
        return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3).flatten(0, 1)

    def unpack(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B·F, N, C·cells] → [B, C, F, H, W]."""
        x = tokens.unflatten(1, grid[1:]).unflatten(0, (-1, grid[0])).unflatten(-1, (-1, *self.config.patch[1:]))
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)

    def rotary(self, grid: tuple[int, int, int], tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens + N, head_dim/2] float32; those that were used last are kept."""

        def make() -> tuple[Tensor, Tensor]:
            parts = zip(self.config.text_rotary(tokens), self.config.rotary(grid))
            return tuple(torch.cat(pair).to(device) for pair in parts)

        return kept_rotary(self._rotary, (grid[1:], tokens, device), make)

    def prepare(self, latent: Tensor, step: FluxStep) -> tuple[Tensor, Tensor]:
        """The position tables that a run on `latent` reads."""
        return self.rotary(self.grid(latent.shape), step.text_rows, latent.device)


class FluxDoubleBlock(nn.Module):
    """Text and image, each with its own weights, in one attention."""

    fp8_attention = False  # in eight bits

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.text = FluxStream(config)
        self.image = FluxStream(config)

    def forward(
        self,
        streams: Sequence[Tensor],
        normed: Sequence[Tensor],
        step: BlockStep,
        cos: Tensor,
        sin: Tensor,
        shards: Whole | Shards = WHOLE,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """From both residual streams and their norms ([B, T, D] and [B, N, D]) to the `FluxStream.finish` of both."""
        tokens = streams[0].shape[1]
        mixed = self.attend(tokens, normed, step, cos, sin, shards)
        text_modulation, image_modulation = step.modulation.unbind(1)
        return (
            self.text.finish(streams[0], mixed[:, :tokens], text_modulation),
            self.image.finish(streams[1], mixed[:, tokens:], image_modulation),
        )

    def attend(
        self,
        tokens: int,
        normed: Sequence[Tensor],
        step: BlockStep,
        cos: Tensor,
        sin: Tensor,
        shards: Whole | Shards = WHOLE,
    ) -> Tensor:
        """Attention over the text's `tokens` and the image's, [B, T + N, D]; what it needs inside is freed when it returns."""
        text = self.text.project(normed[0], cos[:tokens], sin[:tokens], step.rows)
        image = self.image.project(normed[1], cos[tokens:], sin[tokens:])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image))  # [B, heads, T + N, head_dim]
        del text, image
        mixed = attention(*shards.scatter_heads(q, k, v), self.fp8_attention)
        return shards.gather_heads(mixed).transpose(1, 2).flatten(2)


class FluxStream(nn.Module):
    """One stream's weights of a double-stream block: attention projections and feed-forward."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.heads, self.gated = config.num_attention_heads, config.gated
        width, hidden, biased = config.width, config.hidden, config.biased
        self.qkv = nn.Linear(width, 3 * width, biased)
        self.q_norm = nn.Parameter(torch.ones(config.attention_head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.attention_head_dim))
        self.out = nn.Linear(width, width, biased)
        self.up = nn.Linear(width, (2 if self.gated else 1) * hidden, biased)
        self.down = nn.Linear(hidden, width, biased)

    def project(self, normed: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, [B, heads, tokens, head_dim] each."""
        return heads_of(self.qkv, normed, self.q_norm, self.k_norm, cos, sin, self.heads, EPS, rows)

    def finish(self, x: Tensor, mixed: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the stream and attention's output to the stream, the feed-forward branch and its gate [B, D]."""
        _, _, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(1)
        x, normed = residual_normed_for((self.up,), x, self.out(mixed), gate, ff_scale, ff_shift, EPS)
        run = gated_feed_forward if self.gated else feed_forward
        return x, run(self.up, self.down, normed), ff_gate


class FluxSingleBlock(nn.Module):
    """Attention over text and image in one stream, the feed-forward beside it."""

    fp8_attention = False  # in eight bits

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.heads, self.gated = config.num_attention_heads, config.gated
        width, hidden, biased = config.width, config.hidden, config.biased
        # Apart, so that the feed-forward's GELU can end its own product and a prompt's rows read qkv's weight as it is.
        self.qkv = nn.Linear(width, 3 * width, biased)
        self.up = nn.Linear(width, (2 if self.gated else 1) * hidden, biased)
        self.q_norm = nn.Parameter(torch.ones(config.attention_head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.attention_head_dim))
        self.out = nn.Linear(width + hidden, width, biased)

    @property
    def readers(self) -> tuple[nn.Module, nn.Module]:
        """The layers that read the norm."""
        return self.qkv, self.up

    def forward(
        self, normed: Tensor | Quantized, step: BlockStep, cos: Tensor, sin: Tensor, shards: Whole | Shards = WHOLE
    ) -> tuple[Tensor, Tensor]:
        """From the norm of the residual stream [B, T + N, D] to the block's branch and its gate [B, D]."""
        mixed = self.attend(normed, step, cos, sin, shards)
        if self.gated:
            joint = gated_for((self.out,), self.up(normed), mixed)
        else:
            joint = torch.cat((mixed, activated(self.up, normed)), dim=-1)
        return self.out(joint), step.modulation[:, 2]

    def attend(
        self, normed: Tensor | Quantized, step: BlockStep, cos: Tensor, sin: Tensor, shards: Whole | Shards = WHOLE
    ) -> Tensor:
        """Attention over all tokens, [B, T + N, D]; what it needs inside is freed when it returns."""
        q, k, v = heads_of(self.qkv, normed, self.q_norm, self.k_norm, cos, sin, self.heads, EPS, step.rows)
        mixed = attention(*shards.scatter_heads(q, k, v), self.fp8_attention)
        return shards.gather_heads(mixed).transpose(1, 2).flatten(2)


def joined(parts: Sequence[Tensor | Quantized]) -> Tensor | Quantized:
    """Text and image tokens in one sequence, quantised or not."""
    if isinstance(parts[0], Quantized):
        return Quantized(*(torch.cat(pair, dim=1) for pair in zip(*parts)))
    return torch.cat(parts, dim=1)


def wide(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32 whatever its weights are stored in."""
    return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
