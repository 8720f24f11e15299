"""FLUX.2's parameters under diffusers' names, under ours (q, k, v apart from a gated feed-forward), and the original ones.

Source of the original layout: github.com/black-forest-labs/flux2. No layer has a bias; all parameters are weights.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ebr_engine.backbones.flux.model import FluxTrunk
from ebr_engine.backbones.flux.weights import swapped_halves
from ebr_engine.backbones.flux2.model import Flux2Conditioner, Flux2Config
from ebr_engine.backbones.parameters import (
    OriginalNames,
    State,
    count_blocks,
    halves_to_pairs,
    load_halves,
    pairs_to_halves,
    shapes,
)

CONDITIONER = {
    "time_in": "time_guidance_embed.timestep_embedder.linear_1",
    "time_out": "time_guidance_embed.timestep_embedder.linear_2",
    "context_in": "context_embedder",
    "text": "double_stream_modulation_txt.linear",
    "image": "double_stream_modulation_img.linear",
    "single": "single_stream_modulation.linear",
}
GUIDANCE = {
    "guidance_in": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_out": "time_guidance_embed.guidance_embedder.linear_2",
}
HEAD = "norm_out.linear"
ENDS = {"image_in": "x_embedder", "image_out": "proj_out"}
# Of a double-stream block, by stream: q, k and v, their norms, and the layers that diffusers stores alike.
STREAMS = {
    "image": (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        {"q_norm": "attn.norm_q", "k_norm": "attn.norm_k"},
        {"out": "attn.to_out.0", "up": "ff.linear_in", "down": "ff.linear_out"},
    ),
    "text": (
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        {"q_norm": "attn.norm_added_q", "k_norm": "attn.norm_added_k"},
        {"out": "attn.to_add_out", "up": "ff_context.linear_in", "down": "ff_context.linear_out"},
    ),
}
SINGLE_NORMS = {"q_norm": "attn.norm_q", "k_norm": "attn.norm_k"}
SINGLE_IN, SINGLE_OUT = "attn.to_qkv_mlp_proj", "attn.to_out"
ORIGINAL_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": CONDITIONER["time_in"],
    "time_in.out_layer": CONDITIONER["time_out"],
    "guidance_in.in_layer": GUIDANCE["guidance_in"],
    "guidance_in.out_layer": GUIDANCE["guidance_out"],
    "double_stream_modulation_txt.lin": CONDITIONER["text"],
    "double_stream_modulation_img.lin": CONDITIONER["image"],
    "single_stream_modulation.lin": CONDITIONER["single"],
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": HEAD,
}
ORIGINAL_DOUBLE = {
    "img_attn.qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1},
    "txt_attn.qkv": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
ORIGINAL_SINGLE = {
    "linear1": SINGLE_IN,
    "linear2": SINGLE_OUT,
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


def conditioner_names(config: Flux2Config) -> dict[str, str]:
    """Our name of each conditioner layer that diffusers stores alike, and diffusers'."""
    return CONDITIONER | (GUIDANCE if config.guidance_embeds else {})


