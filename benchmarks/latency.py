"""`python -m benchmarks.latency`: where the time goes when one photo or clip is restored, from process start to file written.

The command is timed from outside, as a person waits for it. Beside each such run, one more fresh process times its own
stages, by clocks around the engine's functions and the transformer; both are repeated, and medians and quartiles told. That
process also tells its peak memory, and how fast the machine multiplies large matrices in the same precision: the transformer
can be no faster, and its share of that rate is told. For several pictures in one run see `benchmarks.throughput`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.report import ROOT, plot_bars, provenance, spread, told, write_json

COMMAND = [sys.executable, "-c", "from ebr_engine.cli import main; main()"]
TASK = "haze"
STAGES = ("import torch", "import engine", "load weights", "read", "bake", "encode", "denoise", "decode", "write")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="mini", help="mini, wan or flux")
    parser.add_argument("--model", help="its weights: a folder, a file or a hub id")
    parser.add_argument("--context", help="its empty text, a file of ebr-engine cache-text")
    parser.add_argument("--task", default=TASK, help="the prompt to restore with")
    parser.add_argument("--size", type=int, default=512, help="side of the square photo in pixels")
    parser.add_argument("--frames", type=int, default=1, help="of a clip in place of the photo, restored in one chunk")
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind")
    parser.add_argument("--steps", type=int, help="runs of the transformer per picture (default: by schedule)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32", "fp8"))
    parser.add_argument("--compile", default="auto", choices=("auto", "off", "on"), help="as of ebr-engine restore")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the stages (PNG; needs matplotlib)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    parser.add_argument("--stages", type=Path, nargs=2, metavar=("IN", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.runs, options.frames) < 1 or options.size < 16:
        parser.error("--runs and --frames must be at least 1, --size at least 16")
    if options.stages:
        print(json.dumps(timed_stages(*options.stages, options)))
        return
    result = measure(options)
    print(table(result))
    if options.json:
        write_json(options.json, result)
    if options.plot:
        stages = {name: stage["median"] * 1e3 for name, stage in result["stages"].items()}
        plot_bars(options.plot, stages, title(result), "ms")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, alternating between the timed command and the process that times its stages."""
    settings = ["--backbone", options.backbone, "--task", options.task]
    settings += ["--device", options.device, "--precision", options.precision, "--compile", options.compile]
    for name in ("model", "context", "steps"):
        settings += [f"--{name}", str(value)] if (value := getattr(options, name)) else []
    clip = options.frames > 1
    whole, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        source, out = (Path(folder) / f"{name}.{'mp4' if clip else 'jpg'}" for name in ("in", "out"))
        write_source(source, options.size, options.frames)
        chunk = ["--chunk-frames", str(options.frames)] if clip else []
        for _ in range(options.runs):
            started = time.perf_counter()
            run([*COMMAND, "restore", str(source), "-o", str(out), "--overwrite", "--quiet", *chunk, *settings])
            whole.append(time.perf_counter() - started)
            stages = [sys.executable, "-m", "benchmarks.latency", "--stages", str(source), str(out), *settings]
            parts.append(json.loads(run(stages)))
    return summary(options, whole, parts)


def write_source(path: Path, size: int, frames: int) -> None:
    """A photo, or a clip that moves over it."""
    from ebr_engine.evaluation.photos import load_photo
    from ebr_engine.media.images import write_image

    pixels = load_photo("astronaut", size)[0][0].permute(1, 2, 0).numpy()
    if frames == 1:
        write_image(path, pixels)
        return
    from ebr_engine.media.video import VideoInfo, write_video

    with write_video(path, VideoInfo(size, size, Fraction(25), Fraction(1, 25))) as writer:
        for index in range(frames):
            writer.write(np.roll(pixels, index, axis=1))


