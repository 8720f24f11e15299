"""The GPU check's sections on whole models with random weights: a step of the transformer, a restoration, a step of learning."""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_clock import Run, captured, ceilings, milliseconds, relative_rms
from benchmarks.roofline import FLUX_TEXT, WAN_TEXT, Workload, analyse, workload
from benchmarks.training_memory import learning_memory
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.flux.model import FluxConditioner, FluxConfig, FluxTrunk
from ebr_engine.backbones.layers import quantize_trunk
from ebr_engine.backbones.wan.model import WanConditioner, WanTrunk
from ebr_engine.bridge.sampler import draw_noise, make_table, sample
from ebr_engine.kernels import backend
from ebr_engine.training.learner import checkpoint_blocks
from ebr_engine.training.live import live_conditioner

T0 = 0.4
BLOCKS = ("blocks", "double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks")  # ours, diffusers'
RECOMPILES = 64  # a block that is compiled anew for each of its fellows should be seen as slow, not fall back unseen


@dataclass
class Model:
    """Both halves with random weights, a prompt, and a latent; `transformer` is diffusers' module with the same weights."""

    work: Workload
    conditioner: nn.Module
    trunk: nn.Module
    text: dict[str, Tensor]
    prompt: tuple[Tensor, Tensor]
    degraded: Tensor
    transformer: nn.Module | None = None

    @property
    def flux(self) -> bool:
        return isinstance(self.work.config, FluxConfig)

    def bake(self, timesteps: Tensor, prompts: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Tables for timesteps [S], differentiable in the prompts."""
        if self.flux:
            tables = self.conditioner.bake(self.trunk, timesteps, self.text["context"], self.text["pooled"], prompts)
        else:
            tables = self.conditioner(timesteps, self.text["context"], prompts)
        return tables.to(self.degraded.device, torch.bfloat16)


def tiny(work: Workload) -> Workload:
    """The same parts, narrow and few, for a small latent."""
    config = work.config
    if isinstance(config, FluxConfig):
        few = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 16}
        return replace(work, config=replace(config, **few), latent=(16, 8, 8), tokens=16)
    few = {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "text_dim": 16}
    return replace(work, config=replace(config, **few), latent=(16, 2, 4, 8), tokens=16)


def random_model(run: Run, name: str) -> Model:
    """A model of a configuration's sizes, its weights drawn on the device: nothing is downloaded, nothing is zero."""
    torch.manual_seed(0)
    work = tiny(workload(name)) if run.tiny else workload(name)
    config, flux = work.config, isinstance(work.config, FluxConfig)
    with torch.device("meta"):
        conditioner = (FluxConditioner if flux else WanConditioner)(config)
        trunk = (FluxTrunk if flux else WanTrunk)(config)
    # Wan's conditioner is small and float32; FLUX's has 3.2 billion parameters, which it multiplies in float32 whatever they are.
    drawn(conditioner, run.device, torch.bfloat16 if flux else torch.float32)
    drawn(trunk, run.device, torch.bfloat16)
    rows, dim = (FLUX_TEXT, config.joint_attention_dim) if flux else (WAN_TEXT, config.text_dim)
    rows = 16 if run.tiny else rows
    context = torch.randn(1, dim, device=run.device).repeat(rows, 1)
    context[0] = torch.randn(dim, device=run.device)  # the empty text: one token, then padding
    text = {"context": context}
    if flux:
        text["pooled"] = torch.randn(config.pooled_projection_dim, device=run.device)
    blocks = config.blocks if flux else config.num_layers
    prompt = torch.randn(rows, config.width, device=run.device) * 0.1, torch.full((blocks,), 0.1, device=run.device)
    degraded = torch.randn(1, *work.latent, device=run.device)
    return Model(work, conditioner, trunk, text, prompt, degraded)


def drawn(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device weights that keep the size of what passes; norms are near 1."""
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        centre = 1.0 if "norm" in name and parameter.dim() == 1 and not name.endswith("bias") else 0.0
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02
        value = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(0, scale).add_(centre)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def with_diffusers(run: Run, model: Model) -> None:
    """Add diffusers' module with the same weights."""
    import diffusers

    from ebr_engine.backbones.flux import weights as flux_weights
    from ebr_engine.backbones.wan import weights as wan_weights

    weights = (flux_weights if model.flux else wan_weights).diffusers_state_dict(model.conditioner, model.trunk)
    kind = diffusers.FluxTransformer2DModel if model.flux else diffusers.WanTransformer3DModel
    with torch.device("meta"):
        transformer = kind(**model.work.config.to_diffusers())
    kept = set(transformer._keep_in_fp32_modules or ())
    weights = {k: v.to(torch.float32 if kept & set(k.split(".")) else torch.bfloat16) for k, v in weights.items()}
    transformer.load_state_dict(weights, assign=True)
    # What is no weight (positions) was made on the meta device too, and is made again where it is needed.
    few = {name: 1 for name in ("num_layers", "num_single_layers") if hasattr(model.work.config, name)}
    with run.device:
        fresh = kind(**replace(model.work.config, **few).to_diffusers())
    for name, buffer in fresh.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(transformer.get_submodule(owner), attribute, buffer)
    model.transformer = transformer.eval().requires_grad_(False)


def compile_blocks(module: nn.Module, tiny: bool) -> None:
    """Compile the blocks in place, one graph for all of a kind: the whole in one graph takes minutes to compile."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    for name in BLOCKS:
        for block in getattr(module, name, ()):
            block.compile(fullgraph=True, dynamic=False, backend="eager" if tiny else "inductor")


def steps(run: Run, name: str) -> None:
    """A step of the transformer and whole restorations: ours in every form, and the released way over diffusers' modules."""
    best = ceilings(run)
    model = random_model(run, name)
    floors = analyse(model.work, best)["totals"]
    state, tables = model.degraded, model.bake(torch.tensor([400.0], device=run.device), [model.prompt])
    first: list[Tensor] = []
    times: list[float] = []

    def measure(form: str, precision: str, function: Callable[[], Tensor], evaluations: int = 0) -> None:
        """A row: a step (`evaluations` 0) or a restoration."""
        with run.guarded(model=name, form=form, precision=precision), torch.no_grad():
            result = function().float()
            if not evaluations:
                first.append(result.clone())  # a graph's result is rewritten
            found = milliseconds(function, run.device)
            row = {"ms": found["median"], "quartiles": found["quartiles"]}
            count = max(evaluations, 1)
            if precision in floors["floor"]:
                flop, floor = floors["plain_flop" if precision == "plain" else "flop"], floors["floor"][precision] * 1e3
                row |= {"TFLOP/s": count * flop / found["median"] / 1e9, "floor ms": count * floor}
                row["share"] = count * floor / found["median"]
            if not evaluations:
                times.append(found["median"])
                row |= {"x first": times[0] / times[-1], "RMS from first": relative_rms(result, first[0])}
            run.add(model=name, form=form, precision=precision, **row)

    released_forms(run, model, name, measure)
    model.transformer = None
    free(run)
    step = lambda trunk: trunk(state, tables[0])  # noqa: E731
    measure("step, eager", "bf16", lambda: step(model.trunk))
    measure("step, eager, CUDA graph", "bf16", captured_later(lambda: step(model.trunk), run))
    narrow = fp8_copy(run, model, name)
    for trunk, precision in ((model.trunk, "bf16"), (narrow, "fp8")):
        if trunk is None:
            continue
        if precision == "fp8":
            measure("step, eager", "fp8", lambda trunk=trunk: step(trunk))
        if run.left(25, model=name, form="compiled", precision=precision):
            compile_blocks(trunk, run.tiny)
            measure("step, compiled blocks", precision, lambda trunk=trunk: step(trunk))
            graph = captured_later(lambda trunk=trunk: step(trunk), run)
            measure("step, compiled blocks, CUDA graph", precision, graph)
    noise = draw_noise(state.shape, 42, run.device)
    for schedule, trunk, precision in (("fast", model.trunk, "bf16"), ("fast", narrow, "fp8"), ("exact", model.trunk, "bf16")):
        if trunk is not None and run.left(10, model=name, form=f"restoration, {schedule}", precision=precision):
            table = make_table(schedule, T0)
            whole = model.bake(torch.tensor(table.times[:-1], device=run.device) * 1000, [model.prompt])
            form = f"restoration, {schedule}, {len(table)} evaluations"
            restored = partial(sample, trunk, whole, state, noise, table)
            measure(form, precision, restored, len(table))


def captured_later(function: Callable[[], Tensor], run: Run) -> Callable[[], Tensor]:
    """`function`, captured when it is first called: what fails then fails in its own row."""
    kept: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not kept:
            kept.append(captured(function, run.device))
        return kept[0]()

    return call


def fp8_copy(run: Run, model: Model, name: str) -> nn.Module | None:
    """The trunk with its large linear layers in e4m3; None if the device has no such products."""
    if not (run.tiny or backend.has_fp8(run.device)):
        run.add(model=name, form="fp8", error="left out: this device does not multiply e4m3")
        return None
    with run.guarded(model=name, form="fp8"):
        narrow = copy.deepcopy(model.trunk)
        quantize_trunk(narrow)
        return narrow
    return None


def released_forms(run: Run, model: Model, name: str, measure: Callable[..., None]) -> None:
    """The released algorithm's step, over diffusers' modules; left out without them."""
    if find_spec("diffusers") is None:
        run.add(model=name, form="diffusers", error="left out: diffusers is not installed")
        return
    with run.guarded(model=name, form="diffusers"):
        from benchmarks import released

        with_diffusers(run, model)
        transformer, timestep = model.transformer, torch.full((1,), 400.0, device=run.device)
        text = [value.to(torch.bfloat16) for value in model.text.values()]
        prompt = tuple(part.to(torch.bfloat16) for part in model.prompt)
        if model.flux:
            released.set_flux_prompts(transformer, [prompt])
            velocity = released.flux_velocity(transformer, *text)
        else:
            released.set_wan_prompts(transformer, [prompt])
            velocity = released.wan_velocity(transformer, *text)
        measure("diffusers, released, eager", "plain", lambda: velocity(model.degraded, timestep))
        if run.left(40, model=name, form="diffusers, released, compiled blocks"):
            compile_blocks(transformer, run.tiny)
            measure("diffusers, released, compiled blocks", "plain", lambda: velocity(model.degraded, timestep))


def free(run: Run) -> None:
    """Give memory of what is gone back, compiled code's references too."""
    torch.compiler.reset()
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def train(run: Run, name: str) -> None:
    """A step of prompt learning: time, times a forward pass, peak memory beside that on paper; blocks checkpointed if need be."""
    model = random_model(run, name)
    paper = learning_memory(model.work)
    for form in ("all activations kept", "checkpointed blocks"):
        if form == "checkpointed blocks":
            checkpoint_blocks(model.trunk)
        free(run)
        try:
            for row in learned(run, model):
                bytes_on_paper = paper.kept if form == "all activations kept" else paper.checkpointed
                run.add(model=name, form=form, **row, **{"paper GB": bytes_on_paper / 1e9})
            return
        except torch.OutOfMemoryError:
            run.add(model=name, form=form, error="does not fit into the device's memory")


def learned(run: Run, model: Model) -> Iterator[dict[str, Any]]:
    """The row of a step: live conditioner, trunk, velocity loss, backward, Adam on the prompt and its α."""
    halves, kind = (model.conditioner, model.trunk), "flux" if model.flux else "wan"
    parts = Backbone(kind, *halves, None, model.text, run.device, torch.bfloat16)
    live = live_conditioner(parts, len(model.prompt[0]))
    residual, alpha = (part.clone().requires_grad_() for part in model.prompt)
    optimizer = torch.optim.Adam([residual, alpha], lr=1e-3)
    target, timestep = torch.randn_like(model.degraded), torch.tensor([300.0], device=run.device)

    def step() -> Tensor:
        loss = (model.trunk(model.degraded, live(timestep, residual, alpha)) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    weights = residual.detach().clone()
    loss = step().item()
    if not torch.isfinite(torch.tensor(loss)) or torch.equal(weights, residual):
        raise AssertionError(f"the prompt did not move (loss {loss})")
    found, tables = milliseconds(step, run.device), model.bake(timestep, [model.prompt])[0]
    with torch.no_grad():
        forward = milliseconds(lambda: model.trunk(model.degraded, tables), run.device)["median"]
    row = {"ms": found["median"], "quartiles": found["quartiles"], "x forward": found["median"] / forward, "loss": loss}
    if run.device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated(run.device) / 1e9
    yield row
