"""What every benchmark tells besides its numbers: medians, the machine, versions and commit, aligned tables, JSON files."""

import json
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


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


def provenance() -> dict[str, Any]:
    """Machine and versions, commit and date: what a result has to be read with."""
    from ebr_engine.cli.info import collect

    facts = collect()
    return {
        "machine": {"cpu": facts["cpu"], "cuda": facts["cuda"], "versions": facts["versions"]},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def told(about: dict[str, Any]) -> list[str]:
    """`provenance` as lines for a person."""
    machine = about["machine"]
    return [
        f"{machine['cpu']['name']}, {machine['cpu']['cores']} cores, {machine['cpu']['threads']} threads",
        *(f"{device['name']}: {device['description']}" for device in machine["cuda"]),
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        f"commit {about['commit']}, {about['date']}",
    ]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join((line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:])))) for line in lines)


def plot_bars(path: Path, values: dict[str, float], title: str, unit: str) -> None:
    """Draw one horizontal bar a name, the first on top, as a PNG."""
    axes = _axes(title, height=1.2 + 0.3 * len(values))
    axes.barh(list(values)[::-1], list(values.values())[::-1])
    axes.set_xlabel(unit)
    _save(axes, path)


def plot_lines(path: Path, lines: dict[str, tuple[Sequence[float], Sequence[float]]], title: str, x: str, y: str) -> None:
    """Draw one line a name through its points (x, y), as a PNG."""
    axes = _axes(title)
    for name, points in lines.items():
        axes.plot(*points, marker="o", label=name)
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    axes.legend()
    _save(axes, path)


def _axes(title: str, height: float = 4.0) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("error: a plot needs matplotlib: pip install matplotlib") from error
    axes = Figure(figsize=(7, height), layout="constrained").subplots()
    axes.set_title(title, fontsize="medium")
    return axes


def _save(axes: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=120)


def write_json(path: Path, result: Any) -> None:
    """Write a result, making its folder; numbers at full precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
