"""What `test_parallel.py` runs in several processes: each check compares a trunk over several ranks with the same trunk whole.

`python -m tests.engine.parallel_checks FILE NAME...` is one process of a world that `torchrun`'s variables describe; the first
one writes what each check found.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.flux2.model import Flux2Conditioner
from ebr_engine.backbones.layers import quantize_trunk
from ebr_engine.backbones.sharding import WHOLE, Ulysses, exchanging
from ebr_engine.backbones.vae import load_codec
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanTrunk
from ebr_engine.bridge.sampler import make_table, trajectory
from tests.tiny import TINY_FLUX, TINY_FLUX2

WAN = WanConfig(num_attention_heads=4, attention_head_dim=12, text_dim=10, freq_dim=16, ffn_dim=40, num_layers=2)
FLUX, FLUX2 = (type(one)(**vars(one) | {"num_attention_heads": 4}) for one in (TINY_FLUX, TINY_FLUX2))
WAN_WIDE = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=1)
FLUX_WIDE = FluxConfig(num_layers=1, num_single_layers=1)
CONDITIONERS = {"wan": (WanConditioner, WanTrunk), "flux": (FluxConditioner, FluxTrunk), "flux2": (Flux2Conditioner, FluxTrunk)}
CONFIGS = {"wan": WAN, "flux": FLUX, "flux2": FLUX2}
LATENTS = {"wan": (2, 16, 1, 6, 10), "flux": (2, 16, 1, 6, 10), "flux2": (1, 16, 2, 3, 5)}  # 15 tokens, in a batch of two


def shaken(module, std=0.2):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.requires_grad_(False)


def made(name, config=None, std=0.2):
    """A trunk, and a function of prompts that gives the tables of two steps."""
    config = config or CONFIGS[name]
    conditioner, trunk = (shaken(kind(config), std) for kind in CONDITIONERS[name])
    text = {"context": torch.randn(7, getattr(config, "text_dim", 0) or config.joint_attention_dim)}
    if name == "flux":
        text["pooled"] = torch.randn(config.pooled_projection_dim)
    timesteps = torch.tensor([399.0, 150.0])
    return trunk, lambda prompts: conditioner.bake(trunk, timesteps, text, prompts)


def prompt_of(trunk, rows=5):
    return torch.randn(rows, trunk.config.width), torch.rand(trunk.config.blocks)


def error(one: Tensor, two: Tensor) -> float:
    """The difference's root mean square, relative."""
    return float((one - two).norm() / two.norm())


def compared(trunk, latent, step, ranks) -> float:
    """Of the velocity over several ranks, against one."""
    trunk.exchange = WHOLE
    whole = trunk(latent, step)
    trunk.exchange = ranks
    return error(trunk(latent, step), whole)


@torch.no_grad()
def trunks(ranks):
    found = {}
    for name in CONFIGS:
        trunk, bake = made(name)
        step = bake([prompt_of(trunk)])[0]
        latent = torch.randn(LATENTS[name])
        found[f"{name}, 15 tokens"] = compared(trunk, latent, step, ranks)
        found[f"{name}, 5 tokens"] = compared(trunk, latent[..., :2, :] if name == "wan" else latent[..., :2, :2], step, ranks)
        even = (1, latent.shape[1], 1, 4, 8)
        found[f"{name}, even"] = compared(trunk, torch.randn(even), bake([])[0], ranks)
        quantize_trunk(trunk)
        found[f"{name}, fp8"] = compared(trunk, latent, step, ranks)
    return found


@torch.no_grad()
def wide(ranks):
    found = {}
    for name, config, shape in (("wan", WAN_WIDE, (1, 16, 1, 10, 14)), ("flux", FLUX_WIDE, (1, 16, 1, 10, 14))):
        trunk, bake = made(name, config, 0.02)
        found[name] = compared(trunk, torch.randn(shape), bake([prompt_of(trunk)])[0], ranks)
    return found


