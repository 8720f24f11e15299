"""What a backbone costs in memory: its spec's numbers for its sizes, its precision and its device (`memory.Costs`)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ebr_engine.backbones.base import Backbone, Config, Spec
from ebr_engine.backbones.layers import ROTARY_KEPT, Int8Linear, quantised_as
from ebr_engine.engine.memory import FLOAT, Costs
from ebr_engine.engine.offload import block_lists, inner

FEATURES = 4  # times the channels at full resolution: those between a VAE's halves
OVERHEAD = {"cpu": 2**25, "cuda": 2**29}  # beside what is computed: libraries, their workspaces, a GPU's context
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def costs_of(backbone: Backbone) -> Costs:
    """What a loaded backbone costs."""
    codec = inner(backbone.codec)
    module = isinstance(backbone.trunk, nn.Module)
    blocks = [_bytes(block) for blocks in block_lists(backbone.trunk) for block in blocks] if module else []
    vae = None if backbone.spec.bundled else (codec.width, codec.dtype.itemsize)
    waiting = max(0, sum(blocks) - 2 * max(blocks, default=0))
    trunk = (_bytes(backbone.trunk), waiting) if module else (0, 0)
    made = costs(backbone.spec, backbone.trunk.config, precision(backbone), backbone.device.type, vae, trunk)
    beside = _bytes(backbone.conditioner) if backbone.conditioner is not None and not made.cuda else 0
    sizes = {"spatial": codec.spatial, "multiple": backbone.multiple}
    coding = codec.parameters_bytes
    stays = coding if backbone.spec.moves else 0  # its codec works in every step
    return replace(made, trunk=made.trunk + beside + stays, codec=coding - stays, **sizes)


def costs(
    spec: Spec,
    config: Config,
    kind: str,
    device: str,
    vae: tuple[int, int] | None = None,
    trunk: tuple[int, int] | None = None,
) -> Costs:
    """What a backbone costs by its sizes, in precision `kind` on a `device` (cpu or cuda).

    `vae`: channels at full resolution and bytes an element of its codec, the published one in bf16 by default.
    `trunk`: bytes of the transformer's weights, and of those that can wait; by its sizes where it is not there.
    """
    if trunk is None:
        weights = spec.parameters(config, torch.float32 if kind == "fp32" else torch.bfloat16)["trunk_bytes"]
        weights //= 2 if kind in ("fp8", "int8") else 1  # nearly all of them are in the layers that are quantised
        trunk = weights, weights * (config.blocks - 2) // config.blocks
    codec, whole = spec.codec_costs, torch.bfloat16.itemsize
    share = codec.on_cpu if device == "cpu" else 1.0
    width, element = (1, 1) if spec.bundled else vae or (codec.width, whole)
    return Costs(
        trunk=trunk[0] + OVERHEAD[device],
        waiting=trunk[1],
        codec=codec.parameters * element,
        token=token_bytes(spec, config, device, kind),
        rotary=ROTARY_KEPT * FLOAT * config.head_dim,
        text=spec.text_rows,
        encode=codec.encode * share * width * element,
        decode=codec.decode * share * width * element,
        feature=FEATURES * width * FLOAT / codec.spatial**2,
        codec_whole=codec.whole * whole // element,
        codec_tile=codec.tile,
        channels=config.latent_channels,
        spatial=codec.spatial,
        temporal=codec.temporal,
        patch=config.patch[-1],
        multiple=codec.spatial * config.patch[-1],
        pixel=spec.colours * FLOAT,
        knows_time=spec.knows_time,
        cuda=device == "cuda",
    )


def token_bytes(spec: Spec, config: Config, device: str, precision: str) -> float:
    """Bytes of a token at the worst moment of a step. `device`: cpu or cuda; `precision`: fp32, fp16, bf16, fp8 or int8."""
    wide = precision == "fp32" and device == "cuda"
    kind = "bf16" if wide or precision == "fp16" else "fp8" if precision == "int8" else precision
    bytes_ = max(width * config.width + hidden * config.hidden for width, hidden in spec.token_bytes[device, kind])
    return 2 * bytes_ if wide else bytes_


def precision(backbone: Backbone) -> str:
    """The name of a backbone's precision, as `--precision` takes it."""
    quantised = quantised_as(backbone.trunk) if isinstance(backbone.trunk, nn.Module) else None
    return quantised or NAMES[backbone.dtype]


def _bytes(module: nn.Module) -> int:
    """Of the weights, as they lie in memory: int8 ones are not what their state is."""
    parts = list(module.modules())
    int8 = [part for part in parts if isinstance(part, Int8Linear)]
    own = [tensor for part in parts if part not in int8 for tensor in _own(part)]
    return sum(tensor.nbytes for tensor in own) + sum(part.bytes for part in int8)


def _own(part: nn.Module) -> list[Tensor]:
    fleeting = part._non_persistent_buffers_set
    kept = [buffer for name, buffer in part.named_buffers(recurse=False) if name not in fleeting]
    return [*part.parameters(recurse=False), *kept]
