"""What a person and a program read of a measurement: scores.csv (a line a file), summary.md and summary.json."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebr_engine.evaluation.choices import METRICS
from ebr_engine.evaluation.metrics import NON_COMMERCIAL
from ebr_engine.evaluation.plots import can_plot, draw_histogram
from ebr_engine.evaluation.run import Row, means
from ebr_engine.evaluation.statistics import INPUT, RESTORED, differences, gains, scores_of, ways_of, worst
from ebr_engine.evaluation.tables import Table, table
from ebr_engine.media.images import write_atomically

_PYIQA = ("dists", "clipiqa+", "musiq")
LISTED = 200  # files that the page lists; all are in scores.csv
BAR = 40  # characters of a histogram's longest bar


def score_table(rows: Sequence[Row], metrics: Sequence[str]) -> Table:
    """A line a metric: the mean of every way that was measured, what the restored files gain over the others, how many files."""
    ways = ways_of(rows) or [RESTORED]
    others = [way for way in ways if way != RESTORED]
    lines = []
    for name, found in means(rows, metrics).items():
        metric, gained = METRICS[name], differences(rows, name)
        cells = [_number(_mean_of(rows, way, name), metric.digits) for way in others]
        cells.append(_number(found["mean"], metric.digits))
        cells += [gained[way].text(metric.digits) if way in gained else "" for way in others]
        lines.append([metric.title, "higher" if metric.higher_is_better else "lower", *cells, found["files"]])
    return table(["metric", "better", *ways, *(f"{RESTORED} − {way}" for way in others), "files"], lines)


def seed_table(rows: Sequence[Row], metrics: Sequence[str]) -> Table | None:
    """A line a seed with its means, and their standard deviation; None of a single seed."""
    seeds = next((list(row["by_seed"]) for row in rows if "by_seed" in row), [])
    if not seeds:
        return None
    lines, columns = [], {name: [] for name in metrics}
    for seed in seeds:
        for name in metrics:
            values = [row["by_seed"][seed][name] for row in rows if name in row.get("by_seed", {}).get(seed, {})]
            columns[name].append(math.fsum(values) / len(values) if values else math.nan)
        lines.append([seed, *(_number(columns[name][-1], METRICS[name].digits) for name in metrics)])
    spread = [f"{statistics.stdev(columns[name]):.{METRICS[name].digits + 1}f}" for name in metrics]
    return table(["seed", *(METRICS[name].title for name in metrics)], [*lines, ["standard deviation", *spread]])


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


def write_summary(
    out: Path,
    rows: Sequence[Row],
    metrics: Sequence[str],
    about: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    sheets: Mapping[str, str] | None = None,
) -> None:
    """Write the three files into `out`, each whole or not at all, and where matplotlib is the histogram beside them.

    `about`: what is told of the run, `protocol` first. `facts`: its provenance, as data. `sheets`: name → picture in worst/.
    """
    lines = ["# Evaluation", "", *(f"* {name}: {value}" for name, value in about.items())]
    lines += [*(f"* {line}" for line in notes(rows, metrics)), "", *report(out, rows, metrics, sheets or {})]
    write_atomically(out / "scores.csv", _csv(rows, metrics).encode())
    write_atomically(out / "summary.md", "\n".join([*lines, ""]).encode())
    write_json(out / "summary.json", {**about, **(facts or {}), "notes": notes(rows, metrics), **as_data(rows, metrics)})


def report(out: Path, rows: Sequence[Row], metrics: Sequence[str], sheets: Mapping[str, str]) -> list[str]:
    """The page's sections: scores, seeds, gain by file with its histogram, worst files with pictures, all files."""
    lines = ["## Scores", "", score_table(rows, metrics).markdown(), ""]
    if any(one.low is not None for name in metrics for one in differences(rows, name).values()):
        lines += ["Differences are paired by file; in brackets, 95 % intervals of their mean (bootstrap over files).", ""]
    if seeds := seed_table(rows, metrics):
        lines += ["## Seeds", "", "Scores elsewhere are means over the seeds.", "", seeds.markdown(), ""]
    first = next(iter(means(rows, metrics)), None)
    if first is None:
        return lines
    gained = [value for value in gains(rows, first, INPUT).values() if math.isfinite(value)]
    if len(gained) > 1:
        lines += [f"## Gain in {METRICS[first].title} over the input", "", histogram(gained, first).markdown(), ""]
        if can_plot():
            draw_histogram(out / "gain.png", gained, f"gain in {METRICS[first].title} over the input")
            lines += ["![Histogram](gain.png)", ""]
    if worst(rows, first):
        kind = "gained least over their input" if gained else "scored least"
        lines += [f"## Worst files: those that {kind} in {METRICS[first].title}", ""]
        for name in worst(rows, first):
            lines += [f"* {name}: {_in_words(rows, name, metrics)}"]
            lines += ["", f"  ![{name}](worst/{sheets[name]})", ""] if name in sheets else []
        lines += [""]
    return [*lines, "## Files", "", *_files(rows, metrics)]


