"""Wan 2.1's text-to-video transformer in two halves: a conditioner that never sees a pixel, and a trunk that sees nothing else.

The conditioner turns timesteps, the text context and prompts into tables (modulations, cross-attention keys and values); it
runs once. The trunk turns a latent and one row of those tables into a velocity; it runs once a step.

Source: Wan 2.1 (arXiv 2503.20314); prompts as residuals on the context: arXiv 2604.04924. Parameter names of checkpoints are
those of diffusers' `WanTransformer3DModel`; `wan/weights.py` maps them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.base import Conditioning, Prompts
from ebr_engine.backbones.layers import RotaryCache, feed_forward, kept_rotary, linear_with, normed_for, residual_normed_for
from ebr_engine.backbones.sharding import WHOLE, Shards, Ulysses, Whole
from ebr_engine.errors import BackboneError
from ebr_engine.kernels.attention import attention
from ebr_engine.kernels.context_kv import context_kv
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm
from ebr_engine.kernels.prompt_attention import prompt_attention
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope
from ebr_engine.kernels.quantize_fp8 import Quantized
from ebr_engine.kernels.rms_norm import rms_norm

ROPE_THETA = 10000.0
MODULATIONS = 6  # shift, 1 + scale, gate of self-attention; the same of the feed-forward


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer, under the names of diffusers' configuration file."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        return self.ffn_dim

    @property
    def blocks(self) -> int:
        return self.num_layers

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.patch_size

    @property
    def patch_volume(self) -> int:
        return math.prod(self.patch_size)

    @classmethod
    def from_diffusers(cls, config: dict) -> "WanConfig":
        """Read a diffusers config dict; `BackboneError` names what is missing or is of another model (image-to-video, say)."""
        required = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
        for key, value in required.items():
            if config.get(key, value) != value:
                raise BackboneError(f"Wan configuration has {key}={config[key]!r}; only {value!r} is supported")
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if config.get(key) is not None:
                raise BackboneError(f"Wan configuration has {key}={config[key]!r}: image-to-video models are not supported")
        fields = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        fields["patch_size"] = tuple(fields.get("patch_size", cls.patch_size))
        fields.setdefault("out_channels", fields.get("in_channels", cls.in_channels))
        return cls(**fields)

    def to_diffusers(self) -> dict:
        """The diffusers config dict of these sizes."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "patch_size": list(self.patch_size),
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        }

    def rotary(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """cos and sin [N, head_dim/2] float32 of a clip's tokens on a grid of (frames, height, width)."""
        return rotary_tables(self, grid)


class WanStep(NamedTuple):
    """What the trunk needs besides the latent, for one step; B is the batch or 1, M the distinct text rows, P the prompts."""

    modulation: Tensor  # [B, blocks, 6, D] float32
    head: Tensor  # [B, 2, D] float32: shift, 1 + scale
    text_key: Tensor  # [blocks, B, heads, M, head_dim]
    text_value: Tensor
    text_log_count: Tensor  # [M] float32
    prompt_key: Tensor  # [blocks, P, heads, L, head_dim]
    prompt_value: Tensor
    prompt_weight: Tensor  # [blocks, P] float32

    @property
    def text_rows(self) -> int:
        """Text tokens in the trunk's sequence."""
        return 0

    def block(self, i: int) -> "BlockStep":
        """The rows of block i."""
        text = (self.text_key[i], self.text_value[i], self.text_log_count)
        return BlockStep(self.modulation[:, i], *text, self.prompt_key[i], self.prompt_value[i], self.prompt_weight[i])


class BlockStep(NamedTuple):
    """The part of a `WanStep` that one block reads."""

    modulation: Tensor  # [B, 6, D]
    text_key: Tensor  # [B, heads, M, head_dim]
    text_value: Tensor
    text_log_count: Tensor  # [M]
    prompt_key: Tensor  # [P, heads, L, head_dim]
    prompt_value: Tensor
    prompt_weight: Tensor  # [P]


@dataclass(frozen=True)
class WanConditioning(Conditioning):
    """The tables of a whole run: one modulation row a step, keys and values shared by all steps."""

    modulation: Tensor  # [S, blocks, 6, D]
    head: Tensor  # [S, 2, D]
    text_key: Tensor  # the others as in `WanStep`
    text_value: Tensor
    text_log_count: Tensor
    prompt_key: Tensor
    prompt_value: Tensor
    prompt_weight: Tensor

    step: ClassVar[type] = WanStep
    by_step: ClassVar[tuple[str, ...]] = ("modulation", "head")
    in_trunk_dtype: ClassVar[tuple[str, ...]] = ("text_key", "text_value", "prompt_key", "prompt_value")


class WanConditioner(nn.Module):
    """Time MLP, text MLP, every block's scale/shift/gate and cross-attention K and V: all that does not depend on a pixel."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        width, blocks = config.width, config.num_layers
        self.time_in = nn.Linear(config.freq_dim, width)
        self.time_out = nn.Linear(width, width)
        self.time_proj = nn.Linear(width, MODULATIONS * width)
        self.text_in = nn.Linear(config.text_dim, width)
        self.text_out = nn.Linear(width, width)
        self.scale_shift = nn.Parameter(torch.zeros(blocks, MODULATIONS, width))
        self.head_scale_shift = nn.Parameter(torch.zeros(2, width))
        self.kv_weight = nn.Parameter(torch.empty(blocks, 2 * width, width))
        self.kv_bias = nn.Parameter(torch.zeros(blocks, 2 * width))
        self.k_norm = nn.Parameter(torch.ones(blocks, width))

    def modulations(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Tables for timesteps [S] (0 to 1000): modulation [S, blocks, 6, D] and head [S, 2, D], float32, scales as 1 + scale."""
        time = self.time_out(F.silu(self.time_in(sinusoid(timestep, self.config.freq_dim))))
        projected = self.time_proj(F.silu(time)).float().unflatten(-1, (MODULATIONS, -1))
        modulation = self.scale_shift + projected.unsqueeze(1)
        head = self.head_scale_shift + time.float().unsqueeze(1)
        one = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], device=modulation.device)
        return modulation + one[:, None], head + one[:2, None]

    def encode_text(self, context: Tensor) -> Tensor:
        """The text MLP: context [C, L, text_dim] → [C, L, D]."""
        return self.text_out(F.gelu(self.text_in(context), approximate="tanh"))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values of all blocks for contexts [C, L, D]: [blocks, C, heads, L, head_dim] each."""
        config = self.config
        return context_kv(context, self.kv_weight, self.kv_bias, self.k_norm, config.num_attention_heads, config.eps)

    def forward(self, timestep: Tensor, context: Tensor, prompts: Prompts = ()) -> WanConditioning:
        """Bake the tables of a run; differentiable in the prompts.

        Args: `timestep` [S] float32 in 0..1000; `context` [L, text_dim] text encoder output; `prompts`: (residual [Lp, D], or a
        block's own [blocks, Lp, D]; weight [blocks]) each, the weight being mixing weight × α. Several prompts are mixed as
        residuals in one run.
        """
        rows, count = merge_equal_rows(context)
        text_key, text_value = self.keys_values(self.encode_text(rows[None]))
        prompted = [resize_rows(self.encode_text(context), residual.shape[-2]) + residual for residual, _ in prompts]
        blocks, heads, head_dim = (
            self.config.num_layers,
            self.config.num_attention_heads,
            self.config.attention_head_dim,
        )
        if prompted:
            prompt_key, prompt_value = self.keys_values(pad_stack(prompted))
            weight = torch.stack([weight for _, weight in prompts], dim=1)
        else:
            prompt_key = prompt_value = text_key.new_zeros(blocks, 0, heads, 1, head_dim)
            weight = text_key.new_zeros(blocks, 0)
        modulation, head = self.modulations(timestep)
        return WanConditioning(modulation, head, text_key, text_value, count.log(), prompt_key, prompt_value, weight)

    def bake(self, trunk: "WanTrunk", timestep: Tensor, text: dict[str, Tensor], prompts: Prompts = ()) -> WanConditioning:
        """The tables of a run; nothing in them is made of the trunk's weights."""
        return self(timestep, text["context"], prompts)


class WanTrunk(nn.Module):
    """Everything that touches a pixel: patch embedding, the blocks, the head."""

    exchange: Whole | Ulysses = WHOLE  # with the other devices that share its tokens

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        width, volume = config.width, config.patch_volume
        self.patch_in = nn.Linear(config.in_channels * volume, width)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.patch_out = nn.Linear(width, config.out_channels * volume)
        self._rotary: RotaryCache = {}

    def forward(self, latent: Tensor, step: WanStep) -> Tensor:
        """Velocity [B, out_channels, F, H, W] float32 of `latent` [B, in_channels, F, H, W] at one step of the tables.

        F, H and W must be multiples of the patch size (`BackboneError`).
        """
        grid = self.grid(latent.shape)
        shards = self.exchange.over(math.prod(grid))
        cos, sin = (shards.shard(table, dim=0) for table in self.rotary(grid, latent.device))
        x = self.patch_in(shards.shard(self.patchify(latent, grid)).to(self.patch_in.weight.dtype))  # [B, N, D], or a shard
        # A block returns its feed-forward branch unadded, so that the sum is fused with the norm that reads it.
        shift, scale, *_ = step.modulation[:, 0].unbind(1)
        readers = [(block.qkv,) for block in self.blocks] + [(self.patch_out,)]
        normed = normed_for(readers[0], x, scale, shift, self.config.eps)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x, branch, gate = block(x, normed, step.block(i), cos, sin, shards)
            shift, scale = (step.head if i == last else step.modulation[:, i + 1, :2]).unbind(1)
            x, normed = residual_normed_for(readers[i + 1], x, branch, gate, scale, shift, self.config.eps)
        return self.unpatchify(shards.gather(self.patch_out(normed)), grid).float()

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Number of patches along frames, height and width of a latent of `shape` [B, C, F, H, W]."""
        if len(shape) != 5 or shape[1] != self.config.in_channels:
            raise BackboneError(f"expected a latent [B, {self.config.in_channels}, F, H, W], got {tuple(shape)}")
        if any(size % patch for size, patch in zip(shape[2:], self.config.patch_size)):
            raise BackboneError(f"latent size {tuple(shape[2:])} is not a multiple of the patch size {self.config.patch_size}")
        return tuple(size // patch for size, patch in zip(shape[2:], self.config.patch_size))

    def patchify(self, latent: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, C, F, H, W] → [B, N, C·pt·ph·pw], rows in the order of the checkpoint's convolution weight."""
        (f, h, w), (pt, ph, pw) = grid, self.config.patch_size
        x = latent.reshape(latent.shape[0], -1, f, pt, h, ph, w, pw)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, pt·ph·pw·C] → [B, C, F, H, W]."""
        (f, h, w), (pt, ph, pw) = grid, self.config.patch_size
        x = tokens.reshape(tokens.shape[0], f, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)

    def rotary(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [N, head_dim/2] float32 of a grid; those that were used last are kept."""
        return kept_rotary(
            self._rotary, (grid, device), lambda: tuple(table.to(device) for table in rotary_tables(self.config, grid))
        )

    def prepare(self, latent: Tensor, step: WanStep) -> tuple[Tensor, Tensor]:
        """The position tables that a run on `latent` reads."""
        return self.rotary(self.grid(latent.shape), latent.device)


