"""`python -m benchmarks.speed latency|throughput|full-size|waiting|starting`: a file's time, pictures a second, and more.

*latency*: one photo or clip by the command, timed from outside, as a person waits for it. Beside each such run, one more fresh
process times its own stages (`stages.py`); it also tells its peak memory, and how fast the machine multiplies large matrices in
the same precision: the transformer can be no faster, and its share of that rate is given.

*throughput*: all forms in one process, in interleaved rounds. A picture's time is that of `Restorer.run`: encoding, all
evaluations, decoding; tables are baked before. The first run of a form is kept apart: for a compiled one it holds the compiler.
`break even` is the number of pictures after which compiling has paid for itself: what the first run took longer, by what each
picture is faster.

*full-size*: see `full_size.py`. *waiting*: see `waiting.py`. *starting*: see `starting.py`.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import full_size, report, starting, waiting
from benchmarks.report import ROOT, Benchmark, columns, spread
from benchmarks.stages import STAGES, timed_stages

TASK = "haze"
COMPILES = ("auto", "off", "on")
RESTORING = ("bake", "encode", "denoise", "decode")  # the stages of a restoration
INSIDE = "import sys; from benchmarks.speed import inside; inside(*sys.argv[1:])"


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the five."""
    report.main("speed", __doc__, BENCHMARKS, arguments)


def common_options(parser: ArgumentParser, size: int, frames: str) -> None:
    """What latency and throughput share."""
    parser.add_argument("--backbone", default="mini", help="mini, wan or flux")
    parser.add_argument("--model", help="its weights: a folder, a file or a hub id")
    parser.add_argument("--context", help="its empty text, a file of ebr-engine cache-text")
    parser.add_argument("--task", default=TASK, help="the prompt to restore with")
    parser.add_argument("--size", type=int, default=size, help="side of the square pictures in pixels")
    parser.add_argument("--frames", type=int, default=1, help=frames)
    parser.add_argument("--steps", type=int, help="evaluations of the transformer (default: by schedule)")
    parser.add_argument("--device", default="auto")


def kind(result: dict[str, Any], picture: str, frames: str) -> str:
    """What was restored, in words."""
    return picture if result["frames"] == 1 else frames.format(result["frames"])


# Latency


def latency_options(parser: ArgumentParser) -> None:
    common_options(parser, 512, "of a clip in place of the photo, restored in one chunk")
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32", "fp8"))
    parser.add_argument("--compile", default="auto", choices=COMPILES, help="as of ebr-engine restore")


