"""What a person and a program read of a measurement: scores.csv (a line a file), summary.md and summary.json."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebr_engine.evaluation.metrics import METRICS, NON_COMMERCIAL
from ebr_engine.evaluation.run import Row, means
from ebr_engine.media.images import write_atomically

_PYIQA = ("dists", "clipiqa+", "musiq")


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Markdown: a line a metric with its mean and the number of files that it is a mean of."""
    lines = ["| metric | better | mean | files |", "|---|---|---|---|"]
    for name, found in means(rows, metrics).items():
        metric = METRICS[name]
        better = "higher" if metric.higher_is_better else "lower"
        lines.append(f"| {metric.title} | {better} | {found['mean']:.{metric.digits}f} | {found['files']} |")
    return "\n".join(lines)


def notes(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """What a reader of the means has to know besides them."""
    found = []
    if alone := sum("scores" in row and set(row["scores"]) != set(metrics) for row in rows):
        found.append(f"{alone} of {len(rows)} file(s) have no target, and no score that needs one")
    if failed := [row for row in rows if "error" in row]:
        found.append(
            f"{len(failed)} of {len(rows)} file(s) could not be measured and are in no mean; first: {failed[0]['error']}"
        )
    if set(metrics) & set(_PYIQA):
        found.append(NON_COMMERCIAL)
    return found


def write_summary(out: Path, rows: Sequence[Row], metrics: Sequence[str], about: dict[str, Any]) -> None:
    """Write the three files into `out`, each whole or not at all. `about`: what is told of the run, `protocol` first."""
    told = [f"{name}: {value}" for name, value in about.items()]
    lines = ["# Evaluation", "", *(f"* {line}" for line in (*told, *notes(rows, metrics))), "", table(rows, metrics), ""]
    values = {name: {**found, "mean": _plain(found["mean"])} for name, found in means(rows, metrics).items()}
    scored = [{**row, "scores": {k: _plain(v) for k, v in row["scores"].items()}} if "scores" in row else row for row in rows]
    text = json.dumps({**about, "notes": notes(rows, metrics), "means": values, "rows": scored}, indent=1, allow_nan=False)
    write_atomically(out / "scores.csv", _csv(rows, metrics).encode())
    write_atomically(out / "summary.md", "\n".join(lines).encode())
    write_atomically(out / "summary.json", f"{text}\n".encode())


def _csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "frames", "width", "height", *metrics, "error"])
    for row in rows:
        scores = row.get("scores", {})
        numbers = [f"{scores[name]:.{METRICS[name].digits + 2}f}" if name in scores else "" for name in metrics]
        writer.writerow(
            [row["name"], *(row.get(key, "") for key in ("frames", "width", "height")), *numbers, row.get("error", "")]
        )
    return text.getvalue()


def _plain(value: float) -> float | str:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else str(value)
