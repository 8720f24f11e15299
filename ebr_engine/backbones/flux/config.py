"""Sizes of FLUX transformers, as diffusers' configuration files name them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebr_engine.errors import BackboneError

MLP_RATIO = 4
ROPE_THETA = 10000.0
PACK = 2  # a token is 2×2 latent cells


class TwoStreams:
    """What follows from the sizes of any transformer with double-stream and single-stream blocks."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    axes_dims_rope: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim

    def to_diffusers(self) -> dict:
        """The diffusers config dict of these sizes."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"axes_dims_rope": list(self.axes_dims_rope)}


@dataclass(frozen=True)
class FluxConfig(TwoStreams):
    """Sizes of a FLUX transformer, under the names of diffusers' configuration file."""

    patch_size: int = 1
    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    # No fields, for no configuration file says them: linear layers have a bias, feed-forwards end in GELU.
    biased = True
    gated = False

    @property
    def hidden(self) -> int:
        return MLP_RATIO * self.width

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, PACK, PACK

    @property
    def latent_channels(self) -> int:
        return self.in_channels // PACK**2

    @classmethod
    def from_diffusers(cls, config: dict) -> "FluxConfig":
        """Read a diffusers config dict; `BackboneError` names what is of another model (Fill, Canny or Depth, say)."""
        fields = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        fields["axes_dims_rope"] = tuple(fields.get("axes_dims_rope", cls.axes_dims_rope))
        sizes = cls(**fields)
        out_channels = config.get("out_channels") or sizes.in_channels
        if out_channels != sizes.in_channels:
            raise BackboneError(
                f"FLUX configuration has in_channels={sizes.in_channels} and out_channels={out_channels}: models with extra "
                "image inputs (Fill, Canny, Depth) are not supported"
            )
        if sizes.patch_size != 1 or sizes.in_channels % PACK**2:
            found = f"patch_size={sizes.patch_size} and in_channels={sizes.in_channels}"
            raise BackboneError(f"FLUX configuration has {found}; only latents packed 2×2 with patch_size 1 are supported")
        if sum(sizes.axes_dims_rope) != sizes.attention_head_dim or any(dim % 2 for dim in sizes.axes_dims_rope):
            raise BackboneError(
                f"FLUX configuration has axes_dims_rope={sizes.axes_dims_rope}: even numbers with the sum "
                f"attention_head_dim={sizes.attention_head_dim} are expected"
            )
        if not (sizes.num_layers and sizes.num_single_layers):
            raise BackboneError("FLUX configuration has no double-stream or no single-stream blocks")
        return sizes

    def rotary(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """cos and sin [N, head_dim/2] float32 of a picture's tokens on a grid of (1, height, width): at (0, row, column)."""
        places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(size)) for size in grid[1:]))
        return rotary_tables(places, self.axes_dims_rope, ROPE_THETA)

    def text_rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The same [tokens, head_dim/2] of the text's tokens, which are all at 0."""
        return rotary_tables(torch.zeros(tokens, len(self.axes_dims_rope)), self.axes_dims_rope, ROPE_THETA)


def rotary_tables(places: Tensor, dims: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [N, Σ dims/2] float32 of places [N, axes], of which each turns its own `dims`; float64 inside."""
    angles = []
    for position, dim in zip(places.double().unbind(1), dims):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(position[:, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()