def latency(options: Namespace) -> dict[str, Any]:
    """One photo or clip, from the start of the process to the file written: where the time goes."""
    if min(options.runs, options.frames) < 1 or options.size < 16:
        options.error("--runs and --frames must be at least 1, --size at least 16")
    names = ("backbone", "model", "context", "task", "steps", "device", "precision", "compile")
    given = {name: getattr(options, name) for name in names}
    settings = [word for name, value in given.items() if value for word in (f"--{name}", str(value))]
    clip = options.frames > 1
    chunk = ["--chunk-frames", str(options.frames)] if clip else []
    whole, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        source, out = (Path(folder) / f"{name}.{'mp4' if clip else 'jpg'}" for name in ("in", "out"))
        write_source(source, options.size, options.frames)
        inside = [sys.executable, "-c", INSIDE, str(source), str(out), json.dumps(given)]
        for _ in range(options.runs):
            command = ["restore", str(source), "-o", str(out), "--overwrite", "--quiet", *chunk, *settings]
            whole.append(full_size.command(command)["seconds"])
            done = subprocess.run(inside, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            parts.append(json.loads(done.stdout))
    return summary(options, whole, parts)


def inside(source: str, out: str, settings: str) -> None:
    """Print what a process finds that times its own stages."""
    print(json.dumps(timed_stages(Path(source), Path(out), Namespace(**json.loads(settings)))))


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


def summary(options: Namespace, whole: list[float], parts: list[dict]) -> dict[str, Any]:
    """Medians, quartiles and shares."""
    total = spread(whole)
    stages = {name: spread([part["seconds"][name] for part in parts]) for name in STAGES}
    other = [part["seconds"]["restore"] - sum(part["seconds"][name] for name in RESTORING) for part in parts]
    stages["other restoring"] = spread(other)
    stages["other process"] = {"median": total["median"] - sum(stage["median"] for stage in stages.values())}
    for stage in stages.values():
        stage["share"] = stage["median"] / total["median"]
    passes = [one for part in parts for one in part["transformer"]]
    rates, products = [one["flop"] / one["seconds"] for one in passes], spread([part["product_rate"] for part in parts])
    return {
        **{name: getattr(options, name) for name in ("backbone", "task", "size", "frames", "runs", "precision", "compile")},
        "device": parts[0]["device"],
        "dtype": parts[0]["dtype"],
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
    }


def latency_title(result: dict[str, Any]) -> str:
    """What was restored, in a line."""
    return f"One {result['size']} x {result['size']} {kind(result, 'JPEG', 'clip of {} frames')} with {result['backbone']}"


def latency_table(result: dict[str, Any]) -> str:
    """What a person reads."""
    names = {
        "other restoring": "noise, steps, conversion",
        "other process": "Python, command line, exit",
        "denoise": f"denoise ({result['transformer']['runs_a_photo']} runs)",
    }
    transformer, speed = result["transformer"], result["transformer"]["tflop_per_second"]
    low, high = speed["quartiles"]
    stages = [
        f"{names.get(name, name):28}{milliseconds(stage):32}{stage['share']:7.1%}" for name, stage in result["stages"].items()
    ]
    return "\n".join(
        [
            f"{latency_title(result)}, {result['dtype']} on {result['device']}; median (quartiles) of {result['runs']}",
            "",
            f"{'whole process':28}{milliseconds(result['whole'])}",
            "",
            *stages,
            "",
            f"{'one run of the transformer':28}{milliseconds(transformer['seconds'])}",
            f"{transformer['gflop']:.1f} GFLOP a run: {speed['median']:.3f} ({low:.3f} to {high:.3f}) TFLOP/s, "
            f"{transformer['share_of_products']:.0%} of the {result['products_tflop_per_second']:.3f} of large products",
            f"peak memory {result['peak_bytes'] / 1e9:.2f} GB",
        ]
    )


def milliseconds(value: dict[str, Any]) -> str:
    """`median ms (quartiles)`."""
    low, high = (quartile * 1e3 for quartile in value.get("quartiles", (0, 0)))
    return f"{value['median'] * 1e3:9.1f} ms" + (f" ({low:.1f} to {high:.1f})" if "quartiles" in value else "")


def plot_latency(result: dict[str, Any], path: Path) -> None:
    """One bar a stage, the first on top."""
    stages = {name: stage["median"] * 1e3 for name, stage in result["stages"].items()}
    drawn = report.figure(height=1.2 + 0.3 * len(stages))
    drawn.axes[0].set_title(latency_title(result), fontsize="medium")
    drawn.axes[0].barh(list(stages)[::-1], list(stages.values())[::-1])
    drawn.axes[0].set_xlabel("ms")
    report.save_figure(drawn, path)


# Throughput


def throughput_options(parser: ArgumentParser) -> None:
    common_options(parser, 256, "of clips in place of pictures; the rate is then of frames")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=("auto", "bf16", "fp16", "fp32", "fp8"))
    parser.add_argument("--compile", nargs="+", default=["off"], choices=COMPILES)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each form after its first")


