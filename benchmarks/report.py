"""What every benchmark does besides measuring: its command line, medians, machine, versions and commit, tables, plots, JSON."""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "pyvips", "numpy")
MEASURED, SOURCES = ("ebr_engine", "kernels", "csrc", "benchmarks"), (".py", ".cu", ".cuh", ".cpp", ".h")  # what `sources` reads
NO_TIME = "left out: no time"  # the error of what a deadline left out


class Benchmark(NamedTuple):
    """One thing that a command measures: its options, the measurement, and what a person reads and sees of the result.

    `measure` may call `options.error(words)` to refuse a value. Its docstring's first sentence is the help.
    """

    options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None] | None = None


def main(module: str, text: str, benchmarks: Benchmark | dict[str, Benchmark], arguments: Sequence[str] | None = None) -> None:
    """The command line of a module with one benchmark or several by name: measure, print the table, write JSON and plot."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=text.splitlines()[0])
    if isinstance(benchmarks, Benchmark):
        add_options(parser, benchmarks)
    else:
        kinds = parser.add_subparsers(required=True, metavar="|".join(benchmarks))
        for name, one in benchmarks.items():
            words = one.measure.__doc__.splitlines()[0]
            add_options(kinds.add_parser(name, help=words, description=words), one)
    options = parser.parse_args(arguments)
    benchmark = options.benchmark
    result = benchmark.measure(options) | about()
    print("\n".join([benchmark.table(result), "", *describe(result)]))
    if options.json:
        write_json(options.json, result)
    if benchmark.plot and options.plot:
        benchmark.plot(result, options.plot)


def add_options(parser: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    """A benchmark's own options, and those of all."""
    benchmark.options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    if benchmark.plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (PNG; needs matplotlib)")
    parser.set_defaults(benchmark=benchmark, error=parser.error)


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles of measurements, and the measurements."""
    import numpy as np

    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high], "all": values}


def commit() -> str:
    """The commit measured, `-dirty` when files differ from it; `unknown` outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sources() -> str:
    """A digest of all that is measured and measures, the same with git and without: `python -c "from benchmarks.report import
    sources; print(sources())"` at a commit says whether a result without one is its."""
    digest = hashlib.sha256()
    files = [path for folder in MEASURED for suffix in SOURCES for path in (ROOT / folder).rglob(f"*{suffix}")]
    for path in sorted(files, key=lambda path: path.relative_to(ROOT).as_posix()):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def about() -> dict[str, Any]:
    """Machine and versions, commit and date: what a result has to be read with. Needs nothing that a bare folder lacks."""
    import torch

    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    cpu = {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {
        "machine": {"cpu": cpu, "cuda": [cuda_device(i) for i in range(torch.cuda.device_count())], "versions": versions},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """As Linux names it, or as Python does elsewhere."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def cpu_instructions() -> list[str]:
    """The vector instruction sets of this CPU, as Linux names them; none where it does not say."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    wanted = re.compile(r"sse4_2|fma|f16c|avx.*|amx.*")
    return sorted(flag for flag in found[1].split() if wanted.fullmatch(flag)) if found else []


def cuda_device(index: int) -> dict[str, str]:
    """A GPU's name, memory and capability."""
    import torch

    found = torch.cuda.get_device_properties(index)
    memory = f"{found.total_memory / 2**30:.0f} GiB"
    return {"name": f"cuda:{index}", "description": f"{found.name}, {memory}, compute capability {found.major}.{found.minor}"}


def describe(result: dict[str, Any]) -> list[str]:
    """What `about` found, as lines for a person."""
    machine = result["machine"]
    return [
        f"{machine['cpu']['name']}, {machine['cpu']['cores']} cores, {machine['cpu']['threads']} threads",
        *(f"{device['name']}: {device['description']}" for device in machine["cuda"]),
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        f"commit {result['commit']}, {result['date']}",
    ]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join((line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:])))) for line in lines)


def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The mean of one value over rows."""
    return sum(row[name] for row in rows) / len(rows)


def figure(width: float = 7, height: float = 4.0, panels: int = 1) -> Any:
    """A figure of `panels` axes in a row; the line that installs matplotlib where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("error: a plot needs matplotlib: pip install matplotlib") from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.subplots(1, panels)
    return drawn


def save_figure(drawn: Any, path: Path) -> None:
    """Write a figure as a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120)


def write_json(path: Path, result: Any) -> None:
    """Write a result, making its folder; numbers at full precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
