"""FLUX's parameters under diffusers' names, under ours (fused QKV, split in conditioner and trunk), and the original ones.

Source of the original layout: github.com/black-forest-labs/flux.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.parameters import (
    OriginalNames,
    State,
    count_blocks,
    halves_to_pairs,
    load_halves,
    pairs_to_halves,
    shapes,
)

EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder.linear_1",
    "time_out": "time_text_embed.timestep_embedder.linear_2",
    "pooled_in": "time_text_embed.text_embedder.linear_1",
    "pooled_out": "time_text_embed.text_embedder.linear_2",
    "context_in": "context_embedder",
}
GUIDANCE = {
    "guidance_in": "time_text_embed.guidance_embedder.linear_1",
    "guidance_out": "time_text_embed.guidance_embedder.linear_2",
}
ENDS = {"image_in": "x_embedder", "image_out": "proj_out"}
HEAD = "norm_out.linear"
IMAGE_STREAM = {
    "q": "attn.to_q",
    "k": "attn.to_k",
    "v": "attn.to_v",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "out": "attn.to_out.0",
    "up": "ff.net.0.proj",
    "down": "ff.net.2",
}
TEXT_STREAM = {
    "q": "attn.add_q_proj",
    "k": "attn.add_k_proj",
    "v": "attn.add_v_proj",
    "q_norm": "attn.norm_added_q",
    "k_norm": "attn.norm_added_k",
    "out": "attn.to_add_out",
    "up": "ff_context.net.0.proj",
    "down": "ff_context.net.2",
}
SINGLE_BLOCK = {
    "q": "attn.to_q",
    "k": "attn.to_k",
    "v": "attn.to_v",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "up": "proj_mlp",
    "out": "proj_out",
}
ALIKE = ("out", "up", "down")  # a single-stream block's down is part of its out
KINDS = ("weight", "bias")
ORIGINAL_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# A fused layer: diffusers' layers in the order of its rows, and the share of the rows that each has.
ORIGINAL_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1},
    "txt_attn.qkv": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
ORIGINAL_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4},
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
ORIGINAL = OriginalNames(
    ORIGINAL_ENDS,
    {
        "double_blocks": ("transformer_blocks", ORIGINAL_DOUBLE),
        "single_blocks": ("single_transformer_blocks", ORIGINAL_SINGLE),
    },
    swapped=HEAD,
)


def streams(config: FluxConfig) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Our prefix, diffusers' prefix and the layers' names (ours, theirs) of all that has a fused QKV in the trunk."""
    for i in range(config.num_layers):
        yield f"double_blocks.{i}.text.", f"transformer_blocks.{i}.", TEXT_STREAM
        yield f"double_blocks.{i}.image.", f"transformer_blocks.{i}.", IMAGE_STREAM
    for i in range(config.num_single_layers):
        yield f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", SINGLE_BLOCK


def conditioner_names(config: FluxConfig) -> dict[str, str]:
    """Our name of each conditioner layer that diffusers stores alike, and diffusers'."""
    names = EMBEDDERS | (GUIDANCE if config.guidance_embeds else {})
    for i in range(config.num_layers):
        names |= {
            f"text.{i}": f"transformer_blocks.{i}.norm1_context.linear",
            f"image.{i}": f"transformer_blocks.{i}.norm1.linear",
        }
    return names | {f"single.{i}": f"single_transformer_blocks.{i}.norm.linear" for i in range(config.num_single_layers)}


