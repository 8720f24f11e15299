"""`python -m benchmarks.full_size`: the real models' sizes with random weights, from a folder on disk to a restored file.

Writes a model in the published layout (random, never zeros), restores a clip (Wan 2.1 1.3B, all 30 blocks) or a picture (FLUX's
widths, 2 + 2 of its 19 + 38 blocks) with the command line, builds an engine file and restores with that. Every command is a
process of its own: its seconds and its peak memory are told, and how long loading takes either way.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import ROOT, columns, provenance, told, write_json

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=("wan", "flux"), action="append", help="one of them only; may be repeated")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to keep the models (6 GB); a temporary folder otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    parser.add_argument("--brief", action="store_true", help="only restore from the checkpoint")
    parser.add_argument("--small", action="store_true", help="a hundredth of the sizes, to try the benchmark itself")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        base = options.folder or Path(temporary)
        results = [measure(backbone, base / backbone, options) for backbone in options.backbone or ("wan", "flux")]
    result = {"steps": options.steps, "small": options.small, "models": results, **provenance()}
    print(table(result))
    if options.json:
        write_json(options.json, result)


def measure(backbone: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write a model, restore with it and with its engine file, and time loading both ways."""
    sizes = write_model(backbone, folder, options.small)
    source = folder / ("in.mkv" if backbone == "wan" else "in.png")
    model = ["--backbone", backbone, "--model", str(folder), "--context", str(folder / "context.safetensors")]
    how = ["--device", options.device, "--prompt", str(folder / "prompt.pt"), "--steps", str(options.steps)]
    out = ["--overwrite", "-o", str(source.with_stem("out"))]
    encoder = ["--codec", "ffv1"] if backbone == "wan" else []
    engine, start = folder / "engine.ebr", ["--engine", str(folder / "engine.ebr"), "--device", options.device]
    runs = {"restore": run(["restore", str(source), *out, *model, *how, *encoder])}
    if options.brief:
        return {"backbone": backbone, "sizes": sizes, "commands": runs, "seconds": {}}
    runs["build"] = run(["build", *model, *how, "--overwrite", "-o", str(engine)])
    runs["restore from engine"] = run(["restore", str(source), *out, *start, *encoder])
    checkpoint = load(backbone, folder, str(folder / "context.safetensors"), options.device)
    mapped = load("engine", engine, "", options.device)
    times = {
        "importing torch and diffusers": [imported for imported, _, _ in (*checkpoint, *mapped)],
        "loading the checkpoint": [loaded for _, loaded, _ in checkpoint],
        "loading the engine file": [loaded for _, loaded, _ in mapped],
        "another prompt": [swapped for _, _, swapped in checkpoint],
    }
    return {"backbone": backbone, "sizes": sizes, "commands": runs, "seconds": times}


def run(arguments: list[str]) -> dict[str, float]:
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

    from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
    from ebr_engine.backbones.flux.weights import diffusers_state_dict as flux_state
    from ebr_engine.backbones.registry import named_config
    from ebr_engine.backbones.text import save_context
    from ebr_engine.backbones.wan.model import WanConditioner, WanTrunk
    from ebr_engine.backbones.wan.weights import diffusers_state_dict as wan_state

    torch.manual_seed(0)
    wan = backbone == "wan"
    config = named_config("wan-1.3b") if wan else replace(named_config("flux-dev"), num_layers=2, num_single_layers=2)
    if small:
        config = replace(config, num_attention_heads=1, **({"num_layers": 3, "ffn_dim": 256} if wan else {}))
    with torch.device("meta"):
        halves = (WanConditioner(config), WanTrunk(config)) if wan else (FluxConditioner(config), FluxTrunk(config))
        shapes = (wan_state if wan else flux_state)(*halves)
    write_shards(folder / "transformer", shapes, config.to_diffusers() | {"_class_name": CLASSES[backbone]})
    write_vae(backbone, folder / "vae", small)
    rows, dim = (226, config.text_dim) if wan else (512, config.joint_attention_dim)
    text = {"context": torch.randn(1, dim).repeat(rows, 1)}
    text["context"][0] = torch.randn(dim)
    text |= {} if wan else {"pooled": torch.randn(config.pooled_projection_dim)}
    save_context(folder / "context.safetensors", backbone, "random", text)
    blocks = config.num_layers if wan else config.blocks
    bank = {"prompts": torch.randn(1, rows, config.width) * 0.1}
    released = {"backend": backbone, "deep_prompt_bank": bank, "alphas": [torch.tensor(0.1)] * blocks}
    torch.save(released, folder / "prompt.pt")
    frames, height, width = (9, 128, 208) if wan else (1, 256, 256)
    write_input(folder, frames, height, width)
    count = [sum(p.numel() for p in half.parameters()) for half in halves]
    return {
        "input": [frames, height, width],
        "blocks": blocks,
        "conditioner_parameters": count[0],
        "trunk_parameters": count[1],
        "checkpoint_bytes": sum(file.stat().st_size for file in (folder / "transformer").iterdir()),
    }


CLASSES = {"wan": "WanTransformer3DModel", "flux": "FluxTransformer2DModel"}


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

    from ebr_engine.media.images import Picture, write_image
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
    return "\n".join([columns(("command", "time", "peak memory"), rows), "", *told(result)])


if __name__ == "__main__":
    main()
