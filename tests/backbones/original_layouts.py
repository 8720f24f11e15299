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


def flux2_original(state, layers, single_layers, guidance=True):
    """A FLUX.2 transformer's tensors as github.com/black-forest-labs/flux2 names and fuses them."""
    names = {
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
    }
    if guidance:
        names |= {
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        }
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    original = {"final_layer.adaLN_modulation.1.weight": torch.cat((shift, scale))}
    for i in range(layers):
        theirs, ours = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for stream, feed_forward, out, added, qkv in (
            ("img", "ff", "to_out.0", "", ("to_q", "to_k", "to_v")),
            ("txt", "ff_context", "to_add_out", "added_", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            original[f"{ours}{stream}_attn.qkv.weight"] = torch.cat([state[f"{theirs}attn.{name}.weight"] for name in qkv])
            names |= {
                f"{ours}{stream}_attn.proj": f"{theirs}attn.{out}",
                f"{ours}{stream}_mlp.0": f"{theirs}{feed_forward}.linear_in",
                f"{ours}{stream}_mlp.2": f"{theirs}{feed_forward}.linear_out",
            }
            for norm, letter in (("query_norm", "q"), ("key_norm", "k")):
                original[f"{ours}{stream}_attn.norm.{norm}.scale"] = state[f"{theirs}attn.norm_{added}{letter}.weight"]
    for i in range(single_layers):
        theirs, ours = f"single_transformer_blocks.{i}.attn.", f"single_blocks.{i}."
        names |= {f"{ours}linear1": f"{theirs}to_qkv_mlp_proj", f"{ours}linear2": f"{theirs}to_out"}
        for norm, letter in (("query_norm", "q"), ("key_norm", "k")):
            original[f"{ours}norm.{norm}.scale"] = state[f"{theirs}norm_{letter}.weight"]
    return original | {f"{ours}.weight": state[f"{theirs}.weight"] for ours, theirs in names.items()}
