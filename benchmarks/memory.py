"""`python -m benchmarks.memory restoring|learning|gpu`: the memory model against measured peaks; learning and checks on paper.

*restoring*: every setting is a process of its own. Measured is how far its resident memory rose at most above what it was with
the libraries imported and nothing loaded, so weights count, with a limit set that everything fits into; predicted is what
`engine.memory.peak` computes. `mini` runs as it is; Wan at a middle size with random weights: the architecture at width 512
with 8 blocks, and a VAE of a third of the channels.

*learning*: memory of a step of prompt learning on the real models, on paper: nothing is computed, every tensor is a shape.
Weights: trunk in bf16, conditioner in bf16 (FLUX) or float32 (Wan). Activations: every tensor that autograd keeps for the
backward pass of the frozen trunk with its operations as they are registered (a GPU), counted once however often it is kept, at
the real sizes; Wan's first block keeps less than the others, because nothing before its prompt needs a gradient. With
checkpointed blocks only what enters the blocks and what lies between them is kept, and one block's while it is computed again.
The prompt's part is its five copies (value, gradient, two moments, average) and its rows in every block. The codec and the text
encoders are not counted: latents and the text are made before. What a block needs for a moment comes on top.

*gpu*: memory of every section of `benchmarks.gpu`, its own code over shapes; see `gpu_memory.py`.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import report
from benchmarks.models import FLUX, clip_of, family, random_model, strengths, work_of
from benchmarks.report import ROOT, Benchmark, columns
from benchmarks.roofline import WAN_DISTINCT, Workload
from ebr_engine.backbones.flux.conditioning import FluxStep
from ebr_engine.backbones.flux.model import DOUBLE_MODULATIONS, SINGLE_MODULATIONS
from ebr_engine.backbones.wan.model import MODULATIONS, WanStep
from ebr_engine.kernels import backend
from ebr_engine.training.learner import blocks_of

MEASURE = "import sys; from benchmarks.memory import measure; measure(sys.argv[1])"
MODELS = ("wan-1.3b", "flux-dev")
COPIES = 5  # of prompt and α: value, gradient, two moments, average


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the two."""
    report.main("memory", __doc__, BENCHMARKS, arguments)


# Restoring


@dataclass(frozen=True)
class Case:
    """A backbone, in a precision, on pictures or a clip of one size; tile as `Restorer.run` takes it, 0 for none."""

    name: str
    backbone: str
    frames: int
    height: int
    width: int
    precision: str = "fp32"
    tile: int = 0
    blend: str = "latent"


CASES = (
    Case("mini, one piece", "mini", 1, 640, 640),
    Case("mini, one piece, bf16", "mini", 1, 640, 640, "bf16"),
    Case("mini, tiles", "mini", 1, 1024, 1024, tile=256),
    Case("mini, tiles in pixels", "mini", 1, 1280, 1280, tile=256, blend="pixel"),
    Case("mini, 4 frames", "mini", 4, 384, 384),
    Case("wan, 5 frames", "wan", 5, 256, 320),
    Case("wan, 9 frames in tiles", "wan", 9, 256, 384, tile=192),
)


def restorer_of(case: Case) -> Any:
    """The backbone of a case, loaded."""
    from ebr_engine import Restorer

    if case.backbone == "mini":
        return Restorer("mini", precision=case.precision, device="cpu", max_memory="1T")
    from ebr_engine.backbones.wan.codec import WanCodec
    from ebr_engine.backbones.wan.vae import WanVae, WanVaeConfig
    from ebr_engine.engine.fallback import Fitting
    from ebr_engine.engine.run import Engine

    work = work_of("wan-1.3b")
    work = replace(work, config=replace(work.config, num_attention_heads=4, num_layers=8, ffn_dim=2048), latent=(16, 1, 8, 8))
    model = random_model(work, "cpu", torch.float32)
    model.codec = WanCodec(WanVae(WanVaeConfig(base_dim=32)))
    return Restorer.from_backbone(Engine(model.backbone(), model.device, "none", "off", Fitting(2**40)))