def trunk_parameters(config: Flux2Config, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The trunk's parameters one by one, (our name, pieces: see `assign`), read from a state dict with diffusers' names."""

    def halves(rows: Tensor) -> Tensor:
        return pairs_to_halves(rows, config.attention_head_dim)

    for ours, theirs in ENDS.items():
        yield f"{ours}.weight", [source[f"{theirs}.weight"]]
    for i in range(config.num_layers):
        theirs = f"transformer_blocks.{i}."
        for stream, (qkv, norms, alike) in STREAMS.items():
            ours = f"double_blocks.{i}.{stream}."
            q, k, v = (source[f"{theirs}{name}.weight"] for name in qkv)
            yield f"{ours}qkv.weight", [halves(q), halves(k), v]
            for name, their_name in norms.items():
                yield f"{ours}{name}", [halves(source[f"{theirs}{their_name}.weight"])]
            for name, their_name in alike.items():
                yield f"{ours}{name}.weight", [source[f"{theirs}{their_name}.weight"]]
    for i in range(config.num_single_layers):
        ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        q, k, v, up = source[f"{theirs}{SINGLE_IN}.weight"].split([*3 * [config.width], 2 * config.hidden])
        yield f"{ours}qkv.weight", [halves(q), halves(k), v]
        yield f"{ours}up.weight", [up]
        yield f"{ours}out.weight", [source[f"{theirs}{SINGLE_OUT}.weight"]]
        for name, their_name in SINGLE_NORMS.items():
            yield f"{ours}{name}", [halves(source[f"{theirs}{their_name}.weight"])]


def conditioner_parameters(config: Flux2Config, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The conditioner's parameters one by one, (our name, pieces: see `assign`), from a state dict with diffusers' names."""
    for ours, theirs in conditioner_names(config).items():
        yield f"{ours}.weight", [source[f"{theirs}.weight"]]
    yield "head.weight", swapped_halves(source[f"{HEAD}.weight"])


def load_flux2(
    config: Flux2Config,
    source: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Flux2Conditioner, FluxTrunk]:
    """Build both halves from a diffusers state dict, frozen; trunk in `dtype` on `device`, conditioner on the CPU as stored.

    Raises `BackboneError` for missing or unexpected keys (the first few are listed) and for shapes that do not fit `config`.
    """
    halves, names = (Flux2Conditioner, FluxTrunk), (diffusers_state_dict, conditioner_parameters, trunk_parameters)
    return load_halves(config, halves, names, source, device, dtype)


def diffusers_state_dict(conditioner: Flux2Conditioner, trunk: FluxTrunk) -> dict[str, Tensor]:
    """Both halves as one state dict with diffusers' names: the inverse of `load_flux2`."""
    config, blocks, rest = trunk.config, trunk.state_dict(), conditioner.state_dict()
    state = {f"{theirs}.weight": blocks[f"{ours}.weight"] for ours, theirs in ENDS.items()}
    state |= {f"{theirs}.weight": rest[f"{ours}.weight"] for ours, theirs in conditioner_names(config).items()}
    state[f"{HEAD}.weight"] = joined(swapped_halves(rest["head.weight"]))

    def back(rows: Tensor) -> Tensor:
        return halves_to_pairs(rows, config.attention_head_dim)

    for i in range(config.num_layers):
        theirs = f"transformer_blocks.{i}."
        for stream, (qkv, norms, alike) in STREAMS.items():
            ours = f"double_blocks.{i}.{stream}."
            q, k, v = blocks[f"{ours}qkv.weight"].chunk(3)
            state |= {f"{theirs}{name}.weight": rows for name, rows in zip(qkv, (back(q), back(k), v))}
            state |= {f"{theirs}{their_name}.weight": back(blocks[f"{ours}{name}"]) for name, their_name in norms.items()}
            state |= {f"{theirs}{their_name}.weight": blocks[f"{ours}{name}.weight"] for name, their_name in alike.items()}
    for i in range(config.num_single_layers):
        ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        q, k, v = blocks[f"{ours}qkv.weight"].chunk(3)
        state[f"{theirs}{SINGLE_IN}.weight"] = joined((back(q), back(k), v, blocks[f"{ours}up.weight"]))
        state[f"{theirs}{SINGLE_OUT}.weight"] = blocks[f"{ours}out.weight"]
        state |= {f"{theirs}{their_name}.weight": back(blocks[ours + name]) for name, their_name in SINGLE_NORMS.items()}
    return state


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows in one tensor.

    On the meta device only shapes count, and concatenating there imports torch's compiler, which takes seconds.
    """
    if parts[0].is_meta:
        return parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    return torch.cat(list(parts))


def flux2_sizes(state: State, settings: dict) -> dict:
    """The diffusers config dict of a FLUX.2 transformer, from the shapes of its tensors under diffusers' names."""
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
        "timestep_guidance_channels": shape("time_guidance_embed.timestep_embedder.linear_1.weight", 2)[1],
        "mlp_ratio": shape("transformer_blocks.0.ff.linear_out.weight", 2)[1] / width,
        "guidance_embeds": f"{GUIDANCE['guidance_in']}.weight" in state,
    }
