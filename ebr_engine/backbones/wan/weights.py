"""Wan's parameters under diffusers' names, under ours (fused QKV, split in conditioner and trunk), and the original ones.

Source of the original layout: github.com/Wan-Video/Wan2.1.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ebr_engine.backbones.parameters import (
    OriginalNames,
    State,
    count_blocks,
    halves_to_pairs,
    load_halves,
    pairs_to_halves,
    shapes,
)
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanTrunk
from ebr_engine.errors import BackboneError

CONDITIONER = {
    "time_in": "condition_embedder.time_embedder.linear_1",
    "time_out": "condition_embedder.time_embedder.linear_2",
    "time_proj": "condition_embedder.time_proj",
    "text_in": "condition_embedder.text_embedder.linear_1",
    "text_out": "condition_embedder.text_embedder.linear_2",
}
BLOCK = {
    "out": "attn1.to_out.0",
    "cross_norm": "norm2",
    "cross_q": "attn2.to_q",
    "cross_out": "attn2.to_out.0",
    "up": "ffn.net.0.proj",
    "down": "ffn.net.2",
}
BLOCK_NORMS = {"q_norm": "attn1.norm_q", "k_norm": "attn1.norm_k", "cross_q_norm": "attn2.norm_q"}
ORIGINAL_ENDS = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ORIGINAL_BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
ORIGINAL = OriginalNames(ORIGINAL_ENDS, {"blocks": ("blocks", ORIGINAL_BLOCK)})
HEAD_DIM = 128  # of every released size
KINDS = {"t2v": "text-to-video", "ti2v": "text-and-image-to-video"}  # in the original configuration


def trunk_parameters(config: WanConfig, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The trunk's parameters one by one, (our name, pieces: see `assign`), read from a state dict with diffusers' names."""

    def halves(name: str) -> Tensor:
        return pairs_to_halves(source[name], config.attention_head_dim)

    yield "patch_in.weight", [source["patch_embedding.weight"]]
    yield "patch_in.bias", [source["patch_embedding.bias"]]
    for i in range(config.num_layers):
        prefix = f"blocks.{i}."
        for kind in ("weight", "bias"):
            q, k = (halves(f"{prefix}attn1.to_{name}.{kind}") for name in "qk")
            yield f"{prefix}qkv.{kind}", [q, k, source[f"{prefix}attn1.to_v.{kind}"]]
        for ours, theirs in BLOCK_NORMS.items():
            name = f"{prefix}{theirs}.weight"
            yield prefix + ours, [source[name] if ours == "cross_q_norm" else halves(name)]
        for ours, theirs in BLOCK.items():
            for kind in ("weight", "bias"):
                yield f"{prefix}{ours}.{kind}", [source[f"{prefix}{theirs}.{kind}"]]
    yield "patch_out.weight", [source["proj_out.weight"]]
    yield "patch_out.bias", [source["proj_out.bias"]]


def conditioner_parameters(config: WanConfig, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The conditioner's parameters one by one, (our name, pieces: see `assign`), from a state dict with diffusers' names."""
    for ours, theirs in CONDITIONER.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", [source[f"{theirs}.{kind}"]]

    def stack(*keys: str) -> list[Tensor]:
        return [source[f"blocks.{i}.{key}"] for i in range(config.num_layers) for key in keys]

    yield "scale_shift", stack("scale_shift_table")
    yield "head_scale_shift", [source["scale_shift_table"]]
    yield "kv_weight", stack("attn2.to_k.weight", "attn2.to_v.weight")
    yield "kv_bias", stack("attn2.to_k.bias", "attn2.to_v.bias")
    yield "k_norm", stack("attn2.norm_k.weight")


def load_wan(
    config: WanConfig,
    source: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[WanConditioner, WanTrunk]:
    """Build both halves from a diffusers state dict, frozen; trunk in `dtype` on `device`, conditioner float32 on the CPU.

    Raises `BackboneError` for missing or unexpected keys (the first few are listed) and for shapes that do not fit `config`.
    """
    halves, names = (WanConditioner, WanTrunk), (diffusers_state_dict, conditioner_parameters, trunk_parameters)
    return load_halves(config, halves, names, source, device, dtype, torch.float32)


def diffusers_state_dict(conditioner: WanConditioner, trunk: WanTrunk) -> dict[str, Tensor]:
    """Both halves as one state dict with diffusers' names: the inverse of `load_wan`."""
    config = trunk.config
    ours = {name: tensor.detach() for name, tensor in (*trunk.state_dict().items(), *conditioner.state_dict().items())}

    def back(rows: Tensor) -> Tensor:
        return halves_to_pairs(rows, config.attention_head_dim)

    state = {
        "patch_embedding.weight": ours["patch_in.weight"].unflatten(1, (config.in_channels, *config.patch_size)),
        "patch_embedding.bias": ours["patch_in.bias"],
        "scale_shift_table": ours["head_scale_shift"][None],
        "proj_out.weight": ours["patch_out.weight"],
        "proj_out.bias": ours["patch_out.bias"],
    }
    for name, theirs in CONDITIONER.items():
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = ours[f"{name}.{kind}"]
    for i in range(config.num_layers):
        prefix = f"blocks.{i}."
        state[f"{prefix}scale_shift_table"] = ours["scale_shift"][i][None]
        state[f"{prefix}attn2.norm_k.weight"] = ours["k_norm"][i]
        for kind in ("weight", "bias"):
            q, k, v = ours[f"{prefix}qkv.{kind}"].chunk(3)
            state |= {
                f"{prefix}attn1.to_q.{kind}": back(q),
                f"{prefix}attn1.to_k.{kind}": back(k),
                f"{prefix}attn1.to_v.{kind}": v,
            }
            key, value = ours[f"kv_{kind}"][i].chunk(2)
            state |= {f"{prefix}attn2.to_k.{kind}": key, f"{prefix}attn2.to_v.{kind}": value}
            for name, theirs in BLOCK.items():
                state[f"{prefix}{theirs}.{kind}"] = ours[f"{prefix}{name}.{kind}"]
        for name, theirs in BLOCK_NORMS.items():
            norm = ours[prefix + name]
            state[f"{prefix}{theirs}.weight"] = norm if name == "cross_q_norm" else back(norm)
    return state


def wan_sizes(state: State, settings: dict, kind: str = "t2v") -> dict:
    """The diffusers config dict of a Wan transformer, from the shapes of its tensors under diffusers' names.

    What shapes do not tell is read from the original repository's configuration (`settings`), or is as in all released sizes.
    `kind`: what the original configuration calls a model of the backbone.
    """
    shape = shapes(state)
    width, channels, *patch = shape("patch_embedding.weight", 5)
    heads = settings.get("num_heads", width // HEAD_DIM)
    if not heads or width % heads:
        raise BackboneError(f"a width of {width} is not that of {heads} heads: the model's own config.json has to lie beside it")
    if (found := settings.get("model_type", kind)) != kind:
        raise BackboneError(f"only {KINDS[kind]} models ({kind}) are supported here, this one is {found}")
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0] // (patch[0] * patch[1] * patch[2]),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": count_blocks(state, "blocks"),
        "eps": settings.get("eps", WanConfig.eps),
    }
