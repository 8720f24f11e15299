"""Wan's parameters under diffusers' names, and under ours (fused QKV, split in conditioner and trunk)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ebr_engine.backbones.parameters import CheckedState, assign
from ebr_engine.backbones.wan import WanConditioner, WanConfig, WanTrunk

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


def halves_order(config: WanConfig) -> Tensor:
    """Row order [D] that takes each head's rotary pairs from interleaved (checkpoint) to halves (see `qk_norm_rope`)."""
    head = torch.arange(config.attention_head_dim).view(-1, 2).T.flatten()
    starts = torch.arange(config.num_attention_heads) * config.attention_head_dim
    return (starts[:, None] + head).flatten()


def trunk_parameters(config: WanConfig, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The trunk's parameters one by one, (our name, tensor), read from a state dict with diffusers' names."""
    order = halves_order(config)
    yield "patch_in.weight", source["patch_embedding.weight"].flatten(1)
    yield "patch_in.bias", source["patch_embedding.bias"]
    for i in range(config.num_layers):
        prefix = f"blocks.{i}."
        for kind in ("weight", "bias"):
            q, k, v = (source[f"{prefix}attn1.to_{name}.{kind}"] for name in "qkv")
            yield f"{prefix}qkv.{kind}", torch.cat((q[order], k[order], v))
        for ours, theirs in BLOCK_NORMS.items():
            norm = source[f"{prefix}{theirs}.weight"]
            yield prefix + ours, norm if ours == "cross_q_norm" else norm[order]
        for ours, theirs in BLOCK.items():
            for kind in ("weight", "bias"):
                yield f"{prefix}{ours}.{kind}", source[f"{prefix}{theirs}.{kind}"]
    yield "patch_out.weight", source["proj_out.weight"]
    yield "patch_out.bias", source["proj_out.bias"]


def conditioner_parameters(config: WanConfig, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The conditioner's parameters one by one, (our name, tensor), read from a state dict with diffusers' names."""
    for ours, theirs in CONDITIONER.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", source[f"{theirs}.{kind}"]

    def stack(key: str) -> Tensor:
        return torch.stack([source[f"blocks.{i}.{key}"] for i in range(config.num_layers)])

    yield "scale_shift", stack("scale_shift_table").squeeze(1)
    yield "head_scale_shift", source["scale_shift_table"].squeeze(0)
    yield "kv_weight", torch.cat((stack("attn2.to_k.weight"), stack("attn2.to_v.weight")), dim=1)
    yield "kv_bias", torch.cat((stack("attn2.to_k.bias"), stack("attn2.to_v.bias")), dim=1)
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
    with torch.device("meta"):
        conditioner, trunk = WanConditioner(config), WanTrunk(config)
    source = CheckedState(source, diffusers_state_dict(conditioner, trunk))
    assign(conditioner, conditioner_parameters(config, source), "cpu", torch.float32)
    assign(trunk, trunk_parameters(config, source), device, dtype)
    return conditioner, trunk


def diffusers_state_dict(conditioner: WanConditioner, trunk: WanTrunk) -> dict[str, Tensor]:
    """Both halves as one state dict with diffusers' names: the inverse of `load_wan`."""
    config = trunk.config
    ours = {name: tensor.detach() for name, tensor in (*trunk.state_dict().items(), *conditioner.state_dict().items())}
    order = halves_order(config).argsort()

    def back(rows: Tensor) -> Tensor:
        # On the meta device only shapes count, and indexing there imports torch's compiler, which takes a second.
        return rows if rows.is_meta else rows[order.to(rows.device)]

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