def measure(case: str) -> None:
    """Run a case in this process and print predicted and measured bytes as JSON."""
    case = Case(**json.loads(case))
    warm = torch.nn.Linear(64, 64)
    warm(torch.rand(512, 64))
    Path("/proc/self/clear_refs").write_text("5")  # begins to look for the peak anew
    before = _status("VmRSS")
    from ebr_engine.engine.memory import peak

    restorer = restorer_of(case)
    plan = restorer.plan("haze", steps=2) if case.backbone == "mini" else restorer.plan(t0=0.4, steps=2)
    pixels = torch.rand(1, 3, case.frames, case.height, case.width)
    restorer.run(pixels, plan, tile=case.tile, tile_blend=case.blend)
    ways, work = restorer.engine.fallbacks(pixels.shape, case.tile, None, case.blend)
    print(json.dumps({"predicted": peak(restorer.engine.costs, ways[0], work), "measured": _status("VmHWM") - before}))


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def restoring(_: Namespace) -> dict[str, Any]:
    """The memory model of restoring against measured peaks on a CPU."""
    return {"cases": [run(case) for case in CASES]}


def run(case: Case) -> dict[str, Any]:
    """Predicted and measured bytes of a case, from a process of its own."""
    command = [sys.executable, "-c", MEASURE, json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**asdict(case), **found, "ratio": found["predicted"] / found["measured"]}


def restoring_table(result: dict[str, Any]) -> str:
    """What a person reads."""
    rows = [
        (
            case["name"],
            f"{case['frames']} x {case['height']} x {case['width']}",
            *(f"{case[name] / 1e6:.0f}" for name in ("predicted", "measured")),
            f"{case['ratio']:.2f}",
        )
        for case in result["cases"]
    ]
    return columns(("setting", "pixels", "predicted MB", "measured MB", "ratio"), rows)


# Learning


@dataclass(frozen=True)
class Memory:
    """Bytes of a step, by what they are for."""

    weights: int
    prompt: int
    between: int  # activations that enter the blocks or lie between them
    blocks: int  # those inside all blocks
    block: int  # and inside the largest one

    @property
    def kept(self) -> int:
        """With all activations kept."""
        return self.weights + self.prompt + self.between + self.blocks

    @property
    def checkpointed(self) -> int:
        """With checkpointed blocks."""
        return self.weights + self.prompt + self.between + self.block


def wan_tables(work: Workload, batch: int, rows: Callable[..., Tensor]) -> tuple[WanStep, list[Tensor]]:
    """The tables of a step of Wan, and those of them that come from the prompt; `rows(*shape)` makes them."""
    config = work.config
    blocks, heads, head, width = config.num_layers, config.num_attention_heads, config.attention_head_dim, config.width
    text = torch.empty(blocks, 1, heads, WAN_DISTINCT, head, dtype=torch.bfloat16)
    live = [rows(blocks, 1, heads, work.text, head) for _ in range(2)]
    weight = torch.empty(blocks, 1, requires_grad=True)
    modulations = torch.empty(batch, blocks, MODULATIONS, width), torch.empty(batch, 2, width)
    return WanStep(*modulations, text, text.clone(), torch.empty(WAN_DISTINCT), *live, weight), live


def flux_tables(work: Workload, batch: int, rows: Callable[..., Tensor]) -> tuple[FluxStep, list[Tensor]]:
    """The same of FLUX."""
    config = work.config
    doubles, singles, width = config.num_layers, config.num_single_layers, config.width
    live = [rows(count, work.text, 3 * width) for count in (doubles, singles)]
    text = torch.empty(work.text, width, dtype=torch.bfloat16)
    double = torch.empty(batch, doubles, 2, DOUBLE_MODULATIONS, width)
    return FluxStep(
        double, torch.empty(batch, singles, SINGLE_MODULATIONS, width), torch.empty(batch, 2, width), text, *live
    ), live


