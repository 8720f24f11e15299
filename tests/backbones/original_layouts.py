"""Diffusers' state dicts written in the original layouts, spelled out from the published models and not from the tables."""

import torch


def wan_original(state, layers):
    """A Wan transformer's tensors as github.com/Wan-Video/Wan2.1 names them."""
    condition = "condition_embedder."
    names = {
        "patch_embedding": "patch_embedding",
        "time_embedding.0": f"{condition}time_embedder.linear_1",
        "time_embedding.2": f"{condition}time_embedder.linear_2",
        "time_projection.1": f"{condition}time_proj",
        "text_embedding.0": f"{condition}text_embedder.linear_1",
        "text_embedding.2": f"{condition}text_embedder.linear_2",
        "head.head": "proj_out",
    }
    original = {"head.modulation": state["scale_shift_table"]}
    for i in range(layers):
        block = f"blocks.{i}."
        original[f"{block}modulation"] = state[f"{block}scale_shift_table"]
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for norm in ("norm_q", "norm_k"):
                original[f"{block}{ours}.{norm}.weight"] = state[f"{block}{theirs}.{norm}.weight"]
            names |= {f"{block}{ours}.{x}": f"{block}{theirs}.to_{x}" for x in "qkv"}
            names[f"{block}{ours}.o"] = f"{block}{theirs}.to_out.0"
        names |= {
            f"{block}norm3": f"{block}norm2",
            f"{block}ffn.0": f"{block}ffn.net.0.proj",
            f"{block}ffn.2": f"{block}ffn.net.2",
        }
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            original[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    return original


def flux_original(state, layers, single_layers, guidance=True):
    """A FLUX transformer's tensors as github.com/black-forest-labs/flux names and fuses them."""
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if guidance:
        embedders["guidance_in"] = "guidance_embedder"
    original = {}
    for kind in ("weight", "bias"):

        def fused(prefix, *names, kind=kind):
            return torch.cat([state[f"{prefix}{name}.{kind}"] for name in names])

        for ours, theirs in embedders.items():
            original[f"{ours}.in_layer.{kind}"] = state[f"time_text_embed.{theirs}.linear_1.{kind}"]
            original[f"{ours}.out_layer.{kind}"] = state[f"time_text_embed.{theirs}.linear_2.{kind}"]
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        original |= {
            f"img_in.{kind}": state[f"x_embedder.{kind}"],
            f"txt_in.{kind}": state[f"context_embedder.{kind}"],
            f"final_layer.linear.{kind}": state[f"proj_out.{kind}"],
            f"final_layer.adaLN_modulation.1.{kind}": torch.cat((shift, scale)),
        }
        for i in range(layers):
            theirs = f"transformer_blocks.{i}."
            for stream, norm, feed_forward, out, qkv in (
                ("img", "norm1", "ff", "to_out.0", ("to_q", "to_k", "to_v")),
                ("txt", "norm1_context", "ff_context", "to_add_out", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                ours = f"double_blocks.{i}.{stream}_"
                original |= {
                    f"{ours}mod.lin.{kind}": state[f"{theirs}{norm}.linear.{kind}"],
                    f"{ours}attn.qkv.{kind}": fused(f"{theirs}attn.", *qkv),
                    f"{ours}attn.proj.{kind}": state[f"{theirs}attn.{out}.{kind}"],
                    f"{ours}mlp.0.{kind}": state[f"{theirs}{feed_forward}.net.0.proj.{kind}"],
                    f"{ours}mlp.2.{kind}": state[f"{theirs}{feed_forward}.net.2.{kind}"],
                }
        for i in range(single_layers):
            ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
            original |= {
                f"{ours}modulation.lin.{kind}": state[f"{theirs}norm.linear.{kind}"],
                f"{ours}linear1.{kind}": fused(theirs, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                f"{ours}linear2.{kind}": state[f"{theirs}proj_out.{kind}"],
            }
    for norm, letter in (("query_norm", "q"), ("key_norm", "k")):
        for i in range(layers):
            theirs = f"transformer_blocks.{i}.attn.norm_"
            original[f"double_blocks.{i}.img_attn.norm.{norm}.scale"] = state[f"{theirs}{letter}.weight"]
            original[f"double_blocks.{i}.txt_attn.norm.{norm}.scale"] = state[f"{theirs}added_{letter}.weight"]
        for i in range(single_layers):
            original[f"single_blocks.{i}.norm.{norm}.scale"] = state[f"single_transformer_blocks.{i}.attn.norm_{letter}.weight"]
    return original
