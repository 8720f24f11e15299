"""`python -m benchmarks.speed full-size`: the real models' sizes with random weights, from a folder on disk to a restored file.

Writes a model in the published layout (random, never zeros), restores a clip (Wan 2.1 1.3B, all 30 blocks) or a picture (FLUX's
widths, 2 + 2 of its 19 + 38 blocks) with the command line, builds an engine file and restores with that. Every command is a
process of its own, with its seconds and its peak memory; and how long loading takes either way.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import ROOT, columns

COMMAND = [sys.executable, "-c", "from ebr_engine.cli import main; main()"]
SHARD = 2**30  # bytes
FLUX_VAE = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
LOADING = """
import sys, time
started = time.perf_counter()
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from ebr_engine import Restorer
imported = time.perf_counter()
kind, path, context, device = sys.argv[1:]
if kind == "engine":
    Restorer.from_engine(path, device=device)
    print(imported - started, time.perf_counter() - imported, 0)
else:
    restorer = Restorer(kind, model=path, context=context, device=device)
    restorer.plan(prompt=path + "/prompt.pt", steps=5)
    loaded = time.perf_counter()
    restorer.plan(prompt=path + "/prompt.pt", steps=5)
    print(imported - started, loaded - imported, time.perf_counter() - loaded)
"""


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--backbone", choices=("wan", "flux"), action="append", help="one of them only; may be repeated")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to keep the models (6 GB); a temporary folder otherwise")
    parser.add_argument("--brief", action="store_true", help="only restore from the checkpoint")
    parser.add_argument("--small", action="store_true", help="a hundredth of the sizes, to try the benchmark itself")


def measure(options: Namespace) -> dict[str, Any]:
    """Wan 1.3B, and FLUX with few blocks, with random weights: from a checkpoint on disk to a restored file."""
    with tempfile.TemporaryDirectory() as temporary:
        base = options.folder or Path(temporary)
        results = [measure_one(backbone, base / backbone, options) for backbone in options.backbone or ("wan", "flux")]
    return {"steps": options.steps, "small": options.small, "models": results}


def measure_one(backbone: str, folder: Path, options: Namespace) -> dict[str, Any]:
    """Write a model, restore with it and with its engine file, and time loading both ways."""
    sizes = write_model(backbone, folder, options.small)
    source = folder / ("in.mkv" if backbone == "wan" else "in.png")
    model = ["--backbone", backbone, "--model", str(folder), "--context", str(folder / "context.safetensors")]
    how = ["--device", options.device, "--prompt", str(folder / "prompt.pt"), "--steps", str(options.steps)]
    out = ["--overwrite", "-o", str(source.with_stem("out"))]
    encoder = ["--codec", "ffv1"] if backbone == "wan" else []
    engine, start = folder / "engine.ebr", ["--engine", str(folder / "engine.ebr"), "--device", options.device]
    runs = {"restore": command(["restore", str(source), *out, *model, *how, *encoder])}
    if options.brief:
        return {"backbone": backbone, "sizes": sizes, "commands": runs, "seconds": {}}
    runs["build"] = command(["build", *model, *how, "--overwrite", "-o", str(engine)])
    runs["restore from engine"] = command(["restore", str(source), *out, *start, *encoder])
    checkpoint = load(backbone, folder, str(folder / "context.safetensors"), options.device)
    mapped = load("engine", engine, "", options.device)
    times = {
        "importing torch and diffusers": [imported for imported, _, _ in (*checkpoint, *mapped)],
        "loading the checkpoint": [loaded for _, loaded, _ in checkpoint],
        "loading the engine file": [loaded for _, loaded, _ in mapped],
        "another prompt": [swapped for _, _, swapped in checkpoint],
    }
    return {"backbone": backbone, "sizes": sizes, "commands": runs, "seconds": times}


def command(arguments: list[str]) -> dict[str, float]:
    """Run the command in a process of its own: wall seconds, and its peak resident memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"ebr-engine {' '.join(arguments)} failed:\n{output}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * 1024}


def load(kind: str, path: Path, context: str, device: str) -> list[tuple[float, float, float]]:
    """Seconds of the imports, from a name to a baked plan, and to the plan of another prompt, in three fresh processes."""
    command = [sys.executable, "-c", LOADING, kind, str(path), context, device]
    outputs = [subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout for _ in range(3)]
    return [tuple(map(float, output.split())) for output in outputs]


