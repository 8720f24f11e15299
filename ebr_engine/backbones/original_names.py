"""The original layouts of Wan 2.1 and FLUX.1 checkpoints: their names, their fused tensors, and sizes read from shapes.

Sources: github.com/Wan-Video/Wan2.1, github.com/black-forest-labs/flux; the names on the right are those of diffusers'
`WanTransformer3DModel` and `FluxTransformer2DModel`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ebr_engine.backbones.parameters import TensorFiles
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.errors import BackboneError

WAN = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
WAN_BLOCK = {
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
FLUX = {
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
SWAPPED = "norm_out.linear"  # shift, scale in the original; scale, shift in diffusers
# A fused layer: diffusers' layers in the order of its rows, and the share of the rows that each has.
FLUX_DOUBLE = {
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
FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4},
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
ENDS = {"wan": WAN, "flux": FLUX}
BLOCKS = {  # by the word before a block's number: diffusers' word, and the names within the block
    "wan": {"blocks": ("blocks", WAN_BLOCK)},
    "flux": {
        "double_blocks": ("transformer_blocks", FLUX_DOUBLE),
        "single_blocks": ("single_transformer_blocks", FLUX_SINGLE),
    },
}
KINDS = {"weight": "weight", "bias": "bias", "scale": "weight"}
WAN_HEAD_DIM = 128  # of every released size


class Piece(NamedTuple):
    """Where a tensor lies in the original layout: rows first/of to last/of of the tensor `key`, their halves swapped or not."""

    key: str
    first: int = 0
    last: int = 1
    of: int = 1
    swapped: bool = False


def pieces(backbone: str, key: str) -> Iterator[tuple[str, Piece]]:
    """What diffusers makes of an original tensor: its name there and the piece; nothing for a key that is not of the model."""
    names, prefix, rest = ENDS[backbone], "", key
    numbered = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", key)
    if numbered and numbered[1] in BLOCKS[backbone]:
        block, names = BLOCKS[backbone][numbered[1]]
        prefix, rest = f"{block}.{numbered[2]}.", numbered[3]
    layer, _, kind = rest.rpartition(".")
    layer, suffix = (layer, f".{KINDS[kind]}") if kind in KINDS else (rest, "")
    found = names.get(layer, {})
    shares = {found: 1} if isinstance(found, str) else found
    first, of = 0, sum(shares.values())
    for name, share in shares.items():
        yield f"{prefix}{name}{suffix}", Piece(key, first, first + share, of, swapped=name == SWAPPED)
        first += share


class OriginalState(Mapping[str, Tensor]):
    """The tensors of files in an original layout, under diffusers' names; fused ones are sliced in the file.

    Keys that the model does not have keep their name. Raises `BackboneError` for a fused tensor that cannot be split.
    """

    def __init__(self, backbone: str, files: TensorFiles):
        self.files = files
        self.pieces = {name: piece for key in files for name, piece in (list(pieces(backbone, key)) or [(key, Piece(key))])}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is not read."""
        piece = self.pieces[name]
        whole = self.files.shape(piece.key)
        if piece.of == 1:
            return whole
        rows, *rest = whole or (0,)
        if rows % piece.of:
            raise BackboneError(f"{piece.key} has {rows} rows, which are not {piece.of} equal parts")
        return rows // piece.of * (piece.last - piece.first), *rest

    def __getitem__(self, name: str) -> Tensor:
        piece = self.pieces[name]
        if piece.of == 1:
            whole = self.files[piece.key]
            return torch.cat(whole.chunk(2)[::-1]) if piece.swapped else whole
        share = self.shape(name)[0] // (piece.last - piece.first)
        return self.files.rows(piece.key, share * piece.first, share * piece.last)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def wan_sizes(state: TensorFiles | OriginalState, settings: dict) -> dict:
    """The diffusers config dict of a Wan transformer, from the shapes of its tensors under diffusers' names.

    What shapes do not tell is read from the original repository's configuration (`settings`), or is as in all released sizes.
    """
    shape = shapes(state)
    width, channels, *patch = shape("patch_embedding.weight", 5)
    heads = settings.get("num_heads", width // WAN_HEAD_DIM)
    if not heads or width % heads:
        raise BackboneError(f"a width of {width} is not that of {heads} heads: the model's own config.json has to lie beside it")
    if (kind := settings.get("model_type", "t2v")) != "t2v":
        raise BackboneError(f"only text-to-video models (t2v) are supported, this one is {kind}")
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0] // (patch[0] * patch[1] * patch[2]),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": blocks(state, "blocks"),
        "eps": settings.get("eps", WanConfig.eps),
    }


def flux_sizes(state: TensorFiles | OriginalState) -> dict:
    """The diffusers config dict of a FLUX transformer, from the shapes of its tensors under diffusers' names."""
    shape = shapes(state)
    width, channels = shape("x_embedder.weight", 2)
    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    return {
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0],
        "num_layers": blocks(state, "transformer_blocks"),
        "num_single_layers": blocks(state, "single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shape("context_embedder.weight", 2)[1],
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in state,
    }


def shapes(state: TensorFiles | OriginalState) -> Callable[[str, int], tuple[int, ...]]:
    """A function that gives the shape of a tensor with a number of axes; `BackboneError` when it is missing or other."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in state:
            raise BackboneError(f"checkpoint misses {name}")
        if len(found := state.shape(name)) != axes or 0 in found:
            raise BackboneError(f"{name} has shape {found} in the checkpoint, {axes} axes are expected")
        return found

    return shape


def blocks(state: Mapping[str, Tensor], word: str) -> int:
    """How many blocks the highest number after `word` stands for."""
    return 1 + max((int(name.split(".", 2)[1]) for name in state if re.match(rf"{word}\.\d+\.", name)), default=-1)