def histogram(values: Sequence[float], metric: str) -> Table:
    """How many values lie between which bounds; a bar each."""
    digits, finite = METRICS[metric].digits, np.asarray(values)
    counts, edges = np.histogram(finite, min(10, max(3, len(values) // 2)))
    bars = ["█" * round(BAR * count / counts.max()) for count in counts]
    bounds = zip(edges[:-1], edges[1:])
    return table(
        ["from", "to", "files", ""],
        [[f"{a:+.{digits}f}", f"{b:+.{digits}f}", count, bar] for (a, b), count, bar in zip(bounds, counts, bars)],
    )


def as_data(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Means, means by way, differences with their intervals, worst files and rows, as JSON holds them."""
    first = next(iter(means(rows, metrics)), None)
    ways = {way: {name: _plain(_mean_of(rows, way, name)) for name in metrics} for way in ways_of(rows)}
    return {
        "means": {name: {**found, "mean": _plain(found["mean"])} for name, found in means(rows, metrics).items()},
        "ways": {way: {name: mean for name, mean in found.items() if mean is not None} for way, found in ways.items()},
        "differences": {name: {way: one.data() for way, one in differences(rows, name).items()} for name in metrics},
        "worst": worst(rows, first) if first else [],
        "rows": [_plain(row) for row in rows],
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write what JSON can hold, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _files(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    header, lines = _by_file(rows, metrics, more=0)
    shown = table(header, lines[:LISTED]).markdown()
    return [shown, *(["", f"The first {LISTED} of {len(lines)}; all are in scores.csv."] if len(lines) > LISTED else [])]


def _csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    text = io.StringIO()
    header, lines = _by_file(rows, metrics, more=2)
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()


def _by_file(rows: Sequence[Row], metrics: Sequence[str], more: int) -> tuple[list[str], list[list[Any]]]:
    """Header and lines of the table of files; numbers have `more` digits than a mean."""
    columns = [(name, RESTORED, False) for name in metrics]
    others = [way for way in ways_of(rows) if way != RESTORED]
    columns += [(name, way, gain) for way in others for name in metrics for gain in (False, True)]
    names = [name if way == RESTORED else f"{name} gain over {way}" if gain else f"{name} {way}" for name, way, gain in columns]
    lines = []
    for row in rows:
        cells = []
        for name, way, gain in columns:
            value = gains([row], name, way).get(row["name"]) if gain else scores_of(row, way).get(name)
            known = value is not None and not math.isnan(value)
            cells.append(f"{value:{'+' if gain else ''}.{METRICS[name].digits + more}f}" if known else "")
        sizes = [row.get(key, "") for key in ("frames", "width", "height")]
        lines.append([row["name"], *sizes, *cells, row.get("error", "")])
    return ["name", "frames", "width", "height", *names, "error"], lines


def _in_words(rows: Sequence[Row], name: str, metrics: Sequence[str]) -> str:
    row = next(row for row in rows if row["name"] == name)
    parts = []
    for way in ways_of(rows):
        scores = [f"{scores_of(row, way)[x]:.{METRICS[x].digits}f}" for x in metrics if x in scores_of(row, way)]
        parts.append(f"{way} {' / '.join(scores)}")
    return ", ".join(parts)


def _mean_of(rows: Sequence[Row], way: str, metric: str) -> float | None:
    values = [scores_of(row, way)[metric] for row in rows if metric in scores_of(row, way)]
    return math.fsum(values) / len(values) if values else None


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    """What JSON can hold: it knows no infinity."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