def write_model(backbone: str, folder: Path, small: bool) -> dict[str, Any]:
    """A model of real size with random weights, a prompt, an empty text and an input; what it holds."""
    import torch

    from benchmarks.models import family, halves, strengths, work_of
    from ebr_engine.backbones.text import save_context

    torch.manual_seed(0)
    wan = backbone == "wan"
    work = work_of("wan-1.3b" if wan else "flux-dev")
    config = work.config if wan else replace(work.config, num_layers=2, num_single_layers=2)
    if small:
        config = replace(config, num_attention_heads=1, **({"num_layers": 3, "ffn_dim": 256} if wan else {}))
    both = halves(config)
    shapes = family(config).state_dict(*both)
    write_shards(folder / "transformer", shapes, config.to_diffusers() | {"_class_name": family(config).diffusers})
    write_vae(backbone, folder / "vae", small)
    dim = config.text_dim if wan else config.joint_attention_dim
    text = {"context": torch.randn(1, dim).repeat(work.text, 1)}
    text["context"][0] = torch.randn(dim)
    text |= {} if wan else {"pooled": torch.randn(config.pooled_projection_dim)}
    save_context(folder / "context.safetensors", backbone, "random", text)
    blocks = strengths(config)
    bank = {"prompts": torch.randn(1, work.text, config.width) * 0.1}
    torch.save({"backend": backbone, "deep_prompt_bank": bank, "alphas": [torch.tensor(0.1)] * blocks}, folder / "prompt.pt")
    frames, height, width = (9, 128, 208) if wan else (1, 256, 256)
    write_input(folder, frames, height, width)
    conditioner, trunk = (sum(p.numel() for p in half.parameters()) for half in both)
    return {
        "input": [frames, height, width],
        "blocks": blocks,
        "conditioner_parameters": conditioner,
        "trunk_parameters": trunk,
        "checkpoint_bytes": sum(file.stat().st_size for file in (folder / "transformer").iterdir()),
    }


def write_shards(folder: Path, shapes: dict[str, Any], config: dict) -> None:
    """Random bf16 weights in shards with their index: linear layers keep the size of what passes, norms are near 1."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    groups = list(shards(shapes))
    index = {}
    for i, names in enumerate(groups):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for name in names:
            shape = shapes[name].shape
            fan_in = shape[1:].numel() if len(shape) > 1 and "table" not in name else 2500
            centre = 1.0 if "norm" in name and len(shape) == 1 and name.endswith("weight") else 0.0
            tensors[name] = (torch.randn(shape, dtype=torch.bfloat16) * fan_in**-0.5 + centre).contiguous()
            index[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def shards(shapes: dict[str, Any]) -> Iterator[list[str]]:
    """Names in groups of about a gigabyte of bf16."""
    group, size = [], 0
    for name, tensor in shapes.items():
        if size > SHARD:
            yield group
            group, size = [], 0
        group.append(name)
        size += 2 * tensor.numel()
    yield group


def write_vae(backbone: str, folder: Path, small: bool) -> None:
    """The published VAE's architecture, freshly initialised."""
    import diffusers

    if backbone == "wan":
        vae = diffusers.AutoencoderKLWan(**({"base_dim": 8} if small else {}))
    else:
        vae = diffusers.AutoencoderKL(**FLUX_VAE | ({"block_out_channels": (32,) * 4} if small else {}))
    vae.save_pretrained(folder)


def write_input(folder: Path, frames: int, height: int, width: int) -> None:
    """A smooth picture, or a clip of it moving."""
    import numpy as np

    from ebr_engine.media.images import write_image
    from ebr_engine.media.picture import Picture
    from ebr_engine.media.video import VideoInfo, write_video

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pictures = [
        np.stack([0.5 + 0.3 * np.sin((x + i) / 17 + channel) * np.cos(y / 13) for channel in range(3)], axis=2)
        for i in range(frames)
    ]
    if frames == 1:
        write_image(folder / "in.png", Picture(pictures[0].astype(np.float32)))
        return
    with write_video(folder / "in.mkv", VideoInfo(width, height, Fraction(24), Fraction(1, 24)), codec="ffv1") as writer:
        for picture in pictures:
            writer.write(picture.astype(np.float32))


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    rows = []
    for model in result["models"]:
        sizes, name = model["sizes"], model["backbone"]
        frames, height, width = sizes["input"]
        for command, figures in model["commands"].items():
            rows.append((f"{name} {command}", f"{figures['seconds']:.1f} s", f"{figures['peak_bytes'] / 1e9:.2f} GB"))
        rows += [(f"{name} {what}", f"{median(seconds):.2f} s", "") for what, seconds in model["seconds"].items()]
        rows.append((f"{name}: {frames} x {height} x {width}, {sizes['trunk_parameters'] / 1e6:.0f} M in the trunk", "", ""))
    return columns(("command", "time", "peak memory"), rows)
