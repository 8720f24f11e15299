"""`mini`: a small Wan-architecture transformer over a pixel codec, with its own small text encoder; ships in the package."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.mini.codec import OrthonormalCodec, PixelCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanTrunk
from ebr_engine.backbones.wan.weights import diffusers_state_dict, load_wan
from ebr_engine.errors import BackboneError
from ebr_engine.tensor_files import write_tensors

WEIGHTS = Path(__file__).parents[2] / "assets" / "mini" / "mini.safetensors"
FORMAT = "ebr-engine mini 2"
BLOCK_FORMAT = "ebr-engine mini 1"  # before the lapped codec; still read
CODECS = {codec.channels: codec for codec in (PixelCodec, LappedCodec)}  # by the channels that the transformer takes
CONTEXT_TOKENS = 16
MINI = WanConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=LappedCodec.channels,
    out_channels=LappedCodec.channels,
    text_dim=64,
    freq_dim=128,
    ffn_dim=1024,
    num_layers=6,
    rope_max_seq_len=1024,
)


class MiniTextEncoder(nn.Module):
    """Words to a context: embeddings, positions and one transformer layer; padding rows are zero, as Wan's are.

    A caption is at most 15 words of a closed vocabulary, followed by an end token; the empty caption is the end token alone.
    """

    def __init__(self, vocabulary: list[str], width: int = MINI.text_dim, heads: int = 4):
        super().__init__()
        self.vocabulary = vocabulary
        self.heads = heads
        self.index = {word: i + 2 for i, word in enumerate(vocabulary)}  # 0 pads, 1 ends
        self.embedding = nn.Embedding(len(vocabulary) + 2, width)
        self.position = nn.Parameter(torch.randn(CONTEXT_TOKENS, width) * 0.1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def tokenize(self, captions: list[tuple[str, ...]]) -> Tensor:
        """Captions to token ids [B, 16] int64; a word outside the vocabulary is a `BackboneError`."""
        ids = torch.zeros(len(captions), CONTEXT_TOKENS, dtype=torch.int64)
        for row, words in zip(ids, captions):
            if unknown := [word for word in words if word not in self.index]:
                raise BackboneError(f"unknown caption word(s) {', '.join(unknown)}")
            tokens = [self.index[word] for word in words[: CONTEXT_TOKENS - 1]] + [1]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, 16] → context [B, 16, text_dim]."""
        x = self.embedding(ids) + self.position
        present = ids > 0
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mask = torch.zeros_like(present, dtype=q.dtype).masked_fill(~present, -1e4)[:, None, None]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return self.norm3(x) * present.unsqueeze(-1)


@dataclass(frozen=True)
class Mini:
    """All parts of the bundled backbone, frozen."""

    conditioner: WanConditioner
    trunk: WanTrunk
    codec: OrthonormalCodec
    text_encoder: MiniTextEncoder
    context: Tensor  # [16, text_dim] float32: the empty caption's
    training: dict  # how the weights were made


def save_mini(path: Path, mini: Mini, format: str = FORMAT) -> None:
    """Write a backbone as one safetensors file: weights bf16, codec statistics and context float32."""
    state = diffusers_state_dict(mini.conditioner, mini.trunk)
    tensors = {f"transformer.{name}": tensor.bfloat16().contiguous() for name, tensor in state.items()}
    for name, tensor in mini.text_encoder.state_dict().items():
        tensors[f"text_encoder.{name}"] = tensor.detach().bfloat16().contiguous()
    tensors |= {"codec.mean": mini.codec.mean, "codec.scale": mini.codec.scale, "context": mini.context.contiguous()}
    metadata = {
        "format": format,
        "config": json.dumps(mini.trunk.config.to_diffusers()),
        "vocabulary": json.dumps(mini.text_encoder.vocabulary),
        "training": json.dumps(mini.training),
    }
    write_tensors(path, tensors, metadata)


def load_mini(
    path: Path = WEIGHTS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    formats: tuple[str, ...] = (FORMAT, BLOCK_FORMAT),
    codecs: Mapping[int, type[OrthonormalCodec]] = CODECS,
) -> Mini:
    """Read a backbone written by `save_mini`; the trunk in `dtype` on `device`, the rest float32 on the CPU.

    `formats`: those that are read; `codecs`: theirs, by the channels that the transformer takes. Raises `BackboneError` when the
    file is missing, damaged or of another format.
    """
    kind = formats[0].split()[1]
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"cannot read the {kind} backbone from {path}: {error}") from error
    if metadata.get("format") not in formats:
        raise BackboneError(f"{path} is not a {kind} backbone ({formats[0]})")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    try:
        config = WanConfig.from_diffusers(json.loads(metadata["config"]))
        text_encoder = MiniTextEncoder(json.loads(metadata["vocabulary"]), config.text_dim)
        text_encoder.load_state_dict(part("text_encoder."))
        codec = codecs[config.in_channels](tensors["codec.mean"], tensors["codec.scale"])
        training = json.loads(metadata["training"])
        context = tensors["context"]
    except (KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise BackboneError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    conditioner, trunk = load_wan(config, part("transformer."), device, dtype)
    return Mini(conditioner, trunk, codec, text_encoder.requires_grad_(False), context, training)