def trunk_parameters(config: FluxConfig, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The trunk's parameters one by one, (our name, pieces: see `assign`), read from a state dict with diffusers' names."""

    def halves(name: str) -> Tensor:
        return pairs_to_halves(source[name], config.attention_head_dim)

    for ours, theirs in ENDS.items():
        for kind in KINDS:
            yield f"{ours}.{kind}", [source[f"{theirs}.{kind}"]]
    for prefix, their_prefix, names in streams(config):
        for kind in KINDS:
            q, k = (halves(f"{their_prefix}{names[name]}.{kind}") for name in "qk")
            yield f"{prefix}qkv.{kind}", [q, k, source[f"{their_prefix}{names['v']}.{kind}"]]
        for name in ("q_norm", "k_norm"):
            yield prefix + name, [halves(f"{their_prefix}{names[name]}.weight")]
        for name in filter(names.__contains__, ALIKE):
            for kind in KINDS:
                yield f"{prefix}{name}.{kind}", [source[f"{their_prefix}{names[name]}.{kind}"]]


def conditioner_parameters(config: FluxConfig, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The conditioner's parameters one by one, (our name, pieces: see `assign`), from a state dict with diffusers' names."""
    for ours, theirs in conditioner_names(config).items():
        for kind in KINDS:
            yield f"{ours}.{kind}", [source[f"{theirs}.{kind}"]]
    for kind in KINDS:
        yield f"head.{kind}", swapped_halves(source[f"{HEAD}.{kind}"])


def swapped_halves(x: Tensor) -> Sequence[Tensor]:
    """Diffusers' head gives scale, shift; all other modulations, and ours, give shift, scale."""
    return x.chunk(2)[::-1]


def load_flux(
    config: FluxConfig,
    source: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[FluxConditioner, FluxTrunk]:
    """Build both halves from a diffusers state dict, frozen; trunk in `dtype` on `device`, conditioner on the CPU as stored.

    Raises `BackboneError` for missing or unexpected keys (the first few are listed) and for shapes that do not fit `config`.
    """
    halves, names = (FluxConditioner, FluxTrunk), (diffusers_state_dict, conditioner_parameters, trunk_parameters)
    return load_halves(config, halves, names, source, device, dtype)


def diffusers_state_dict(conditioner: FluxConditioner, trunk: FluxTrunk) -> dict[str, Tensor]:
    """Both halves as one state dict with diffusers' names: the inverse of `load_flux`."""
    config = trunk.config
    blocks, rest = trunk.state_dict(), conditioner.state_dict()
    state = {}

    def back(rows: Tensor) -> Tensor:
        return halves_to_pairs(rows, config.attention_head_dim)

    for kind in KINDS:
        state |= {f"{theirs}.{kind}": blocks[f"{ours}.{kind}"] for ours, theirs in ENDS.items()}
        state |= {f"{theirs}.{kind}": rest[f"{ours}.{kind}"] for ours, theirs in conditioner_names(config).items()}
        head = rest[f"head.{kind}"]
        # On the meta device only shapes count, and concatenating there imports torch's compiler, which takes seconds.
        state[f"{HEAD}.{kind}"] = head if head.is_meta else torch.cat(swapped_halves(head))
    for prefix, their_prefix, names in streams(config):
        for kind in KINDS:
            q, k, v = blocks[f"{prefix}qkv.{kind}"].chunk(3)
            for name, tensor in zip("qkv", (back(q), back(k), v)):
                state[f"{their_prefix}{names[name]}.{kind}"] = tensor
            for name in filter(names.__contains__, ALIKE):
                state[f"{their_prefix}{names[name]}.{kind}"] = blocks[f"{prefix}{name}.{kind}"]
        for name in ("q_norm", "k_norm"):
            state[f"{their_prefix}{names[name]}.weight"] = back(blocks[prefix + name])
    return state


def flux_sizes(state: State, settings: dict) -> dict:
    """The diffusers config dict of a FLUX transformer, from the shapes of its tensors under diffusers' names, which tell all."""
    shape = shapes(state)
    width, channels = shape("x_embedder.weight", 2)
    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    return {
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0],
        "num_layers": count_blocks(state, "transformer_blocks"),
        "num_single_layers": count_blocks(state, "single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shape("context_embedder.weight", 2)[1],
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in state,
    }
