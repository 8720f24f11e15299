"""`python -m benchmarks.gpu --rehearse`: the whole GPU check at toy sizes on the CPU, from a bare folder.

What it needs is copied into a bare folder: no git, nothing installed from it. What it writes there, its own files and the page,
is looked through, and then killed and resumed: sections that are done must be kept. Nothing is measured.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import LIMIT, problems
from benchmarks.report import ROOT, about, commit, sources, write_json

# What the check reads of this folder. Weights of `mini` are no part of it; results are what it writes.
PARTS = ("benchmarks", "csrc", "ebr_engine", "kernels", "tests", "Makefile", "pyproject.toml", "setup.py", "constraints.txt")
LEFT_OUT = ("__pycache__", "*.so", "results", "*.safetensors", "photos")


def rehearse(names: Sequence[str], minutes: float, out: Path) -> bool:
    """Run the sections from a bare copy and write `gpu_rehearsal.json` to `out`; whether every one of them ran without fault."""
    here = about() | {"commit": commit(), "sources": sources()}  # before anything changes while it runs
    with tempfile.TemporaryDirectory() as folder:
        bare = copied(Path(folder) / "bare")
        first = run(bare, names, minutes, "the sections")
        again = run(bare, names, minutes, "all again, resumed", "--resume")
    kept = [name for name in names if f"\n{name}: kept from commit" in again["output"]]
    summary = first["output"][-LIMIT:]
    sections = first["result"]["sections"]
    result = here | {
        "sources there": first["result"]["sources"],
        "commit there": first["result"]["commit"],
        "seconds": {"the sections": first["seconds"], "all again, resumed": again["seconds"]},
        "summary is in the output's end": summary.count("GPU check (tiny") == 1,
        "characters of the summary": len(summary[summary.find("GPU check (tiny") :]),
        "kept when resumed": len(kept),
        "sections": {
            name: {"status": section["status"], "rows": len(section["rows"]), "faults": problems(section)}
            for name, section in sections.items()
        },
    }
    write_json(out / "gpu_rehearsal.json", result)
    print(out / "gpu_rehearsal.json")
    faultless = not any(section["faults"] for section in result["sections"].values())
    return faultless and len(kept) == len(names) and result["sources"] == result["sources there"]


def copied(folder: Path) -> Path:
    """A bare copy of what the check reads."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


def run(bare: Path, names: Sequence[str], minutes: float, title: str, *more: str) -> dict[str, Any]:
    """One command in the bare folder: its output, printed too, its result and its seconds."""
    print(f"--- {title} ---", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--sections", ",".join(names), "--minutes", f"{minutes}"]
    # Packages may lie in a folder of their own; this checkout must not be found by its name.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, "--out", str(bare / "out"), *more], cwd=bare, env=environment, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    (path,) = (bare / "out").glob("gpu_*_tiny.json")
    return {"output": done.stdout, "result": json.loads(path.read_text()), "seconds": time.monotonic() - started}
