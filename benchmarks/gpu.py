"""`python -m benchmarks.gpu` (or `make gpu-check`): everything to know of a GPU that the engine has not met, in eight minutes.

Builds the CUDA extension, checks every kernel against its formula in float64, times the operations and the models at the real
shapes beside plain torch, torch.compile and the library, and runs the tests that need a device. Weights are random: nothing is
downloaded. Each section is a process of its own, so that one that fails or hangs costs only itself; what it measured until then
is kept. One JSON file and one Markdown table; `--resume` goes on with the sections that are not done.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ebr_engine
from benchmarks.report import NO_TIME, RESULTS, ROOT, about, commit, describe, write_json

MINUTES = 8
GRACE = 10  # seconds a section may run past its limit: it stops by itself, between two measurements
SHORTEST = 10  # seconds below which a section is not started


@dataclass(frozen=True)
class Section:
    """A part of the check: the function that does it, its arguments, how long it may take, which kernels it asks for."""

    title: str
    module: str
    function: str
    seconds: float  # of the eight minutes; more if there are more
    arguments: tuple[str, ...] = ()
    kernels: str = "triton"


SECTIONS = {  # the most telling first: what there is no time for is left out
    "build": Section("The CUDA extension", "gpu_kernels", "build", 60),
    "kernels": Section("Errors against float64, and those of plain torch", "gpu_kernels", "kernels", 80),
    "ops": Section("Operations at the models' shapes", "gpu_kernels", "ops", 60),
    "steps-wan": Section("Wan 2.1 1.3B, 480 x 832, 33 frames", "gpu_models", "steps", 70, ("wan-1.3b",)),
    "steps-flux": Section("FLUX.1-dev, 1024 x 1024", "gpu_models", "steps", 100, ("flux-dev",)),
    "graphs-wan": Section("Whole runs of Wan 2.1 1.3B: captured, compiled", "gpu_models", "graphs", 60, ("wan-1.3b",)),
    "graphs-flux": Section("Whole runs of FLUX.1-dev: captured, compiled", "gpu_models", "graphs", 60, ("flux-dev",)),
    "linears": Section("Linear layers: bf16, and e4m3 by its two backends", "gpu_kernels", "linears", 25),
    "cuda": Section("The CUDA extension's kernels", "gpu_kernels", "cuda", 40, kernels="cuda"),
    "train-wan": Section("Learning a prompt for Wan 2.1 1.3B", "gpu_models", "train", 25, ("wan-1.3b",)),
    "train-flux": Section("Learning a prompt for FLUX.1-dev", "gpu_models", "train", 35, ("flux-dev",)),
    "tests": Section("Tests that need a GPU", "gpu_kernels", "tests", 40),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections, which print as they go, and write both files after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--sections", help=f"some of {', '.join(SECTIONS)}, with commas; a beginning stands for all with it")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all; what does not fit is left out")
    parser.add_argument("--resume", action="store_true", help="keep the sections that are done")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: does the check itself run?")
    parser.add_argument("--worker", nargs=3, metavar=("SECTION", "FILE", "DEADLINE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    find_kernels()
    if options.worker:
        name, file, until = options.worker
        work(name, Path(file), float(until), options.tiny, options.out)
        return
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    wanted = options.sections.split(",") if options.sections else [""]
    if unknown := [part for part in wanted if not any(name.startswith(part) for name in SECTIONS)]:
        parser.error(f"--sections: there is no {unknown[0]!r}; there is: {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if name.startswith(tuple(wanted))]
    if not check(options.out.resolve(), names, options.minutes * 60, options.resume, options.tiny):
        raise SystemExit(1)


def check(out: Path, names: Sequence[str], seconds: float, resume: bool, tiny: bool) -> bool:
    """Run sections within so many seconds; whether nothing failed."""
    deadline, generous = time.monotonic() + seconds, max(seconds / 60 / MINUTES, 1)
    machine = about() | {"driver": driver()}
    if not tiny and not machine["machine"]["cuda"]:
        raise SystemExit("error: torch sees no CUDA device here; --tiny runs the check itself on the CPU")
    path = out / f"gpu_{device_name(machine)}{'_tiny' if tiny else ''}.json"
    sections = json.loads(path.read_text())["sections"] if resume and path.exists() else {}
    print("\n".join(describe(machine)), f"driver {machine['driver']}", sep="\n", flush=True)
    for name in names:
        if sections.get(name, {}).get("status") == "done":
            print(f"\n{name}: kept from commit {sections[name]['commit']}", flush=True)
            continue
        print(f"\n{name}: {SECTIONS[name].title}", flush=True)
        sections[name] = run_section(name, SECTIONS[name].seconds * generous, deadline, tiny, out)
        print(f"  {sections[name]['status']} in {sections[name]['seconds']:.1f} s", flush=True)
        result = machine | {"tiny": tiny, "sections": {key: sections[key] for key in SECTIONS if key in sections}}
        write_json(path, result)
        path.with_suffix(".md").write_text(markdown(result))
    print(f"\n{path}\n{path.with_suffix('.md')}")
    return not any(problems(sections[name]) for name in names)


def run_section(name: str, seconds: float, deadline: float, tiny: bool, out: Path) -> dict[str, Any]:
    """One section in a process of its own: its status and rows, whatever became of it."""
    started = time.monotonic()
    limit = min(seconds, deadline - started - GRACE)
    if limit < SHORTEST:
        return {"status": NO_TIME, "seconds": 0.0, "commit": commit(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", name, str(file), f"{started + limit}", "--out", str(out)]
        # A wrong kernel is to be seen here, not to be replaced.
        environment = os.environ | {"EBR_KERNELS": SECTIONS[name].kernels, "EBR_VERIFY": "off"}
        try:
            done = subprocess.run([*command, *(["--tiny"] if tiny else [])], cwd=ROOT, env=environment, timeout=limit + GRACE)
            status = "done" if done.returncode == 0 else f"failed: exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit + GRACE:.0f} s"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if status == "done" and any(row.get("error") == NO_TIME for row in rows):
        status = "out of time"
    return {"status": status, "seconds": time.monotonic() - started, "commit": commit(), "rows": rows}


def work(name: str, file: Path, deadline: float, tiny: bool, out: Path) -> None:
    """A section, in its own process (whose monotonic clock is its parent's): rows go to the file as they come."""
    import torch

    from benchmarks.clock import Run

    section = SECTIONS[name]
    device = torch.device("cpu" if tiny else "cuda")
    if tiny:
        torch.set_num_threads(1)
    function = getattr(import_module(f"benchmarks.{section.module}"), section.function)
    with file.open("w") as rows:
        run = Run(device, tiny, deadline, rows, out)
        with run.guarded(section=name):
            function(run, *section.arguments)


def find_kernels() -> None:
    """Let `ebr_engine.kernels` be found in a checkout that is not installed, where it lies in kernels/."""
    if find_spec("ebr_engine.kernels") is None:
        ebr_engine.__path__.append(str(ROOT))


def device_name(about: dict[str, Any]) -> str:
    """The first device as part of a file's name."""
    cuda = about["machine"]["cuda"]
    name = cuda[0]["description"].split(",")[0] if cuda else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_").removeprefix("nvidia_")


def driver() -> str:
    """The version of NVIDIA's driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def problems(section: dict[str, Any]) -> list[dict[str, Any]]:
    """What went wrong in a section: rows with an error or a result out of bounds, and its own end."""
    wrong = [row for row in section["rows"] if row.get("ok") is False or row.get("failed") or failed(row.get("error"))]
    return wrong + ([] if section["status"] == "done" else [{"error": section["status"]}])


def failed(error: Any) -> bool:
    """Whether a row's error is one, not a form that was left out; a number is a measured error."""
    return isinstance(error, str) and not error.startswith("left out")


def markdown(result: dict[str, Any]) -> str:
    """Both what was measured and on what, as a page."""
    lines = [f"# GPU check{' (tiny)' if result['tiny'] else ''}", "", *(f"* {line}" for line in describe(result))]
    lines += [f"* driver {result['driver']}", ""]
    for name, section in result["sections"].items():
        lines += [f"## {SECTIONS[name].title}", "", f"`{name}`: {section['status']}, {section['seconds']:.1f} s.", ""]
        wrong = problems(section)
        if section["rows"]:
            lines += [*table(section["rows"]), ""]
        if wrong:
            lines += [f"{len(wrong)} of {len(section['rows'])} rows are not as they should be.", ""]
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Rows as a Markdown table; columns in the order in which they first come."""
    names = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list)))  # quartiles are in the JSON

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return "" if value is None else str(value).replace("|", "\\|")

    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(cell(row.get(name)) for name in names)} |"


if __name__ == "__main__":
    main()
