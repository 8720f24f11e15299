"""The released algorithm, written plainly over diffusers' transformers: what the engine is compared with.

Eager, step by step, as the authors' inference code does it: every call computes time, text and modulations again; Wan's prompt
is a second cross-attention with its own keys, values and output projection; FLUX's prompt is added to the text rows before q, k
and v. The transformer is evaluated at linspace(T0, t_min, steps), at timesteps looked up in the scheduler's table of 1000, and
the last clean estimate is the result. Nothing here is shared with the engine.

The engine feeds the same timesteps when it is given `bridge.released_timesteps`; by itself it feeds 1000·t (t = 0.4 is 400, where
Wan's table holds 399), which is the model's own definition of t and needs no table.

Source: the authors' code for arXiv 2604.04924 and 2604.10983, as recorded in the files of `tests/golden`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.nn import functional as F

STEPS, T0, T_MIN = 20, 0.4, 1e-4
PACK = 2  # a FLUX token is 2×2 latent cells

Prompts = Sequence[tuple[Tensor, Tensor]]  # (residual [L, D] or [blocks, L, D], α [blocks]) each
Velocity = Callable[[Tensor, Tensor], Tensor]  # (state [B, ...], timestep [B]) → velocity


class DualAttention(WanAttnProcessor):
    """Cross-attention to the text, and once more to text + prompt for each prompt of a block: (residual, α) each."""

    def __init__(self, prompts: Prompts):
        super().__init__()
        self.prompts = prompts

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        for residual, alpha in self.prompts:
            context = as_long(encoder_hidden_states, len(residual)) + residual.to(encoder_hidden_states)
            out = out + alpha.to(out) * super().__call__(attn, hidden_states, context, attention_mask, rotary_emb)
        return out


def as_long(context: Tensor, rows: int) -> Tensor:
    """A text context [B, L, D] of at least `rows` rows: a longer prompt, as `mini`'s, meets the last, padding's, again."""
    missing = rows - context.shape[1]
    return context if missing <= 0 else torch.cat((context, context[:, -1:].expand(-1, missing, -1)), dim=1)


class AddedRows(FluxAttnProcessor):
    """Attention whose first text rows get + α·residual after norm and modulation; in a single-stream block they lead."""

    def __init__(self, prompts: Prompts):
        super().__init__()
        self.prompts = prompts

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if encoder_hidden_states is None:
            hidden_states = self.add(hidden_states)
        else:
            encoder_hidden_states = self.add(encoder_hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def add(self, rows: Tensor) -> Tensor:
        for residual, alpha in self.prompts:
            added = (alpha * residual).to(rows)
            rows = torch.cat((rows[:, : len(added)] + added, rows[:, len(added) :]), dim=1)
        return rows


def of_block(prompts: Prompts, block: int) -> Prompts:
    """What block number `block` sees of the prompts: (residual [L, D], α) each."""
    return [(residual if residual.dim() == 2 else residual[block], alpha[block]) for residual, alpha in prompts]


def set_wan_prompts(transformer: Any, prompts: Prompts) -> None:
    """Make diffusers' `WanTransformer3DModel` attend to these prompts in every block, until told otherwise; [] for none."""
    for i, block in enumerate(transformer.blocks):
        block.attn2.set_processor(DualAttention(of_block(prompts, i)))


def set_flux_prompts(transformer: Any, prompts: Prompts) -> None:
    """The same for `FluxTransformer2DModel`; α counts the double-stream blocks, then the single-stream ones."""
    for i, block in enumerate((*transformer.transformer_blocks, *transformer.single_transformer_blocks)):
        block.attn.set_processor(AddedRows(of_block(prompts, i)))


def wan_velocity(transformer: Any, context: Tensor) -> Velocity:
    """The velocity function of diffusers' Wan module; `context` [L, text_dim] is the text encoder's output."""

    def velocity(state: Tensor, timestep: Tensor) -> Tensor:
        dtype = transformer.patch_embedding.weight.dtype
        text = context.to(state.device, dtype).expand(len(state), -1, -1)
        return transformer(state.to(dtype), timestep, text, return_dict=False)[0].float()

    return velocity


def flux_velocity(transformer: Any, context: Tensor, pooled: Tensor, guidance: float = 1.0) -> Velocity:
    """The velocity function of diffusers' FLUX module on latents [B, C, H, W]; `context` [T, dim], `pooled` [dim]."""

    def velocity(state: Tensor, timestep: Tensor) -> Tensor:
        (batch, _, height, width), dtype = state.shape, transformer.x_embedder.weight.dtype
        grid = height // PACK, width // PACK
        rows, columns = torch.meshgrid(*(torch.arange(size, device=state.device) for size in grid), indexing="ij")
        positions = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)
        tokens = transformer(
            F.pixel_unshuffle(state, PACK).flatten(2).transpose(1, 2).to(dtype),
            encoder_hidden_states=context.to(state.device, dtype).expand(batch, -1, -1),
            pooled_projections=pooled.to(state.device, dtype).expand(batch, -1),
            timestep=timestep / 1000,
            img_ids=positions.to(dtype),
            txt_ids=torch.zeros(len(context), 3, device=state.device, dtype=dtype),
            guidance=state.new_full((batch,), guidance) if transformer.config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PACK).float()

    return velocity


