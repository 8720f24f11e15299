"""Memory of a step of prompt learning on the real models, on paper.

Weights: trunk and conditioner in bf16 (Wan's conditioner float32). Activations: what autograd keeps for the backward pass of
frozen layers, that is the inputs of what is not linear, and not those of the linear layers, whose weights get no gradient.
Counted for the fused operations as they are registered (a GPU), in bytes of the stored dtype. With checkpointed blocks only
what enters each block is kept, and one block's activations while it is computed again. Prompt, α and their optimizer state
are counted too, and are nothing beside the rest. The codec and the text encoder are not: latents and the text are made before.
"""

from dataclasses import dataclass

from benchmarks.report import columns
from benchmarks.roofline import BF16, FLUX_TEXT, WAN_TEXT, Workload, workload
from ebr_engine.backbones.flux import MLP_RATIO, FluxConfig, FluxConditioner, FluxTrunk
from ebr_engine.backbones.wan import WanConditioner, WanTrunk

FP32 = 4
CASES = (("wan-1.3b", "Wan 2.1 1.3B"), ("flux-dev", "FLUX.1-dev"))


@dataclass(frozen=True)
class Memory:
    """Bytes of a step, by what they are for."""

    weights: int
    block: int  # activations that the largest block keeps
    blocks: int  # and all blocks
    entrances: int  # what enters the blocks: all that checkpointing keeps
    prompt: int  # prompt, gradient, two moments, average; its keys and values or rows and what their backward pass keeps

    @property
    def kept(self) -> int:
        """With all activations kept."""
        return self.weights + self.blocks + self.prompt

    @property
    def checkpointed(self) -> int:
        """With checkpointed blocks."""
        return self.weights + self.entrances + self.block + self.prompt


def wan_block(work: Workload) -> int:
    """Bytes that a block of Wan keeps.

    In residual streams (N·D of bf16) unless said otherwise: qkv before norm and rotation (3), q, k and v as attention takes
    them (3), its output (1), x and the branch of each of three residual norms (6), q of the cross-attention before its norm in
    float32 (2) and after (1), its output is linear's input (0); the feed-forward's hidden layer before GELU (ffn/D).
    """
    stream = BF16 * work.tokens * work.config.width
    sums = FP32 * work.tokens * work.config.num_attention_heads * 3  # log-sums: self-attention, text, prompt
    return stream * (3 + 3 + 1 + 6 + 3) + BF16 * work.tokens * work.config.ffn_dim + sums


def flux_blocks(work: Workload) -> tuple[int, int]:
    """Bytes that a double-stream and a single-stream block of FLUX keep.

    Double: qkv (3), joined q, k and v (3), output (1), two residual norms (4), hidden before GELU (4). Single: qkv (3), q, k
    and v (3), output (1), hidden before GELU (4), one residual norm (2).
    """
    tokens = work.tokens + work.text
    stream, sums = BF16 * tokens * work.config.width, FP32 * tokens * work.config.num_attention_heads
    return stream * (3 + 3 + 1 + 4 + MLP_RATIO) + sums, stream * (3 + 3 + 1 + 2 + MLP_RATIO) + sums


def parameters(work: Workload) -> tuple[int, int]:
    """Parameters of conditioner and trunk."""
    import torch

    flux = isinstance(work.config, FluxConfig)
    with torch.device("meta"):
        halves = (FluxConditioner, FluxTrunk) if flux else (WanConditioner, WanTrunk)
        return tuple(sum(p.numel() for p in half(work.config).parameters()) for half in halves)


def learning_memory(work: Workload, batch: int = 1) -> Memory:
    """The memory of a step for a batch of a workload."""
    config, (conditioner, trunk) = work.config, parameters(work)
    if isinstance(config, FluxConfig):
        double, single = flux_blocks(work)
        blocks, tokens, count = config.num_layers * double + config.num_single_layers * single, FLUX_TEXT, config.blocks
        largest, stream = double, BF16 * (work.tokens + work.text) * config.width
        # a stream and its unadded branch, and their norm, enter a block
        entrances = count * 3 * stream
        weights, rows = BF16 * (conditioner + trunk), BF16 * count * tokens * 4 * config.width
    else:
        largest, tokens, count = wan_block(work), WAN_TEXT, config.num_layers
        blocks, stream = count * largest, BF16 * work.tokens * config.width
        entrances = count * 2 * stream
        # keys and values, before and after their norm, and the frozen part of the product; the weights of K and V once more
        rows = count * tokens * 2 * config.width * (2 * FP32 + 2 * BF16) + BF16 * count * 2 * config.width**2
        weights = FP32 * conditioner + BF16 * trunk
    prompt = 5 * FP32 * (tokens * config.width + count) + rows
    return Memory(weights, batch * largest, batch * blocks, batch * entrances, prompt)


def memory_table() -> str:
    """The memory of both real models at their published sizes, in GB."""
    header = ["model", "size", "weights", "a block", "all blocks", "prompt", "all kept", "checkpointed"]
    rows = []
    for name, title in CASES:
        work = workload(name)
        found = learning_memory(work)
        numbers = (found.weights, found.block, found.blocks, found.prompt, found.kept, found.checkpointed)
        rows.append([title, work.description, *(f"{number / 1e9:.1f}" for number in numbers)])
    return "GB on paper, one sample a step, bf16:\n\n" + columns(header, rows)
