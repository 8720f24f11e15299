"""`python -m benchmarks.throughput`: pictures a second, by batch, precision and compiling, and from how many on compiling pays.

All forms are measured in one process, in interleaved rounds, so that whatever the machine does meanwhile meets all of them
alike. A picture's time is that of `Restorer.run`: encoding, all evaluations, decoding; tables are baked before. The first
run of a form is told apart: for a compiled one it holds the compiler. `break even` is the number of pictures after which
compiling has paid for itself: what the first run took longer, by what each picture is faster.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import columns, plot_lines, provenance, spread, told, write_json
from ebr_engine import Restorer
from ebr_engine.engine.costs import precision
from ebr_engine.engine.measure import synchronise, watched

TASK = "haze"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write JSON and plot on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="mini", help="mini, wan or flux")
    parser.add_argument("--model", help="its weights: a folder, a file or a hub id")
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--size", type=int, default=256, help="side of the square pictures in pixels")
    parser.add_argument("--frames", type=int, default=1, help="of clips in place of pictures; the rate is then of frames")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=("auto", "bf16", "fp16", "fp32", "fp8"))
    parser.add_argument("--compile", nargs="+", default=["off"], choices=("auto", "off", "on"))
    parser.add_argument("--steps", type=int, help="evaluations (default: by schedule)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each form after its first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the rates (PNG; needs matplotlib)")
    options = parser.parse_args(arguments)
    if min(*options.batch, options.rounds, options.frames) < 1 or options.size < 16:
        parser.error("--batch, --rounds and --frames must be at least 1, --size at least 16")
    result = measure(options)
    print(table(result))
    if options.json:
        write_json(options.json, result)
    if options.plot:
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for row in result["rows"]:
            batches, rates = lines.setdefault(f"{row['precision']}, compile {row['compile']}", ([], []))
            batches.append(row["batch"])
            rates.append(row["rate"])
        plot_lines(options.plot, lines, title(result), "batch", f"{unit(result)}/s")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every form's first run, then all forms in rounds."""
    source = {"model": options.model, "device": options.device}
    engines = {
        (asked, compile): Restorer(options.backbone, **source, precision=asked, compile=compile)
        for asked, compile in itertools.product(options.precision, options.compile)
    }
    plans = {key: engine.plan(options.task, steps=options.steps) for key, engine in engines.items()}
    pixels = torch.rand(max(options.batch), 3, options.frames, options.size, options.size)
    rows = [
        {"precision": precision(engines[key].backbone), "asked": key[0], "compile": key[1], "batch": batch}
        for key in engines
        for batch in options.batch
    ]

    def of(row: dict[str, Any]) -> tuple[Restorer, Any]:
        key = row["asked"], row["compile"]
        return engines[key], plans[key]

    for row in rows:
        row["first"], row["peak_bytes"], row["flop"] = once(*of(row), pixels[: row["batch"]])
        row["seconds"] = []
        print(f"{row['precision']}, compile {row['compile']}, batch {row['batch']}: first run {row['first']:.2f} s", flush=True)
    for _ in range(options.rounds):
        for row in rows:
            row["seconds"].append(once(*of(row), pixels[: row["batch"]])[0])
    for row in rows:
        row["seconds"] = spread(row["seconds"])
        row["rate"] = row["batch"] * options.frames / row["seconds"]["median"]
        row["tflops"] = row.pop("flop") / row["seconds"]["median"] / 1e12
        row["still"] = form(of(row)[0]) == row["compile"] or row["compile"] == "auto"
    for row in rows:
        row["break_even"] = break_even(row, rows)
    kept = ("backbone", "size", "frames", "rounds", "steps")
    device = str(next(iter(engines.values())).device)
    return {name: getattr(options, name) for name in kept} | {"device": device, "rows": rows} | provenance()


def once(engine: Restorer, plan: Any, pixels: torch.Tensor) -> tuple[float, int, float]:
    """Seconds, peak bytes (of the device, or so far of the process) and operations of a run."""
    cuda = engine.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(engine.device)
    with watched(engine) as seen:
        started = time.perf_counter()
        engine.run(pixels, plan, tile=0)
        synchronise(engine.device)
        taken = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(engine.device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return taken, peak, sum(seen["flop"])


def form(engine: Restorer) -> str:
    """`on` for an engine that is compiled, `off` for others: one that could not be has said so in a warning."""
    return "on" if engine.runner.compiled else "off"


def break_even(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Pictures (or clips) after which a compiled form has cost less than the plain one; None where it never has."""
    same = [other for other in rows if other["batch"] == row["batch"] and other["asked"] == row["asked"]]
    same = [other for other in same if other["compile"] == "off"]
    if row["compile"] != "on" or not same:
        return None
    gain = (same[0]["seconds"]["median"] - row["seconds"]["median"]) / row["batch"]
    return (row["first"] - row["seconds"]["median"]) / gain if gain > 0 else None


def unit(result: dict[str, Any]) -> str:
    """What is counted."""
    return "pictures" if result["frames"] == 1 else "frames"


def title(result: dict[str, Any]) -> str:
    """What was measured, in a line."""
    clips = f"{result['frames']} frames of " if result["frames"] > 1 else ""
    return f"{result['backbone']}, {clips}{result['size']} x {result['size']}, on {result['device']}"


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    header = ["form", "batch", "first s", "median s", "quartiles", f"{unit(result)}/s", "TFLOP/s", "peak GB", "break even"]
    rows = []
    for row in result["rows"]:
        low, high = row["seconds"]["quartiles"]
        name = f"{row['precision']}, compile {row['compile']}" + ("" if row["still"] else " (failed)")
        even = "" if row["break_even"] is None else f"{row['break_even']:.0f}"
        times = f"{row['first']:.2f}", f"{row['seconds']['median']:.3f}", f"{low:.3f} to {high:.3f}"
        rest = f"{row['rate']:.3g}", f"{row['tflops']:.3g}", f"{row['peak_bytes'] / 1e9:.2f}", even
        rows.append([name, str(row["batch"]), *times, *rest])
    return "\n".join([f"{title(result)}; {result['rounds']} rounds", "", columns(header, rows), "", *told(result)])


if __name__ == "__main__":
    main()
