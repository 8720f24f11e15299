"""Models at the real sizes with random weights, as the engine's halves and as diffusers' module; and the operations of a run.

All that benchmarks know of a backbone's insides is here (and its operations on paper in `roofline.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.roofline import Workload, workload
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.flux import weights as flux_weights
from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.wan import weights as wan_weights
from ebr_engine.backbones.wan.model import WanConditioner, WanConditioning, WanTrunk
from ebr_engine.bridge.sampler import StepTable, draw_noise
from ebr_engine.engine.plan import Plan

SEED, T0 = 42, 0.4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Prompt = tuple[Tensor, Tensor]  # residual, α


class Family(NamedTuple):
    """Where a family's halves, and its parameters under diffusers' names, are found; and what it is like when tiny."""

    name: str  # of the engine's backbone
    conditioner: type[nn.Module]
    trunk: type[nn.Module]
    diffusers: str  # class
    state_dict: Callable[[nn.Module, nn.Module], dict[str, Tensor]]
    few: dict[str, int]  # of its configuration, when tiny
    small: dict[str, Any]  # of its workload


WAN = Family(
    "wan",
    WanConditioner,
    WanTrunk,
    "WanTransformer3DModel",
    wan_weights.diffusers_state_dict,
    few={"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "text_dim": 16},
    small={"latent": (16, 2, 4, 8), "tokens": 16},
)
FLUX = Family(
    "flux",
    FluxConditioner,
    FluxTrunk,
    "FluxTransformer2DModel",
    flux_weights.diffusers_state_dict,
    few={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 16},
    small={"latent": (16, 8, 8), "tokens": 16, "text": 16},
)


def clip_of(latent: Sequence[int]) -> tuple[int, ...]:
    """A latent's size [C, F, h, w]; a picture's is one frame."""
    channels, *frames, height, width = latent
    return channels, *(frames or (1,)), height, width


def family(config: Any) -> Family:
    """A configuration's family."""
    return FLUX if isinstance(config, FluxConfig) else WAN


def halves(config: Any) -> tuple[nn.Module, nn.Module]:
    """A conditioner and a trunk on the meta device: shapes alone."""
    with torch.device("meta"):
        return family(config).conditioner(config), family(config).trunk(config)


def work_of(name: str, tiny: bool = False) -> Workload:
    """A named model at its released size; `wan-width`: four blocks of Wan 1.3B. Tiny: the same parts, few and narrow."""
    work = workload("wan-1.3b" if name == "wan-width" else name)
    if name == "wan-width":
        work = replace(work, config=replace(work.config, num_layers=4), latent=(16, 5, 16, 16), tokens=5 * 8 * 8)
    if tiny:
        kind = family(work.config)
        work = replace(work, config=replace(work.config, **kind.few), **kind.small)
    return work


