"""Fitting runs into memory: the rung of the ladder that a limit allows, and the next one when memory runs out after all."""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from ebr_engine.backbones.checkpoint import memory
from ebr_engine.backbones.flux import MLP_RATIO, PACK, FluxConfig
from ebr_engine.backbones.loading import Backbone
from ebr_engine.backbones.mini import CODECS
from ebr_engine.backbones.wan import WanConfig
from ebr_engine.errors import EngineError, warn
from ebr_engine.memory import FLOAT, Costs, Rung, Work, below, choose, gentle, ladder, limits_of, peak, size_of, token_bytes
from ebr_engine.offload import BLOCK_LISTS, inner
from ebr_engine.safety import precision
from ebr_engine.vae import FluxCodec, WanCodec

Result = TypeVar("Result")
CELL = 8  # pixels that a latent cell of either VAE spans
FEATURES = 4  # times the channels at full resolution: those between a VAE's halves
M_MMAP_THRESHOLD, LARGE = -3, 2**17  # of glibc's malloc.h; bytes
FLUX_TEXT = 512  # rows of FLUX's empty text, which run beside a picture's tokens


@dataclass(frozen=True)
class Vae:
    """What a VAE needs, counted as in `memory.py`: bytes of a pixel coded at once, for every channel at full resolution and
    byte of an element; and the published one's channels and parameters."""

    encode: float
    decode: float
    whole: int  # pixels coded in one piece in a two-byte dtype
    tile: int
    temporal: int
    width: int
    parameters: int


VAES = {
    "wan": Vae(50, 56, WanCodec.whole_area, WanCodec.default_tile, 4, 96, 126_892_531),
    "flux": Vae(5, 8, FluxCodec.whole_area, FluxCodec.default_tile, 1, 128, 83_819_683),
}
MINI_CODEC = (24, 12)  # bytes that `mini`'s codec needs of a pixel to encode and to decode
OVERHEAD = {"cpu": 2**25, "cuda": 2**29}  # beside what is computed: libraries, their workspaces, a GPU's context


class Fitting:
    """Where on the ladder a restorer runs. `limit`: bytes (or `8G`) of the device, on a CPU of the process, None for all;
    `low`: all that saves memory without making tiles and chunks smaller. It never climbs up again."""

    def __init__(self, limit: str | int | None = None, low: bool = False):
        self.limit, self.low = None if limit is None else size_of(limit), low
        self.reached: tuple[float, ...] = ()  # by other ladders too: those of clips of other lengths
        if limit is not None or low:
            give_back_at_once()

    def rung(self, rungs: list[Rung], costs: Costs, work: Work) -> int:
        """Number of the rung to run on; `EngineError` says the least memory that would do."""
        return choose(rungs, costs, work, self.limit, max(below(rungs, self.reached), gentle(rungs) if self.low else 0))

    def run(
        self, rungs: list[Rung], costs: Costs, work: Work, attempt: Callable[[Rung], Result], free: Callable[[], None]
    ) -> Result:
        """`attempt(rung)` on the first rung that fits, or on the next ones while memory runs out; `free` comes in between.

        Raises what the smallest rung raises.
        """
        index = self.rung(rungs, costs, work)
        while True:
            try:
                return attempt(rungs[index])
            except (MemoryError, RuntimeError) as error:
                lower = self._below(rungs, costs, work, index)
                if not out_of_memory(error) or lower is None:
                    raise
            # Outside of the handler: the error's traceback held what the attempt had made.
            free()
            release()
            warn(f"not enough memory for {work}; going on with {rungs[lower]}")
            index, found = lower, limits_of(rungs, lower)
            self.reached = tuple(map(min, self.reached or found, found))

    def _below(self, rungs: list[Rung], costs: Costs, work: Work, index: int) -> int | None:
        """The next rung on which this work needs less; None on the smallest."""
        need = peak(costs, rungs[index], work)
        return next((i for i in range(index + 1, len(rungs)) if peak(costs, rungs[i], work) < need), None)


def rungs_of(parts: Backbone, start: Rung, costs: Costs, compiled: bool) -> list[Rung]:
    """The ladder of a loaded backbone; what is compiled cannot wait on the CPU block by block, nor can an exported one."""
    return ladder(start, costs, isinstance(parts.trunk, nn.Module) and not compiled, parts.fixed is not None)