def gradients(ranks):
    """Of a prompt through both steps of an unrolled run: the mean over the ranks is that of one."""
    found = {}
    for name in CONFIGS:
        trunk, bake = made(name)
        latent, noise = torch.randn(2, *LATENTS[name]).unbind()
        prompt = [part.requires_grad_() for part in prompt_of(trunk)]
        table = make_table("fast", 0.4, 2)
        grads = []
        for exchange in (WHOLE, ranks):
            trunk.exchange = exchange
            trajectory(trunk, bake([prompt]), latent, noise, table).square().mean().backward()
            grads.append([part.grad.clone() for part in prompt])
            for part in prompt:
                part.grad = None
        for part, whole, mine in zip(("rows", "strengths"), *grads):
            distributed.all_reduce(mine, group=GROUPS[ranks.size])
            found[f"{name}, {part}"] = error(mine / ranks.size, whole)
    return found


class Counted(TorchDispatchMode):
    """Adds up the bytes that this rank sends to others."""

    def __init__(self, size):
        super().__init__()
        self.size, self.bytes, self.messages = size, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "all_to_all_single" in name:  # what stays is not sent
            self.bytes += args[0].nbytes * (self.size - 1) // self.size
            self.messages += 1
        elif "all_gather_into_tensor" in name:
            self.bytes += args[0].nbytes * (self.size - 1)
            self.messages += 1
        return function(*args, **kwargs or {})


@torch.no_grad()
def sent(ranks):
    """Bytes and messages of a step."""
    found = {}
    for name in CONFIGS:
        trunk, bake = made(name)
        trunk.exchange, step = ranks, bake([])[0]
        with Counted(ranks.size) as counted:
            trunk(torch.randn(LATENTS[name]), step)
        found[name] = [counted.bytes, counted.messages]
    return found


def compiled(ranks, backend="aot_eager", names=tuple(CONFIGS)):
    """One graph, without breaks, and the gradients through it."""
    found = {}
    for name in names:
        torch.compiler.reset()
        trunk, bake = made(name)
        trunk.exchange, latent = ranks, torch.randn(LATENTS[name])
        plan = bake([prompt_of(trunk)])
        trunk.prepare(latent, plan[0])
        graph = torch.compile(trunk, fullgraph=True, dynamic=False, backend=backend)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            found[name] = max(error(graph(latent, plan[i]), trunk(latent, plan[i])) for i in range(2))
        grads = []
        for run in (trunk, graph):
            leaf = latent.clone().requires_grad_()
            run(leaf, plan[0]).square().sum().backward()
            grads.append(leaf.grad)
        found[f"{name}, gradient"] = error(*grads)
    return found


def inductor(ranks):
    return compiled(ranks, "inductor", ("wan", "flux"))


@torch.no_grad()
def codecs(ranks):
    """Tiles over the ranks: of more tiles than ranks, and of fewer."""
    import diffusers

    small = {"block_out_channels": [4, 4, 8, 8], "latent_channels": 16, "norm_num_groups": 2}
    small |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    flux = diffusers.AutoencoderKL(**small, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4)
    wan = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    found = {}
    for name, vae, frames in (("flux", flux, 1), ("wan", wan, 5)):
        with tempfile.TemporaryDirectory() as folder:
            vae.save_pretrained(folder)
            codec = load_codec(name, folder, tile=64, overlap=32)
        for width in (96, 192):  # two tiles, six
            pixels = torch.rand(1, 3, frames, 64 if width == 96 else 96, width)
            latent = codec.encode(pixels)
            whole = codec.decode(latent)
            with exchanging(codec, ranks):
                found[f"{name}, encode, {width}"] = error(codec.encode(pixels), latent)
                found[f"{name}, decode, {width}"] = error(codec.decode(latent), whole)
    return found


CHECKS = {one.__name__: one for one in (trunks, wide, gradients, sent, compiled, inductor, codecs)}
GROUPS = {}


def main(file: str, *names: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    found = {}
    for size in (2, 4):
        if size > world:
            continue
        pairs = [distributed.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        GROUPS[size] = pairs[rank // size]
        ranks = Ulysses(rank % size, size, GROUPS[size].group_name)
        for name in names:
            torch.manual_seed(7)
            found[f"{name}, {size}"] = CHECKS[name](ranks)
    if rank == 0:
        Path(file).write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