def throughput(options: Namespace) -> dict[str, Any]:
    """Pictures a second by batch, precision and compiling, and from how many pictures on compiling pays."""
    if min(*options.batch, options.rounds, options.frames) < 1 or options.size < 16:
        options.error("--batch, --rounds and --frames must be at least 1, --size at least 16")
    import torch

    from benchmarks import clock
    from benchmarks.models import plan_flop
    from ebr_engine import Restorer
    from ebr_engine.engine.costs import precision

    source = {name: getattr(options, name) for name in ("model", "context", "device")}
    pixels = torch.rand(max(options.batch), 3, options.frames, options.size, options.size)
    rows, runs = [], []
    for asked, compile in itertools.product(options.precision, options.compile):
        engine = Restorer(options.backbone, **source, precision=asked, compile=compile)
        plan, device = engine.plan(options.task, steps=options.steps), engine.device
        for batch in options.batch:
            given = pixels[:batch]
            run = lambda engine=engine, plan=plan, given=given: engine.run(given, plan, tile=0)  # noqa: E731
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row = {"precision": precision(engine.backbone), "asked": asked, "compile": compile, "batch": batch}
            row |= {"first": clock.seconds(run, device), "peak_bytes": clock.peak_bytes(device)}
            print(f"{row['precision']}, compile {compile}, batch {batch}: first run {row['first']:.2f} s", flush=True)
            rows.append(row | {"flop": plan_flop(engine, plan, given.shape), "engine": engine})
            runs.append(run)
    spreads = clock.in_turns(dict(enumerate(runs)), options.rounds, device)
    for row, taken in zip(rows, spreads.values()):
        row["seconds"] = taken
        row["rate"] = row["batch"] * options.frames / taken["median"]
        row["tflops"] = row.pop("flop") / taken["median"] / 1e12
        compiled = "on" if row.pop("engine").runner.compiled else "off"  # one that could not be has said so in a warning
        row["still"] = row["compile"] in ("auto", compiled)
    for row in rows:
        row["break_even"] = break_even(row, rows)
    kept = {name: getattr(options, name) for name in ("backbone", "size", "frames", "rounds", "steps")}
    return kept | {"device": str(device), "rows": rows}


def break_even(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Pictures (or clips) after which a compiled form has cost less than the plain one; None where it never has."""
    same = [other for other in rows if (other["batch"], other["asked"], other["compile"]) == (row["batch"], row["asked"], "off")]
    if row["compile"] != "on" or not same:
        return None
    gain = (same[0]["seconds"]["median"] - row["seconds"]["median"]) / row["batch"]
    return (row["first"] - row["seconds"]["median"]) / gain if gain > 0 else None


def throughput_title(result: dict[str, Any]) -> str:
    """What was measured, in a line."""
    what = kind(result, "", "{} frames of ")
    return f"{result['backbone']}, {what}{result['size']} x {result['size']}, on {result['device']}"


def throughput_table(result: dict[str, Any]) -> str:
    """What a person reads."""
    unit = kind(result, "pictures", "frames")
    header = ["form", "batch", "first s", "median s", "quartiles", f"{unit}/s", "TFLOP/s", "peak GB", "break even"]
    rows = []
    for row in result["rows"]:
        low, high = row["seconds"]["quartiles"]
        name = f"{row['precision']}, compile {row['compile']}" + ("" if row["still"] else " (failed)")
        even = "" if row["break_even"] is None else f"{row['break_even']:.0f}"
        times = f"{row['first']:.2f}", f"{row['seconds']['median']:.3f}", f"{low:.3f} to {high:.3f}"
        rest = f"{row['rate']:.3g}", f"{row['tflops']:.3g}", f"{row['peak_bytes'] / 1e9:.2f}", even
        rows.append([name, str(row["batch"]), *times, *rest])
    return "\n".join([f"{throughput_title(result)}; {result['rounds']} rounds", "", columns(header, rows)])


def plot_throughput(result: dict[str, Any], path: Path) -> None:
    """One line a form, over the batch."""
    drawn, lines = report.figure(), {}
    for row in result["rows"]:
        lines.setdefault(f"{row['precision']}, compile {row['compile']}", []).append((row["batch"], row["rate"]))
    for name, points in lines.items():
        drawn.axes[0].plot(*zip(*points), marker="o", label=name)
    drawn.axes[0].set_title(throughput_title(result), fontsize="medium")
    drawn.axes[0].set(xlabel="batch", ylabel=f"{kind(result, 'pictures', 'frames')}/s", ylim=(0, None))
    drawn.axes[0].legend()
    report.save_figure(drawn, path)


BENCHMARKS = {
    "latency": Benchmark(latency_options, latency, latency_table, plot_latency),
    "throughput": Benchmark(throughput_options, throughput, throughput_table, plot_throughput),
    "full-size": Benchmark(full_size.options, full_size.measure, full_size.table),
    "starting": Benchmark(starting.options, starting.measure, starting.table),
    "waiting": Benchmark(waiting.options, waiting.measure, waiting.table),
}

if __name__ == "__main__":
    main()
