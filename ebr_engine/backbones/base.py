"""What every backbone has: the facts of its family (`Spec`), its codec's interface, its tables, and itself when it is loaded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ebr_engine.backbones.parameters import OriginalNames, State
from ebr_engine.errors import BackboneError, EbrError
from ebr_engine.media.degradations import TASKS

PUBLISHED_PROMPTS = (
    "github.com/sudraj2002/YPT, folder ckpts"  # the authors', for Wan and FLUX; without a licence, so never bundled
)
Prompts = Sequence[tuple[Tensor, Tensor]]  # (residual [L, D] or [blocks, L, D]; mixing weight × α [blocks]) each


@dataclass(frozen=True)
class ModelSource:
    """Where a backbone comes from; None is the bundled or default one."""

    model: str | Path | None = None  # folder, file or hub id
    revision: str | None = None  # of a hub id
    offline: bool = False  # never ask the hub
    context: Path | None = None  # a file of `ebr-engine cache-text`, in place of the text encoders
    vae: Path | None = None  # a folder in diffusers' layout, in place of the model's own; a tiny one is for previews
    sample_latents: bool = False  # draw from the VAE's posterior, as released, rather than take its mode


class Config(Protocol):
    """Sizes of a transformer, under the names of diffusers' configuration file."""

    width: int
    hidden: int  # width of the feed-forward layer
    blocks: int  # that a prompt has a strength for
    head_dim: int
    latent_channels: int
    patch: tuple[int, int, int]  # latent cells that a token spans along frames, height and width

    @classmethod
    def from_diffusers(cls, config: dict) -> "Config":
        """Read a diffusers config dict; `BackboneError` names what is missing or is of another model."""

    def to_diffusers(self) -> dict:
        """The diffusers config dict of these sizes."""

    def rotary(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """cos and sin [N, head_dim/2] float32 of a picture's tokens on a grid of (frames, height, width).

        One whose steps have `text_rows` in the trunk's sequence has the same of these, `text_rotary(tokens)`.
        """


@dataclass(frozen=True)
class Conditioning:
    """The tables of a whole run: those of `by_step` have a row a step, the others are shared; `conditioning[i]` is step i."""

    step: ClassVar[type]  # the named tuple that a trunk reads: the same fields, of one step or of a batch of steps
    by_step: ClassVar[tuple[str, ...]]  # these come first
    in_trunk_dtype: ClassVar[tuple[str, ...]]  # the rest is float32

    def __len__(self) -> int:
        return len(getattr(self, self.by_step[0]))

    def __getitem__(self, step: int) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self.step(*(x[step : step + 1] if name in self.by_step else x for name, x in self.to_tensors().items()))

    def batch(self) -> Any:
        """All steps at once, as the batch of one trunk run: sample i of the batch is at step i."""
        return self.step(**self.to_tensors())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Conditioning":
        """Move the tables to the trunk's device; some get its dtype, the rest is float32."""
        tables = self.to_tensors().items()
        return type(self)(**{name: x.to(device, dtype if name in self.in_trunk_dtype else torch.float32) for name, x in tables})

    def to_tensors(self) -> dict[str, Tensor]:
        """All tables by name, in order."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """The same tables with `function` of every one."""
        return type(self)(**{name: function(table) for name, table in self.to_tensors().items()})


class Codec(Protocol):
    """What turns a clip into the latent that a transformer takes, and back. A picture is a clip of one frame.

    Of sound, a frame is as many samples as a latent frame spans, in the places of `Spec.colours` and `Spec.side`.
    """

    spatial: int  # pixels a latent cell spans, either way
    temporal: int  # frames a latent frame spans, but for a clip's first, which spans one
    channels: int  # of a latent

    @property
    def parameters_bytes(self) -> int:
        """Bytes that the weights take."""

    def frames(self, count: int) -> int:
        """The least number of frames, `count` or more, that can be encoded."""

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] → [B, channels, f, h, w] float32, normalised as the transformer takes it."""

    def decode(self, latent: Tensor) -> Tensor:
        """[B, channels, f, h, w] → pixels [B, 3, F, H, W] float32, not clamped."""

    def to(self, device: torch.device | str) -> "Codec":
        """Move the weights; returns the same object."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """The weights that are moved."""


def check_pixels(pixels: Tensor, codec: Codec) -> None:
    """`EbrError` unless pixels are [B, 3, F, H, W], not empty, with H and W that the codec divides (F is not checked)."""
    multiple = codec.spatial
    if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.numel() or any(side % multiple for side in pixels.shape[-2:]):
        shape = tuple(pixels.shape)
        raise EbrError(f"expected pixels [B, 3, F, H, W] with H and W multiples of {multiple}, got {shape}")


def check_latent(latent: Tensor, codec: Codec) -> None:
    """`EbrError` unless a latent is [B, channels, f, h, w] and not empty."""
    if latent.ndim != 5 or latent.shape[1] != codec.channels or not latent.numel():
        raise EbrError(f"expected a latent [B, {codec.channels}, f, h, w], got {tuple(latent.shape)}")


@dataclass(frozen=True)
class CodecCosts:
    """What a codec needs: bytes of a pixel that is coded at once (of a VAE for every channel at full resolution and byte of an
    element, for as many frames as a latent frame spans), and the published VAE's sizes."""

    encode: float
    decode: float
    spatial: int  # pixels that a latent cell spans, either way
    temporal: int
    whole: int = 0  # pixels coded in one piece in a two-byte dtype; 0 is any number
    tile: int = 0  # side of the tiles beyond
    width: int = 1  # channels at full resolution
    parameters: int = 0
    on_cpu: float = 1.0  # share of encode and decode where frames go one by one, as they do on a CPU


@dataclass(frozen=True)
class Learning:
    """What prompts of a backbone are learned with."""

    defaults: Mapping[str, Any] = field(default_factory=dict)  # of `LearnConfig`, where nothing else is said
    losses: tuple[str, ...] = ("velocity", "x0")
    scenes: bool = False  # procedural scenes or sounds will do, where there are no pairs
    steps: int = 20  # of the sampler that a learned prompt is meant for
    course: str = ""  # the module with the `COURSE` that it is pre-trained on, if it is


@dataclass(frozen=True)
class Encoder:
    """One text encoder: which tensor of the context it gives, by which classes of transformers, of how many tokens."""

    tensor: str
    model: str
    tokenizer: str
    kinds: tuple[str, ...]  # `model_type` of its config.json
    tokens: int
    special: int | None  # tokens of the empty text: the end token, CLIP's start token, a chat's turns; None: not known
    masked: bool = False  # padding is masked, and its rows are zero
    layers: tuple[int, ...] = ()  # of a language model, whose outputs are taken side by side; none: the last one's
    chat: tuple[Mapping[str, Any], ...] = ()  # the messages that the tokenizer's template is given; none: the bare text
    template: Mapping[str, Any] = field(default_factory=dict)  # its options
    instead: "Encoder | None" = None  # what some sizes of the model have in its place

    @property
    def pooled(self) -> bool:
        return self.tensor == "pooled"

    @property
    def shape(self) -> str:
        return "[D]" if self.pooled else f"[{self.tokens}, D]"


@dataclass(frozen=True)
class Checkpoints:
    """How the published models of a backbone are found and read."""

    default: str  # hub id
    transformer: str  # diffusers' name of its class, in config.json
    layouts: Mapping[str, bool]  # what some keys of every file begin with: whether the layout is the original one
    original: OriginalNames
    sizes: Callable[[State, dict], dict]  # diffusers' settings from the shapes of tensors and the original ones
    load: Callable[[Config, Mapping[str, Tensor], torch.device | str, torch.dtype], tuple[nn.Module, nn.Module]]
    text_encoders: tuple[Encoder, ...]  # in the order of the model folder's text_encoder, text_encoder_2
    folders: tuple[str, ...] = ("transformer",)  # of the transformer in a model's folder: diffusers' name, or the original one
    passed_over: str = ""  # how folders and files with a transformer of the same model are called that no bridge meets
    marks: tuple[str, ...] = ()  # what its model_index.json names, and that of no other model with this class of transformer
    boundary: float = 1.0  # see `Backbone.boundary`; where model_index.json does not say
    distilled: str = ""  # what is in the name of a model that was distilled to few steps, where model_index.json does not say


@dataclass(frozen=True)
class Spec:
    """All that the engine has to know of a family of backbones: facts, and references to its classes and functions."""

    name: str
    title: str
    injection: str  # of a prompt: `dual` (a second cross-attention branch) or `add` (rows added to the text tokens)
    configs: Mapping[str, Config]  # the published sizes by name

    config: type[Config]
    conditioner: type[nn.Module]
    trunk: type[nn.Module]
    conditioning: type[Conditioning]
    codec: Callable[..., Codec]  # by what `to_tensors` gives, or a VAE's class
    live: Callable[["Backbone", int], Callable[..., Any]]  # see `Backbone.live`
    load: Callable[[ModelSource, torch.device, torch.dtype], "Backbone"]
    checkpoints: Checkpoints | None = None  # how published models are read; None for one that is bundled whole
    takes: tuple[str, ...] = tuple(one.name for one in fields(ModelSource))  # what of a `ModelSource`
    colours: int = 3  # numbers of a pixel
    bounds: tuple[float, float] | None = (0.0, 1.0)  # of those numbers, to which results are cut
    side: tuple[int, int] | None = None  # height and width of all that it restores, where that is always the same
    tasks: tuple[str, ...] = TASKS  # that degradations are made for

    tile: int = 512  # pixels a side that the backbone knows
    overlap: int = 64
    whole: float = 1.0  # tiles' areas up to which a picture runs in one piece, whatever its sides
    chunk: tuple[int, int] = (1, 0)  # frames restored together, and what neighbours share
    small_side: int | None = None  # longest side of a small version that shows the whole picture; None: the tile
    knows_time: bool = False  # frames of a clip see each other
    window: int = 0  # frames on either side with which each agrees, where the backbone knows no time: see `media/motion.py`
    asks_for_frames: bool = False  # a clip is restored frame by frame only where that is asked for
    moves: bool = False  # the grid of tokens lies elsewhere in each step, and detail keeps its level: see `views.py`
    mix: str = "residual"  # how several prompts are mixed, unless it is said
    related: tuple[str, ...] = ()  # backbones whose prompts are taken too, where the sizes agree
    note: str = ""  # what `ebr-engine info` says beside the sizes
    licences: Mapping[str, str] = field(default_factory=dict)  # of the published weights, by the names of the sizes
    ran: str = ""  # what has been run so far, and where

    released_size: tuple[int, int] | None = None  # height and width of the published protocol
    released_timesteps: Callable[[tuple[float, ...]], Tensor] | None = None  # None: the schedules look nothing up
    published_prompts: str = ""  # where the authors' prompts are

    learning: Learning = Learning()

    conditioner_dtype: torch.dtype = torch.float32  # in memory
    # Bytes that live at the worst moment of a forward pass, a token: of the width, and of the feed-forward layer's width.
    # Each is a list, of which the largest counts. On a CPU the kernels are plain torch, with float32 copies.
    token_bytes: Mapping[tuple[str, str], tuple[tuple[int, int], ...]] = field(default_factory=dict)  # by device and precision
    text_rows: int = 0  # of the empty text, that run beside a picture's tokens
    codec_costs: CodecCosts = CodecCosts(0, 0, 8, 1)
    flop: Callable[[Any, Sequence[int], Any], int] | None = None  # of one run: configuration, latent's shape, step

    @property
    def bundled(self) -> bool:
        """Whether weights, codec and text come in one file."""
        return self.checkpoints is None

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels that prompts are learned at, and sizes and costs are told for."""
        return self.side or self.learning.defaults.get("size", (self.tile, self.tile))

    def check_source(self, source: ModelSource) -> None:
        """`BackboneError` where a source names what this backbone does not take."""
        refused = [one.name for one in fields(source) if getattr(source, one.name) and one.name not in self.takes]
        if refused:
            named = ", ".join(name.replace("_", " ") for name in refused)
            raise BackboneError(f"the {self.name} backbone takes no {named}: it is bundled whole; leave it out")

    def parameters(self, config: Config, dtype: torch.dtype) -> dict[str, int]:
        """Parameters and bytes of the `trunk` in `dtype` on the device, and of the `conditioner`, which never gets there.

        Keys: `trunk_parameters`, `trunk_bytes`, `conditioner_parameters`, `conditioner_bytes`.
        """
        sizes = {}
        with torch.device("meta"):
            halves = {"trunk": (self.trunk(config), dtype), "conditioner": (self.conditioner(config), self.conditioner_dtype)}
        for name, (half, kind) in halves.items():
            count = sum(parameter.numel() for parameter in half.parameters())
            sizes |= {f"{name}_parameters": count, f"{name}_bytes": count * kind.itemsize}
        return sizes


@dataclass
class Backbone:
    """A frozen backbone that is loaded. Latents are [B, C, F, H, W]."""

    spec: Spec
    conditioner: nn.Module | None  # None in an engine file, whose tables are baked
    trunk: nn.Module
    codec: Codec
    text: dict[str, Tensor]  # the empty text: context, and pooled (FLUX)
    device: torch.device
    dtype: torch.dtype  # of the trunk's layers that are not fp8
    identity: str = ""  # which model, of which revision
    codec_source: dict[str, str] = field(default_factory=dict)  # where the VAE lies, for an engine file
    fixed: tuple[int, int, int] | None = None  # frames, height, width in pixels: all that an exported trunk takes, if it is so
    boundary: float = 1.0  # of the bridge's times: from here on the model has another transformer, which is not loaded
    preview: Codec | None = None  # a rough and fast one, for previews alone

    @property
    def name(self) -> str:
        """Of its family."""
        return self.spec.name

    @property
    def width(self) -> int:
        return self.trunk.config.width

    @property
    def blocks(self) -> int:
        """Blocks that a prompt has a strength for."""
        return self.trunk.config.blocks

    @property
    def patch(self) -> int:
        """Latent cells that a token spans, either way."""
        return self.trunk.config.patch[-1]

    @property
    def noise(self) -> float:
        """How much of the bridge's noise a run starts with."""
        return getattr(self.codec, "noise", 1.0)

    @property
    def multiple(self) -> int:
        """Pixels that a token spans, either way."""
        return self.codec.spatial * self.patch

    def check_start(self, t0: float) -> None:
        """`BackboneError` where a bridge would begin at a time that this transformer does not know."""
        if t0 >= self.boundary:
            raise BackboneError(
                f"a bridge from T0 {t0:g} would meet the {self.name} model's other transformer, which works from "
                f"{self.boundary:g} on and is not loaded: use a T0 below"
            )

    def bake(self, timesteps: Tensor, prompts: Prompts) -> Conditioning:
        """The tables of a run at timesteps [S] (0 to 1000) with prompts as (residual, weight·α); on the trunk's device."""
        if self.conditioner is None:
            raise BackboneError("an engine file holds the tables of its own prompt and schedule only; build another one")
        where = self.text["context"].device  # the conditioner's: the CPU, but while a prompt is learned
        prompts = [(residual.to(where), weight.to(where)) for residual, weight in prompts]
        return self.conditioner.bake(self.trunk, timesteps.to(where), self.text, prompts).to(self.device, self.dtype)

    def live(self, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Any]:
        """A function that gives the trunk's step for timesteps [B] (0 to 1000) and a prompt that is being learned.

        It takes residual [L, D] or [blocks, L, D] with L = `tokens` and weight [blocks], and is differentiable in both. What
        does not depend on them is computed now: conditioner and text have to be where they will compute.
        """
        return self.spec.live(self, tokens)

    def prepare(self, latent: Tensor, step: Any) -> Any:
        """Make what the trunk keeps of a latent's shape, so that a graph of it takes that as it is; the graph has to keep it."""
        return self.trunk.prepare(latent, step)

    def velocity(self, latent: Tensor, step: Any) -> Tensor:
        """Velocity [B, C, F, H, W] float32 of a latent at one step of the tables."""
        return self.trunk(latent, step)