def run(command: list[str]) -> str:
    """The standard output of a command; its errors are shown, and end the measurement."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def timed_stages(photo: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `ebr-engine restore` does with one photo, in this process: seconds a stage, and each run of the transformer."""
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    with clock(seconds, "import torch"):
        import torch
    with clock(seconds, "import engine"):
        from ebr_engine.engine.restorer import Restorer
    how = {name: getattr(options, name) for name in ("model", "context", "device", "precision", "compile")}
    with clock(seconds, "load weights"):
        restorer = Restorer(options.backbone, **how)

    def synchronise() -> None:
        if restorer.device.type == "cuda":
            torch.cuda.synchronize(restorer.device)

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any, **settings: Any) -> Any:
            with clock(seconds, name, synchronise):
                return function(*arguments, **settings)

        setattr(owner, name, watched)

    from ebr_engine.backbones.wan.model import WanConfig
    from ebr_engine.engine.measure import run_flop

    counted = isinstance(restorer.trunk.config, WanConfig)
    transformer: list[dict[str, float]] = []

    def begin(_: Any, arguments: tuple) -> None:
        synchronise()
        flop = run_flop(restorer.trunk.config, *arguments) if counted else float("nan")
        transformer.append({"seconds": -time.perf_counter(), "flop": flop})

    def end(*_: Any) -> None:
        synchronise()
        transformer[-1]["seconds"] += time.perf_counter()

    for owner, name in ((restorer.backbone, "bake"), (restorer.codec, "encode"), (restorer.codec, "decode")):
        watch(owner, name)
    restorer.trunk.register_forward_pre_hook(begin)
    restorer.trunk.register_forward_hook(end)
    clip = photo.suffix == ".mp4"
    restore = restored_clip if clip else restored_photo
    restore(seconds, restorer, photo, out, options, synchronise)
    seconds["denoise"] = sum(one["seconds"] for one in transformer)
    cuda = restorer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(restorer.device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {"device": str(restorer.device), "dtype": str(restorer.dtype), "peak_bytes": peak}
    return {"seconds": seconds, "transformer": transformer, "product_rate": product_rate(restorer.device, restorer.dtype)} | about


def restored_photo(
    seconds: dict[str, float], restorer: Any, photo: Path, out: Path, options: argparse.Namespace, synchronise: Any
) -> None:
    """Read, restore and write a photo."""
    from ebr_engine.media.images import Picture, read_image, write_image

    with clock(seconds, "read"):
        picture = read_image(photo)
    with clock(seconds, "restore", synchronise):
        pixels = restorer.restore(picture.pixels, task=options.task, steps=options.steps)
    with clock(seconds, "write"):
        write_image(out, Picture(**{**vars(picture), "pixels": pixels}))


def restored_clip(
    seconds: dict[str, float], restorer: Any, clip: Path, out: Path, options: argparse.Namespace, synchronise: Any
) -> None:
    """Read, restore in one chunk, and write a clip."""
    import torch

    from ebr_engine.media.video import open_video, write_video

    with open_video(clip) as reader:
        with clock(seconds, "read"):
            frames = list(reader)
            pixels = torch.from_numpy(np.stack([frame.pixels for frame in frames])).permute(3, 0, 1, 2)[None]
        with clock(seconds, "restore", synchronise):
            restored = restorer.run(pixels, restorer.plan(options.task, steps=options.steps))
        with clock(seconds, "write"), write_video(out, reader) as writer:
            for frame, picture in zip(frames, restored[0].permute(1, 2, 3, 0).numpy()):
                writer.write(picture, frame)


def product_rate(device: Any, dtype: Any) -> float:
    """Operations a second of a product of large matrices, the best of a few."""
    import torch

    x, weight = torch.randn(1024, 2048, device=device, dtype=dtype), torch.randn(2048, 2048, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * len(x) * weight.numel() / best


@contextmanager
def clock(seconds: dict[str, float], name: str, synchronise: Any = None) -> Iterator[None]:
    """Add the time of the block to `seconds[name]`."""
    started = time.perf_counter()
    yield
    if synchronise:
        synchronise()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def summary(options: argparse.Namespace, whole: list[float], parts: list[dict]) -> dict[str, Any]:
    """Medians, quartiles and shares, and on what they were measured."""
    total = spread(whole)
    stages = {name: spread([part["seconds"][name] for part in parts]) for name in STAGES}
    inside = ("bake", "encode", "denoise", "decode")
    other = [part["seconds"]["restore"] - sum(part["seconds"][name] for name in inside) for part in parts]
    stages["other restoring"] = spread(other)
    rest = total["median"] - sum(stage["median"] for stage in stages.values())
    stages["other process"] = {"median": rest}
    for stage in stages.values():
        stage["share"] = stage["median"] / total["median"]
    passes = [one for part in parts for one in part["transformer"]]
    rates, products = [one["flop"] / one["seconds"] for one in passes], spread([part["product_rate"] for part in parts])
    return {
        **{name: getattr(options, name) for name in ("backbone", "task", "size", "frames")},
        "runs": options.runs,
        "device": parts[0]["device"],
        "dtype": parts[0]["dtype"],
        "precision": options.precision,
        "compile": options.compile,
        "whole": total,
        "stages": stages,
        "transformer": {
            "runs_a_photo": len(parts[0]["transformer"]),
            "seconds": spread([one["seconds"] for one in passes]),
            "gflop": passes[0]["flop"] / 1e9,
            "tflop_per_second": spread([rate / 1e12 for rate in rates]),
            "share_of_products": median(rates) / products["median"],
        },
        "products_tflop_per_second": products["median"] / 1e12,
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        **provenance(),
    }


def title(result: dict[str, Any]) -> str:
    """What was restored, in a line."""
    what = "JPEG" if result["frames"] == 1 else f"clip of {result['frames']} frames"
    return f"One {result['size']} x {result['size']} {what} with {result['backbone']}"


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    names = {
        "other restoring": "noise, steps, conversion",
        "other process": "Python, command line, exit",
        "denoise": f"denoise ({result['transformer']['runs_a_photo']} runs)",
    }
    total, transformer = result["whole"], result["transformer"]
    lines = [
        f"{title(result)}, {result['dtype']} on {result['device']}; median (quartiles) of {result['runs']}",
        "",
        f"{'whole process':28}{milliseconds(total)}",
        "",
    ]
    for name, stage in result["stages"].items():
        lines.append(f"{names.get(name, name):28}{milliseconds(stage):32}{stage['share']:7.1%}")
    speed = transformer["tflop_per_second"]
    low, high = speed["quartiles"]
    lines += [
        "",
        f"{'one run of the transformer':28}{milliseconds(transformer['seconds'])}",
        f"{transformer['gflop']:.1f} GFLOP a run: {speed['median']:.3f} ({low:.3f} to {high:.3f}) TFLOP/s, "
        f"{transformer['share_of_products']:.0%} of the {result['products_tflop_per_second']:.3f} of large products",
        f"peak memory {result['peak_bytes'] / 1e9:.2f} GB",
        "",
        *told(result),
    ]
    return "\n".join(lines)


def milliseconds(value: dict[str, Any]) -> str:
    """`median ms (quartiles)`."""
    text = f"{value['median'] * 1e3:9.1f} ms"
    if "quartiles" in value:
        low, high = (quartile * 1e3 for quartile in value["quartiles"])
        text += f" ({low:.1f} to {high:.1f})"
    return text


if __name__ == "__main__":
    main()
