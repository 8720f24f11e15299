"""Tables over folders of results: several beside each other, or two compared file by file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebr_engine.errors import EbrError
from ebr_engine.evaluation.choices import METRICS
from ebr_engine.evaluation.statistics import RESTORED, WAYS, Difference, difference, scores_of
from ebr_engine.evaluation.tables import Table, table

SHOWN = 5  # files at either end of a comparison


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a measurement or a learning run; `EbrError` for a folder without one."""
    file = folder / "summary.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EbrError(f"{folder}: has no summary.json; is it a folder of results?") from error
    except ValueError as error:
        raise EbrError(f"{file}: is damaged: {error}") from error
    if not isinstance(found, dict) or not {"means", "rows"} <= found.keys():
        raise EbrError(f"{file}: is not the summary of a measurement")
    return found


def collected(folders: Sequence[Path]) -> Table:
    """A line a folder and metric: the mean of every way, and what was gained over the input, with its interval."""
    lines = []
    for folder in folders:
        summary = read_summary(folder)
        for name, found in summary["means"].items():
            digits = METRICS[name].digits
            ways = {way: scores.get(name) for way, scores in summary.get("ways", {}).items()}
            ways[RESTORED] = found["mean"]
            cells = [f"{float(ways[way]):.{digits}f}" if ways.get(way) is not None else "" for way in WAYS]
            gained = [summary.get("differences", {}).get(name, {}).get(way) for way in WAYS[:-1]]
            cells += [Difference(**one).text(digits) if one else "" for one in gained]
            lines.append([folder.name, METRICS[name].title, *cells, found["files"]])
    header = ["run", "metric", *WAYS, *(f"{RESTORED} − {way}" for way in WAYS[:-1]), "files"]
    used = [i for i, title in enumerate(header) if title not in WAYS[:-1] or any(line[i] for line in lines)]
    used = [i for i in used if "−" not in header[i] or any(line[i] for line in lines)]
    return table([header[i] for i in used], [[line[i] for i in used] for line in lines])


def compared(first: Path, second: Path) -> tuple[Table, Table, list[str]]:
    """The second folder against the first: means with paired differences, the files that differ most, and what else differs.

    Raises `EbrError` where they have no file in common.
    """
    summaries = [read_summary(folder) for folder in (first, second)]
    rows = [{row["name"]: row for row in summary["rows"]} for summary in summaries]
    names = [name for name in rows[0] if name in rows[1]]
    lines, by_file = [], []
    for metric in METRICS:
        pairs = {name: [scores_of(side[name], RESTORED).get(metric) for side in rows] for name in names}
        pairs = {name: tuple(map(float, pair)) for name, pair in pairs.items() if None not in pair}
        gained = difference(((new, old) for old, new in pairs.values()), metric)
        if gained is None:
            continue
        digits = METRICS[metric].digits
        sides = [f"{sum(pair[i] for pair in pairs.values()) / len(pairs):.{digits}f}" for i in (0, 1)]
        lines.append([METRICS[metric].title, *sides, gained.text(digits), f"{gained.better} of {gained.files}"])
        by_file = by_file or [
            [name, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new - old:+.{digits}f}"]
            for name, (old, new) in sorted(pairs.items(), key=lambda item: METRICS[metric].sign * (item[1][1] - item[1][0]))
        ]
    if not lines:
        raise EbrError(f"{first} and {second} have no file with a score in common")
    labels = [first.name, second.name] if first.name != second.name else [str(first), str(second)]
    header = ["metric", *labels, "difference", f"better in {labels[1]}"]
    shown = by_file if len(by_file) <= 2 * SHOWN else [*by_file[:SHOWN], ["…", "", "", ""], *by_file[-SHOWN:]]
    return table(header, lines), table(["file", *labels, "difference"], shown), _notes(summaries, rows, names, labels)


def _notes(summaries: list[dict], rows: list[dict], names: list[str], labels: list[str]) -> list[str]:
    lines = [
        f"{len(side) - len(names)} file(s) are in {label} only" for side, label in zip(rows, labels) if len(side) > len(names)
    ]
    for key in ("protocol", "data", "restoration"):
        one, other = (_flat(summary.get(key), key) for summary in summaries)
        for name in one.keys() | other.keys():
            if one.get(name) != other.get(name):
                lines.append(f"{name}: {one.get(name)} in {labels[0]}, {other.get(name)} in {labels[1]}")
    return sorted(lines)


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested values by their path."""
    if isinstance(value, dict):
        return {key: one for part, inside in value.items() for key, one in _flat(inside, f"{name}.{part}").items()}
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return {key: one for i, inside in enumerate(value) for key, one in _flat(inside, f"{name}.{i}").items()}
    return {name: value}