def table_timesteps(times: Tensor, backbone: str) -> Tensor:
    """What the transformer is fed at `times` [N]: the nearest entry's timestep in the scheduler's table, [N] float32.

    Wan's scheduler (UniPC on flow sigmas, shift 1) holds 1000 sigmas up to 0.999 and whole timesteps; FLUX's thousandths.
    """
    entries = torch.arange(1, 1001, dtype=torch.float64)
    sigmas = entries * (0.000999 if backbone == "wan" else 0.001)
    timesteps = (sigmas * 1000).floor() if backbone == "wan" else entries
    nearest = (sigmas - times.double()[:, None]).abs().argmin(dim=1)
    return timesteps[nearest].float()


def restore(
    velocity: Velocity, latent: Tensor, noise: Tensor, backbone: str, steps: int = STEPS, t0: float = T0, t_min: float = T_MIN
) -> Tensor:
    """The released sampler: x_s = (s/t)·x + [1 − s/t + s(s−t)/T0]·D + [s(t−s)/T0]·Y with D = x − t·v, state in float32."""
    times = torch.linspace(t0, t_min, steps, dtype=torch.float64)
    degraded = latent.float()
    state = (1 - t0) * degraded + t0 * noise.float()
    for i, timestep in enumerate(table_timesteps(times, backbone)):
        t = times[i].item()
        clean = state - t * velocity(state, timestep.to(state.device).expand(len(state)))
        if i == steps - 1:
            return clean
        s = times[i + 1].item()
        state = s / t * state + (1 - s / t + s * (s - t) / t0) * clean + s * (t - s) / t0 * degraded
    raise ValueError(f"steps must be at least 1, got {steps}")


def mean_of_prompts(set_prompts: Callable[[Prompts], None], prompts: Prompts, velocity: Velocity) -> Velocity:
    """The released mixing: a call for each prompt a step, in order, and the mean of the velocities."""

    def mean(state: Tensor, timestep: Tensor) -> Tensor:
        velocities = []
        for prompt in prompts:
            set_prompts([prompt])
            velocities.append(velocity(state, timestep))
        return torch.stack(velocities).mean(0)

    return mean


@torch.no_grad()
def released_wan(
    transformer: Any,
    latent: Tensor,
    noise: Tensor,
    context: Tensor,
    prompts: Prompts,
    steps: int = STEPS,
    t0: float = T0,
    t_min: float = T_MIN,
    mixed: bool = False,
) -> Tensor:
    """Restore a normalised latent [B, C, F, H, W] with diffusers' `WanTransformer3DModel`.

    Args: `noise` like `latent`; `context` [L, text_dim]; `prompts` (residual [L, D], α [blocks]) each, L or more.
    Several prompts act together in one call a step (each one more cross-attention), or, when `mixed`, in a call each, the
    velocities averaged: the released way. Returns the restored latent, float32. Leaves the prompts set on the transformer.
    """
    velocity = wan_velocity(transformer, context)
    set_wan_prompts(transformer, prompts)
    if mixed:
        velocity = mean_of_prompts(lambda chosen: set_wan_prompts(transformer, chosen), prompts, velocity)
    return restore(velocity, latent, noise, "wan", steps, t0, t_min)


@torch.no_grad()
def released_flux(
    transformer: Any,
    latent: Tensor,
    noise: Tensor,
    context: Tensor,
    pooled: Tensor,
    prompts: Prompts,
    steps: int = STEPS,
    t0: float = T0,
    t_min: float = T_MIN,
    mixed: bool = False,
    guidance: float = 1.0,
) -> Tensor:
    """Restore a normalised latent [B, C, H, W] with diffusers' `FluxTransformer2DModel`; `prompts` may be shorter than the text.

    `context` [T, joint_attention_dim], `pooled` [pooled_projection_dim]; everything else as in `released_wan`.
    """
    velocity = flux_velocity(transformer, context, pooled, guidance)
    set_flux_prompts(transformer, prompts)
    if mixed:
        velocity = mean_of_prompts(lambda chosen: set_flux_prompts(transformer, chosen), prompts, velocity)
    return restore(velocity, latent, noise, "flux", steps, t0, t_min)
