"""FLUX.2's sizes and its conditioner; the trunk is FLUX.1's (`flux/model.py`).

What is other than in FLUX.1: all blocks of a kind share one modulation, so that the conditioner is small; feed-forwards are
gated (SwiGLU) and no linear layer has a bias; there is no pooled text; places have four axes, of which text tokens count along
the last; a token is one latent cell, which the codec has made of 2 × 2. A prompt is added in the same place: the text rows'
input of q, k and v in every block.

Source: FLUX.2 (github.com/black-forest-labs/flux2). Parameter names of checkpoints are those of diffusers'
`Flux2Transformer2DModel`; `flux2/weights.py` maps them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.base import Prompts
from ebr_engine.backbones.flux.conditioning import FluxConditioning
from ebr_engine.backbones.flux.config import TwoStreams, rotary_tables
from ebr_engine.backbones.flux.model import DOUBLE_MODULATIONS, EPS, SINGLE_MODULATIONS, FluxTrunk, wide
from ebr_engine.backbones.wan.model import sinusoid
from ebr_engine.errors import BackboneError


@dataclass(frozen=True)
class Flux2Config(TwoStreams):
    """Sizes of a FLUX.2 transformer, under the names of diffusers' configuration file; those of klein 4B where none are said."""

    patch_size: int = 1
    in_channels: int = 128
    num_layers: int = 5
    num_single_layers: int = 20
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = EPS
    guidance_embeds: bool = False

    biased = False
    gated = True

    @property
    def hidden(self) -> int:
        return int(self.mlp_ratio * self.width)

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, 1, 1

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @classmethod
    def from_diffusers(cls, config: dict) -> "Flux2Config":
        """Read a diffusers config dict; `BackboneError` names what is of another model."""
        fields = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        fields["axes_dims_rope"] = axes = tuple(fields.get("axes_dims_rope", cls.axes_dims_rope))
        if isinstance(fields.get("mlp_ratio"), int):  # as it may be written
            fields["mlp_ratio"] = float(fields["mlp_ratio"])
        sizes = cls(**fields)
        if (out := config.get("out_channels") or sizes.in_channels) != sizes.in_channels:
            raise BackboneError(
                f"FLUX.2 configuration has in_channels={sizes.in_channels} and out_channels={out}: models with extra image "
                "inputs are not supported"
            )
        if sizes.patch_size != 1 or sizes.in_channels % 4:
            found = f"patch_size={sizes.patch_size} and in_channels={sizes.in_channels}"
            raise BackboneError(f"FLUX.2 configuration has {found}; only cells of 2×2 latents with patch_size 1 are supported")
        if len(axes) != 4 or sum(axes) != sizes.attention_head_dim or any(dim % 2 for dim in axes):
            raise BackboneError(
                f"FLUX.2 configuration has axes_dims_rope={axes}: four even numbers with the sum "
                f"attention_head_dim={sizes.attention_head_dim} are expected"
            )
        if sizes.eps != EPS:
            raise BackboneError(f"FLUX.2 configuration has eps={sizes.eps:g}; only {EPS:g} is supported")
        if not (sizes.num_layers and sizes.num_single_layers):
            raise BackboneError("FLUX.2 configuration has no double-stream or no single-stream blocks")
        return sizes

    def rotary(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """cos and sin [N, head_dim/2] float32 of a picture's tokens on a grid of (1, height, width): at (0, row, column, 0)."""
        rows, columns = (torch.arange(float(size)) for size in grid[1:])
        places = torch.cartesian_prod(torch.zeros(1), rows, columns, torch.zeros(1))
        return rotary_tables(places, self.axes_dims_rope, self.rope_theta)

    def text_rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The same [tokens, head_dim/2] of the text's tokens: at (0, 0, 0, number)."""
        places = F.pad(torch.arange(float(tokens))[:, None], (3, 0))
        return rotary_tables(places, self.axes_dims_rope, self.rope_theta)


class Flux2Conditioner(nn.Module):
    """Time, guidance and context embedders and the modulations that blocks share: all that does not depend on a pixel.

    Its parameters stay in the dtype they are given in and are multiplied in float32.
    """

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.config = config
        width, frequencies = config.width, config.timestep_guidance_channels

        def linear(inside: int, out: int) -> nn.Linear:
            return nn.Linear(inside, out, bias=False)

        self.time_in, self.time_out = linear(frequencies, width), linear(width, width)
        if config.guidance_embeds:
            self.guidance_in, self.guidance_out = linear(frequencies, width), linear(width, width)
        self.context_in = linear(config.joint_attention_dim, width)
        self.text = linear(width, DOUBLE_MODULATIONS * width)
        self.image = linear(width, DOUBLE_MODULATIONS * width)
        self.single = linear(width, SINGLE_MODULATIONS * width)
        self.head = linear(width, 2 * width)

    def embed(self, timestep: Tensor, guidance: float) -> Tensor:
        """The vector that every modulation is read from, [S, D] float32."""
        frequencies = self.config.timestep_guidance_channels
        vector = wide(self.time_out, F.silu(wide(self.time_in, sinusoid(timestep, frequencies))))
        if self.config.guidance_embeds:
            scaled = torch.full_like(timestep[:1], 1000 * guidance)
            vector = vector + wide(self.guidance_out, F.silu(wide(self.guidance_in, sinusoid(scaled, frequencies))))
        return vector

    def forward(self, timestep: Tensor, context: Tensor, guidance: float = 1.0) -> FluxConditioning:
        """Bake the tables of a run without a prompt.

        Args: `timestep` [S] float32 in 0..1000; `context` [T, joint_attention_dim], the text encoder's output; `guidance` is
        not read by a model without guidance embedding (klein).
        """
        vector, config = F.silu(self.embed(timestep, guidance)), self.config

        def modulation(layer: nn.Linear, names: int) -> Tensor:
            table = wide(layer, vector).unflatten(-1, (names, -1))
            table[:, 1::SINGLE_MODULATIONS] += 1  # scales, which are second of every three
            return table

        streams = torch.stack([modulation(layer, DOUBLE_MODULATIONS) for layer in (self.text, self.image)], dim=1)
        single, head = modulation(self.single, SINGLE_MODULATIONS), modulation(self.head, 2)
        text = wide(self.context_in, context)
        rows = (text.new_zeros(blocks, 0, 3 * config.width) for blocks in (config.num_layers, config.num_single_layers))
        return FluxConditioning(streams[:, None], single[:, None], head, text, *rows)

    def bake(
        self, trunk: FluxTrunk, timestep: Tensor, text: dict[str, Tensor], prompts: Prompts = (), guidance: float = 1.0
    ) -> FluxConditioning:
        """Bake the tables of a run with its prompts; differentiable in the prompts. `text`: the context.

        As in FLUX.1, the blocks' own QKV weights are borrowed from the trunk.
        """
        return self(timestep, text["context"], guidance).with_prompts(trunk, prompts)