class Kept:
    """What autograd keeps of a trunk's run, by storage: between the blocks, and inside each."""

    def __init__(self, trunk: torch.nn.Module):
        self.frozen = {parameter.untyped_storage()._cdata for parameter in trunk.parameters()}
        self.between: dict[int, int] = {}
        self.inside: list[dict[int, int]] = []
        self.where, self.alive = self.between, []
        for block in blocks_of(trunk):
            block.register_forward_pre_hook(self.enter)
            block.register_forward_hook(self.leave)

    def enter(self, _: torch.nn.Module, inputs: Any) -> None:
        """A block begins: what enters it is kept when it is checkpointed."""
        self.where = self.between
        for tensor in torch.utils._pytree.tree_leaves(inputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self.keep(tensor)
        self.inside.append({})
        self.where = self.inside[-1]

    def leave(self, *_: Any) -> None:
        """A block ends."""
        self.where = self.between

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage where it is first kept."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.frozen and storage._cdata not in self.between:
            self.where[storage._cdata] = storage.nbytes()
        self.alive.append(tensor)  # or another one might get its address
        return tensor


def in_bf16(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A module made in bf16: shapes alone cannot be converted afterwards."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def learning_memory(work: Workload, batch: int = 1) -> Memory:
    """The memory of a step for a batch of a workload."""
    config, kind = work.config, family(work.config)
    flux = kind is FLUX

    def rows(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

    with FakeTensorMode(), patch.object(backend, "FORCED", True):
        conditioner = kind.conditioner(config)
        trunk = in_bf16(lambda: kind.trunk(config)).requires_grad_(False)
        step, live = (flux_tables if flux else wan_tables)(work, batch, rows)
        kept = Kept(trunk)
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            trunk(torch.empty(batch, *clip_of(work.latent)), step)
        prompted = sum(table.nbytes for table in live)
        tables = {table.untyped_storage()._cdata for table in (*step, *live)}
        between, *inside = (
            sum(size for storage, size in part.items() if storage not in tables) for part in (kept.between, *kept.inside)
        )
        sizes = [sum(parameter.numel() for parameter in half.parameters()) for half in (conditioner, trunk)]
    weights = (2 if flux else 4) * sizes[0] + 2 * sizes[1]
    # Rows and their gradients; Wan's keys and values are kept before their norm too, in float32, with the text's frozen part.
    prompt = COPIES * 4 * (work.text * config.width + strengths(config)) + prompted * (2 if flux else 6)
    return Memory(weights, prompt, between, sum(inside), max(inside))


def learning(_: Namespace) -> dict[str, Any]:
    """What a step of learning takes with both real models at their published sizes, on paper."""
    works = [work_of(name) for name in MODELS]
    found = [(work, learning_memory(work)) for work in works]
    extra = [asdict(memory) | {"kept": memory.kept, "checkpointed": memory.checkpointed} for _, memory in found]
    return {"models": [{"model": work.backbone, "size": work.description, **bytes} for (work, _), bytes in zip(found, extra)]}


def learning_table(result: dict[str, Any]) -> str:
    """What a person reads, in GB."""
    parts = {"between": "between blocks", "block": "in a block", "blocks": "in all", "kept": "all kept"}
    parts = {"weights": "weights", "prompt": "prompt", **parts, "checkpointed": "checkpointed"}
    rows = [[row["model"], row["size"], *(f"{row[part] / 1e9:.1f}" for part in parts)] for row in result["models"]]
    return "GB on paper, one sample a step, bf16:\n\n" + columns(["model", "size", *parts.values()], rows)


def checks(_: Namespace) -> dict[str, Any]:
    """What each section of the GPU check takes at its worst moment, on paper."""
    from benchmarks import gpu_memory

    sections = [name for name in gpu_memory.SECTIONS if name not in gpu_memory.NOT_COUNTED]
    peaks = {name: gpu_memory.peak(name) for name in sections}
    return {"card": gpu_memory.CARD, "margin": gpu_memory.MARGIN, "peaks": peaks}


def checks_table(result: dict[str, Any]) -> str:
    """What a person reads, in GB."""
    rows = [(name, f"{size / 1e9:.1f}") for name, size in result["peaks"].items()]
    fits = max(result["peaks"].values()) + result["margin"] <= result["card"]
    words = (
        f"{'all fit' if fits else 'NOT all fit'} into {result['card'] / 1e9:.0f} GB with {result['margin'] / 1e9:.0f} GB to spare"
    )
    return f"{columns(('section', 'GB on paper'), rows)}\n\n{words}"


def no_options(_: ArgumentParser) -> None:
    """There are none."""


BENCHMARKS = {
    "restoring": Benchmark(no_options, restoring, restoring_table),
    "learning": Benchmark(no_options, learning, learning_table),
    "gpu": Benchmark(no_options, checks, checks_table),
}

if __name__ == "__main__":
    main()
