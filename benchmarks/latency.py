"""`python -m benchmarks.latency`: where the time goes when one photo is restored, from process start to file written.

The command is timed from outside, as a person waits for it. Beside each such run, one more fresh process times its own
stages, by clocks around the engine's functions and the transformer; both are repeated, and medians and quartiles told.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, plot_bars, provenance, spread, told, write_json

COMMAND = [sys.executable, "-c", "from ebr_engine.cli import main; main()"]
TASK = "haze"
STAGES = ("import torch", "import engine", "load weights", "read", "bake", "encode", "denoise", "decode", "write")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="side of the square photo in pixels")
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind")
    parser.add_argument("--steps", type=int, help="runs of the transformer per picture (default: by schedule)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32", "fp8"))
    parser.add_argument("--compile", default="auto", choices=("auto", "off", "on"), help="as of ebr-engine restore")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the stages (PNG; needs matplotlib)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    parser.add_argument("--stages", type=Path, nargs=2, metavar=("IN", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.size < 16:
        parser.error("--runs must be at least 1, --size at least 16")
    if options.stages:
        print(json.dumps(timed_stages(*options.stages, options)))
        return
    result = measure(options)
    print(table(result))
    if options.json:
        write_json(options.json, result)
    if options.plot:
        stages = {name: stage["median"] * 1e3 for name, stage in result["stages"].items()}
        plot_bars(options.plot, stages, f"One {options.size} x {options.size} JPEG with mini", "ms")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, alternating between the timed command and the process that times its stages."""
    from ebr_engine.evaluation.photos import load_photo
    from ebr_engine.media.images import write_image

    settings = ["--device", options.device, "--precision", options.precision, "--compile", options.compile]
    settings += ["--steps", str(options.steps)] if options.steps else []
    whole, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        photo, out = Path(folder) / "in.jpg", Path(folder) / "out.jpg"
        write_image(photo, load_photo("astronaut", options.size)[0][0].permute(1, 2, 0).numpy())
        for _ in range(options.runs):
            started = time.perf_counter()
            run([*COMMAND, "restore", str(photo), "-o", str(out), "--task", TASK, "--overwrite", *settings])
            whole.append(time.perf_counter() - started)
            stages = [sys.executable, "-m", "benchmarks.latency", "--stages", str(photo), str(out), *settings]
            parts.append(json.loads(run(stages)))
    return summary(options, whole, parts)


def run(command: list[str]) -> str:
    """The standard output of a command; its errors are shown, and end the measurement."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def timed_stages(photo: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `ebr-engine restore` does with one photo, in this process: seconds a stage, and each run of the transformer."""
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    with clock(seconds, "import torch"):
        import torch
    with clock(seconds, "import engine"):
        from ebr_engine.engine import Restorer
        from ebr_engine.media.images import Picture, read_image, write_image
    with clock(seconds, "load weights"):
        restorer = Restorer(device=options.device, precision=options.precision, compile=options.compile)

    def synchronise() -> None:
        if restorer.device.type == "cuda":
            torch.cuda.synchronize(restorer.device)

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any, **settings: Any) -> Any:
            with clock(seconds, name, synchronise):
                return function(*arguments, **settings)

        setattr(owner, name, watched)

    from ebr_engine.measuring import run_flop

    transformer: list[dict[str, float]] = []

    def begin(_: Any, arguments: tuple) -> None:
        synchronise()
        transformer.append({"seconds": -time.perf_counter(), "flop": run_flop(restorer.trunk.config, *arguments)})

    def end(*_: Any) -> None:
        synchronise()
        transformer[-1]["seconds"] += time.perf_counter()

    for owner, name in ((restorer.parts, "bake"), (restorer.codec, "encode"), (restorer.codec, "decode")):
        watch(owner, name)
    restorer.trunk.register_forward_pre_hook(begin)
    restorer.trunk.register_forward_hook(end)
    with clock(seconds, "read"):
        picture = read_image(photo)
    with clock(seconds, "restore", synchronise):
        pixels = restorer.restore(picture.pixels, task=TASK, steps=options.steps)
    with clock(seconds, "write"):
        write_image(out, Picture(**{**vars(picture), "pixels": pixels}))
    seconds["denoise"] = sum(one["seconds"] for one in transformer)
    return {"seconds": seconds, "transformer": transformer, "device": str(restorer.device), "dtype": str(restorer.dtype)}


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
    return {
        "size": options.size,
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
            "tflop_per_second": spread([one["flop"] / one["seconds"] / 1e12 for one in passes]),
        },
        **provenance(),
    }


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    names = {
        "other restoring": "noise, steps, conversion",
        "other process": "Python, command line, exit",
        "denoise": f"denoise ({result['transformer']['runs_a_photo']} runs)",
    }
    size, total, transformer = result["size"], result["whole"], result["transformer"]
    lines = [
        f"One {size} x {size} JPEG with mini, {result['dtype']} on {result['device']}; median (quartiles) of {result['runs']}",
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
        f"{transformer['gflop']:.1f} GFLOP a run: {speed['median']:.3f} ({low:.3f} to {high:.3f}) TFLOP/s",
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