def costs_of(parts: Backbone) -> Costs:
    """What a loaded backbone costs; see `memory.Costs`."""
    codec = inner(parts.codec)
    module = isinstance(parts.trunk, nn.Module)
    lists = [getattr(parts.trunk, name) for name in BLOCK_LISTS if hasattr(parts.trunk, name)] if module else []
    blocks = [_bytes(block) for blocks in lists for block in blocks]
    vae = None if parts.name == "mini" else (codec.width, codec.dtype.itemsize)
    waiting = max(0, sum(blocks) - 2 * max(blocks, default=0))
    trunk = (_bytes(parts.trunk), waiting) if module else (0, 0)
    made = costs(parts.name, parts.trunk.config, precision(parts), parts.device.type, vae, trunk)
    beside = _bytes(parts.conditioner) if parts.conditioner is not None and not made.cuda else 0
    return replace(made, trunk=made.trunk + beside, codec=codec.parameters_bytes)


def costs(
    name: str,
    config: WanConfig | FluxConfig,
    kind: str,
    device: str,
    vae: tuple[int, int] | None = None,
    trunk: tuple[int, int] | None = None,
) -> Costs:
    """What a backbone costs by its sizes: `mini`, `wan` or `flux` in precision `kind` on a `device` (cpu or cuda).

    `vae`: channels at full resolution and bytes an element of its codec, the published one in bf16 by default.
    `trunk`: bytes of the transformer's weights, and of those that can wait; by its sizes where it is not there.
    """
    wan = isinstance(config, WanConfig)
    hidden = config.ffn_dim if wan else MLP_RATIO * config.width
    blocks = config.num_layers if wan else config.blocks
    if trunk is None:
        weights = memory(config, torch.float32 if kind == "fp32" else torch.bfloat16)["trunk_bytes"]
        weights //= 2 if kind == "fp8" else 1  # nearly all of them are in the layers that fp8 takes
        trunk = weights, weights * (blocks - 2) // blocks
    fields = {
        "trunk": trunk[0] + OVERHEAD[device],
        "waiting": trunk[1],
        "token": token_bytes("wan" if wan else "flux", device, kind, config.width, hidden),
        "text": 0 if wan else FLUX_TEXT,
        "channels": config.in_channels if wan else config.latent_channels,
        "patch": config.patch_size[-1] if wan else PACK,
        "cuda": device == "cuda",
    }
    if name == "mini":
        codec = {"codec": 0, "encode": MINI_CODEC[0], "decode": MINI_CODEC[1], "feature": 0.0, "codec_whole": 0, "codec_tile": 0}
        cell = CODECS[config.in_channels].spatial
        return Costs(**fields, **codec, spatial=cell, temporal=1, multiple=cell * fields["patch"])
    about = VAES[name]
    width, element = vae or (about.width, torch.bfloat16.itemsize)
    return Costs(
        **fields,
        codec=about.parameters * element,
        encode=about.encode * width * element,
        decode=about.decode * width * element,
        feature=FEATURES * width * FLOAT / CELL**2,
        codec_whole=about.whole * torch.bfloat16.itemsize // element,
        codec_tile=about.tile,
        spatial=CELL,
        temporal=about.temporal,
        multiple=CELL * fields["patch"],
    )


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def placed(make: Callable[[str], Result], device: torch.device, offload: str, movable: bool) -> Result:
    """`make(offload)`; if a GPU's memory ends on the way and its blocks are `movable`, `make("blocks")`, with a warning.

    Raises `EngineError` when memory ends all the same.
    """
    ways = [offload, "blocks"] if movable and device.type == "cuda" and offload != "blocks" else [offload]
    for way in ways:
        try:
            return make(way)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        release()
        if way != ways[-1]:
            warn(f"the model does not fit into the memory of {device}; its blocks wait on the CPU (offload blocks)")
    hint = "a smaller precision (bf16, fp8) may" if way == "blocks" or device.type == "cpu" else "offload blocks may"
    raise EngineError(f"not enough memory to load the model; {hint} fit")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch (on any device) or Python ran out of memory."""
    words = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in words or "bad_alloc" in words


def give_back_at_once() -> None:
    """Have glibc take every large block from the system and give it back when it is freed, for the whole process.

    Otherwise it keeps blocks of up to 32 MB in its heap, which grew by a half beyond what was alive, and no limit holds.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    except (AttributeError, OSError, TypeError):  # another C library: nothing to be done
        return


def release() -> None:
    """Give back what nothing refers to any more, the device's cached blocks too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