@dataclass
class Model:
    """Both halves, a prompt, and one restoration to do with them; `transformer` is diffusers' module with the same weights."""

    config: Any
    conditioner: nn.Module
    trunk: nn.Module
    text: dict[str, Tensor]  # context, and pooled (FLUX)
    prompt: Prompt
    degraded: Tensor  # [B, C, F, H, W], as the noise
    noise: Tensor
    dtype: torch.dtype
    t0: float = T0
    transformer: nn.Module | None = None
    codec: Any = field(default=None, repr=False)

    @property
    def family(self) -> Family:
        return family(self.config)

    @property
    def device(self) -> torch.device:
        return self.degraded.device

    def backbone(self, trunk: nn.Module | None = None) -> Backbone:
        """The engine's backbone, with another form of the trunk where one is given."""
        given = self.conditioner, self.trunk if trunk is None else trunk, self.codec, self.text
        return Backbone(spec(self.family.name), *given, self.device, self.dtype)

    def bake(self, timesteps: Tensor, prompts: Sequence[Prompt] | None = None) -> Any:
        """The tables of a run at timesteps [S] with prompts (its own where none are given), on the trunk's device."""
        where = next(self.conditioner.parameters()).device
        prompts = [tuple(part.to(where) for part in prompt) for prompt in ([self.prompt] if prompts is None else prompts)]
        text = {name: value.to(where) for name, value in self.text.items()}
        with torch.no_grad():
            return replace(self.backbone(), text=text).bake(timesteps.to(where), prompts)

    def plan(self, table: StepTable, prompt: Prompt | None = None) -> Plan:
        """What the engine's runners take."""
        return Plan(table, [self.bake(self.timesteps(table), None if prompt is None else [prompt])])

    def timesteps(self, table: StepTable, released: bool = False) -> Tensor:
        """What the transformer is fed at a schedule's evaluations: 1000·t, or the released table's nearest entries."""
        return spec(self.family.name).released_timesteps(table.times) if released else torch.tensor(table.times[:-1]) * 1000

    @torch.no_grad()
    def every_row(self, tables: WanConditioning) -> WanConditioning:
        """Wan's tables with a key for every text row, equal or not."""
        key, value = self.conditioner.keys_values(self.conditioner.encode_text(self.text["context"][None]))
        every = {"text_key": key, "text_value": value, "text_log_count": torch.zeros(key.shape[3])}
        return replace(tables, **every).to(self.device, self.dtype)

    def released(self, transformer: Any, steps: int) -> Tensor:
        """The released algorithm's result over diffusers' module, or over what torch.compile made of it."""
        from benchmarks.released import released_flux, released_wan

        run = released_flux if self.family is FLUX else released_wan
        latents = self.plain(self.degraded), self.plain(self.noise)
        return run(transformer, *latents, **self.text, prompts=[self.prompt], steps=steps, t0=self.t0).view_as(self.degraded)

    def released_velocity(self, prompt: Prompt) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity (state, timestep [B]) of diffusers' module with a prompt, as released."""
        from benchmarks import released

        flux = self.family is FLUX
        (released.set_flux_prompts if flux else released.set_wan_prompts)(self.transformer, [prompt])
        velocity = (released.flux_velocity if flux else released.wan_velocity)(self.transformer, **self.text)
        return lambda state, timestep: velocity(self.plain(state), timestep).view_as(state)

    def plain(self, latent: Tensor) -> Tensor:
        """A latent as diffusers' module takes it: FLUX's has no frames."""
        return latent.squeeze(2) if self.family is FLUX else latent

    def add_transformer(self) -> "Model":
        """Add diffusers' module with the same weights, cast as its `from_pretrained` casts; returns itself."""
        import diffusers

        kind, config = getattr(diffusers, self.family.diffusers), self.config
        with torch.device("meta"):
            transformer = kind(**config.to_diffusers())
        kept = set(transformer._keep_in_fp32_modules or ())
        weights = self.family.state_dict(self.conditioner, self.trunk)
        dtypes = {name: torch.float32 if kept & set(name.split(".")) else self.dtype for name in weights}
        weights = {name: value.to(self.device, dtypes[name]) for name, value in weights.items()}
        transformer.load_state_dict(weights, assign=True)
        # What is no weight (positions) was made on the meta device too, and is made again where it is needed.
        few = {name: 1 for name in ("num_layers", "num_single_layers") if hasattr(config, name)}
        with self.device:
            fresh = kind(**replace(config, **few).to_diffusers())
        for name, buffer in fresh.named_buffers():
            owner, _, attribute = name.rpartition(".")
            setattr(transformer.get_submodule(owner), attribute, buffer)
        self.transformer = transformer.eval().requires_grad_(False)
        return self


def random_model(work: Workload, device: torch.device | str, dtype: torch.dtype) -> Model:
    """A model of a workload's sizes, its weights drawn on the device: nothing is downloaded, nothing is zero."""
    torch.manual_seed(SEED)
    config, device = work.config, torch.device(device)
    conditioner, trunk = halves(config)
    draw_weights(conditioner, device, dtype)
    draw_weights(trunk, device, dtype)
    flux = family(config) is FLUX
    if not flux:  # which is small and float32; FLUX's has 3.2 billion parameters, multiplied in float32 whatever they are
        conditioner.float()
    dim = config.joint_attention_dim if flux else config.text_dim
    context = torch.randn(1, dim, device=device).repeat(work.text, 1)
    context[0] = torch.randn(dim, device=device)  # the empty text: one token, then padding
    text = {"context": context}
    if flux:
        text["pooled"] = torch.randn(config.pooled_projection_dim, device=device)
    prompt = torch.randn(work.text, config.width, device=device) * 0.1, torch.randn(strengths(config), device=device) * 0.1
    channels, *frames, height, width = work.latent
    shape = (1, channels, *(frames or [1]), height, width)
    noise = draw_noise(shape, SEED, device)
    return Model(config, conditioner, trunk, text, prompt, torch.randn(shape, device=device), noise, dtype)


def strengths(config: Any) -> int:
    """Blocks that a prompt has a strength for."""
    return config.blocks if family(config) is FLUX else config.num_layers


def draw_weights(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device weights that keep the size of what passes; norms are near 1."""
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        centre = 1.0 if "norm" in name and parameter.dim() == 1 and not name.endswith("bias") else 0.0
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02
        value = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(0, scale).add_(centre)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def evaluation_flop(config: Any, latent: Sequence[int], tables: Any) -> int:
    """Operations of one run of the trunk on latents [B, C, F, H, W] with a step's tables."""
    return spec(family(config).name).flop(config, latent, tables)


def plan_flop(restorer: Any, plan: Plan, pixels: Sequence[int]) -> int:
    """Operations of all evaluations that a plan takes for pixels [B, 3, F, H, W] in one piece."""
    batch, _, frames, *sides = pixels
    codec, multiple = restorer.codec, restorer.backbone.multiple
    sides = [-(-side // multiple) * multiple // codec.spatial for side in sides]
    latent = (batch, codec.channels, (codec.frames(frames) - 1) // codec.temporal + 1, *sides)
    return sum(evaluation_flop(restorer.trunk.config, latent, tables[0]) for tables in plan.tables) * len(plan.table)
