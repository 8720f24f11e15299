"""Memory of a step of prompt learning on the real models, on paper: nothing is computed, every tensor is a shape.

Weights: trunk in bf16, conditioner in bf16 (FLUX) or float32 (Wan). Activations: every tensor that autograd keeps for the
backward pass of the frozen trunk with its operations as they are registered (a GPU), counted once however often it is kept, at
the real sizes; Wan's first block keeps less than the others, because nothing before its prompt needs a gradient. With
checkpointed blocks only what enters the blocks and what lies between them is kept, and one block's while it is computed again.
The prompt's part is its five copies (value, gradient, two moments, average) and its rows in every block. The codec and the text
encoders are not counted: latents and the text are made before. What a block needs for a moment comes on top.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.report import columns
from benchmarks.roofline import WAN_DISTINCT, WAN_TEXT, Workload, workload
from ebr_engine.backbones.flux.conditioning import FluxStep
from ebr_engine.backbones.flux.model import DOUBLE_MODULATIONS, SINGLE_MODULATIONS, FluxConditioner, FluxConfig, FluxTrunk
from ebr_engine.backbones.wan.model import MODULATIONS, WanConditioner, WanStep, WanTrunk
from ebr_engine.kernels import backend
from ebr_engine.training.learner import blocks_of

CASES = (("wan-1.3b", "Wan 2.1 1.3B"), ("flux-dev", "FLUX.1-dev"))
COPIES = 5  # of prompt and α: value, gradient, two moments, average


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
    live = [rows(blocks, 1, heads, WAN_TEXT, head) for _ in range(2)]
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
    config, flux = work.config, isinstance(work.config, FluxConfig)

    def rows(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

    with FakeTensorMode(), patch.object(backend, "FORCED", True):
        conditioner = (FluxConditioner if flux else WanConditioner)(config)
        trunk = in_bf16(lambda: (FluxTrunk if flux else WanTrunk)(config)).requires_grad_(False)
        step, live = (flux_tables if flux else wan_tables)(work, batch, rows)
        kept = Kept(trunk)
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            trunk(torch.empty(batch, *work.latent), step)
        prompted = sum(table.nbytes for table in live)
        tables = {table.untyped_storage()._cdata for table in (*step, *live)}
        between, *inside = (
            sum(size for storage, size in part.items() if storage not in tables) for part in (kept.between, *kept.inside)
        )
        sizes = [sum(parameter.numel() for parameter in half.parameters()) for half in (conditioner, trunk)]
    weights = (2 if flux else 4) * sizes[0] + 2 * sizes[1]
    tokens, count = (work.text, config.blocks) if flux else (WAN_TEXT, config.num_layers)
    # Rows and their gradients; Wan's keys and values are kept before their norm too, in float32, with the text's frozen part.
    prompt = COPIES * 4 * (tokens * config.width + count) + prompted * (2 if flux else 6)
    return Memory(weights, prompt, between, sum(inside), max(inside))


def memory_table() -> str:
    """The memory of both real models at their published sizes, in GB."""
    header = ["model", "size", "weights", "prompt", "between blocks", "in a block", "in all", "all kept", "checkpointed"]
    rows = []
    for name, title in CASES:
        work = workload(name)
        found = learning_memory(work)
        numbers = (found.weights, found.prompt, found.between, found.block, found.blocks, found.kept, found.checkpointed)
        rows.append([title, work.description, *(f"{number / 1e9:.1f}" for number in numbers)])
    return "GB on paper, one sample a step, bf16:\n\n" + columns(header, rows)