class WanBlock(nn.Module):
    """Self-attention, cross-attention to text and prompts, feed-forward."""

    fp8_attention = False  # self-attention in eight bits

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads, self.eps = config.num_attention_heads, config.eps
        width = config.width
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Parameter(torch.ones(width))
        self.k_norm = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, config.eps)
        self.cross_q = nn.Linear(width, width)
        self.cross_q_norm = nn.Parameter(torch.ones(width))
        self.cross_out = nn.Linear(width, width)
        self.up = nn.Linear(width, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, width)

    def forward(
        self,
        x: Tensor,
        normed: Tensor | Quantized,
        step: BlockStep,
        cos: Tensor,
        sin: Tensor,
        shards: Whole | Shards = WHOLE,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the residual stream [B, N, D] and its norm to the stream, the feed-forward branch and its gate [B, D]."""
        _, _, gate, ff_shift, ff_scale, ff_gate = step.modulation.unbind(1)
        weight, bias = self.cross_norm.weight[None], self.cross_norm.bias[None]
        # What a branch needs inside is freed when its function returns: the feed-forward layer needs the room.
        x, normed = gated_residual_norm(x, self.attend(normed, cos, sin, shards), gate, weight, bias, self.eps)
        x, normed = residual_normed_for((self.up,), x, self.cross(normed, step), None, ff_scale, ff_shift, self.eps)
        return x, feed_forward(self.up, self.down, normed), ff_gate

    def attend(self, normed: Tensor | Quantized, cos: Tensor, sin: Tensor, shards: Whole | Shards = WHOLE) -> Tensor:
        """Self-attention and its output projection, [B, N, D]."""
        q, k, v = qk_norm_rope(self.qkv(normed), self.q_norm, self.k_norm, cos, sin, self.heads, self.eps)
        mixed = attention(*shards.scatter_heads(q, k, v), self.fp8_attention)
        return self.out(shards.gather_heads(mixed).transpose(1, 2).flatten(2))

    def cross(self, normed: Tensor, step: BlockStep) -> Tensor:
        """W_o·(text branch + Σ weight·prompt branch) + (1 + Σ weight)·b_o, [B, N, D]."""
        mixed = prompt_attention(self.cross_query(normed), *step[1:])
        bias = (self.cross_out.bias.float() * (1 + step.prompt_weight.sum())).to(normed.dtype)
        return linear_with(self.cross_out, mixed.transpose(1, 2).flatten(2), bias)

    def cross_query(self, normed: Tensor) -> Tensor:
        """Cross-attention's queries, [B, heads, N, head_dim]."""
        q = rms_norm(self.cross_q(normed), self.cross_q_norm, self.eps)
        return q.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps [S] → [S, dim] float32, cosines first."""
    frequency = torch.exp(-math.log(10000.0) / (dim // 2) * torch.arange(dim // 2, device=timestep.device))
    angle = timestep.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def rotary_tables(config: WanConfig, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin [N, head_dim/2] of a (frames, height, width) grid; frequencies in float64 as diffusers computes them."""
    if max(grid) > config.rope_max_seq_len:
        raise BackboneError(f"a grid of {grid} patches is larger than the position table ({config.rope_max_seq_len})")
    side = 2 * (config.attention_head_dim // 6)
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, (config.attention_head_dim - 2 * side, side, side))):
        frequency = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(size, dtype=torch.float64)[:, None] * frequency
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*grid, dim // 2))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


def merge_equal_rows(context: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of a context [L, D] and how often each occurs, [M, D] and [M] float32; exact, order of first occurrence."""
    _, inverse, counts = torch.unique(context, dim=0, return_inverse=True, return_counts=True)
    first = torch.full_like(counts, context.shape[0]).scatter_reduce(
        0, inverse, torch.arange(context.shape[0], device=context.device), reduce="amin"
    )
    order = first.argsort()
    return context[first[order]], counts[order].float()


def resize_rows(context: Tensor, rows: int) -> Tensor:
    """The first `rows` rows of a text context [L, D]; a longer prompt repeats the last row, which is the padding token's."""
    missing = rows - context.shape[0]
    return context[:rows] if missing <= 0 else torch.cat((context, context[-1:].expand(missing, -1)))


def pad_stack(contexts: Sequence[Tensor]) -> Tensor:
    """Stack prompt contexts of one length, [P, L, D] or [blocks, P, L, D]; `BackboneError` when lengths differ."""
    if len({context.shape[-2:] for context in contexts}) > 1:
        raise BackboneError("prompts that are mixed as residuals in one run must have the same number of tokens")
    return torch.stack(torch.broadcast_tensors(*contexts), dim=-3)
