"""What a person reads of a GPU check: the page of all rows, and the summary at the end of the output, which is short."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.report import describe

LIMIT = 12_000  # characters of the summary: what many a remote machine keeps of an output's end
LINE = 170  # characters of one of its lines
FAILURES = 30  # of a section, in the summary
SHOWN = 14  # rows of a section, in the summary
WORST = 6  # operations, those farthest from their floor
NAMES = ("model", "operation", "sizes", "layer", "form", "precision", "codec", "result", "m", "section")  # what a row is of
FIGURES = (
    "ms",
    "ours ms",
    "x first",
    "x library",
    "x plain",
    "x bf16",
    "x forward",
    "share",
    "TFLOP/s",
    "GB/s",
    "RMS from first",
)
FIGURES += ("RMS from plain", "peak GB", "crops a second", "fastest", "minutes", "loss")


def problems(section: dict[str, Any]) -> list[dict[str, Any]]:
    """What went wrong in a section: rows with an error or a result out of bounds, and its own end."""
    wrong = [row for row in section["rows"] if row.get("ok") is False or row.get("failed") or failed(row.get("error"))]
    return wrong + ([] if section["status"] == "done" else [{"error": section["status"]}])


def failed(error: Any) -> bool:
    """Whether a row's error is one, not a form that was left out; a number is a measured error."""
    return isinstance(error, str) and not error.startswith("left out")


def summary(result: dict[str, Any], titles: Mapping[str, str]) -> list[str]:
    """What matters, in at most `LIMIT` characters: device, versions, commit; what failed; each section's state and medians."""
    head = [f"GPU check{' (tiny, nothing measured)' if result['tiny'] else ''}", *about(result)]
    sections = result["sections"]
    bad = {name: wrong for name, section in sections.items() if (wrong := problems(section))}
    head.append(
        f"{len(sections) - len(bad)} of {len(sections)} sections without a fault"
        + (f"; faults in {', '.join(bad)}" if bad else "")
    )
    faults = []
    for name, wrong in bad.items():
        faults += [f"! {name}: {one_line(row)}" for row in wrong[:FAILURES]]
        faults += [f"! {name}: {len(wrong) - FAILURES} more"] if len(wrong) > FAILURES else []
    body = []
    for name, section in sections.items():
        body.append(f"{name}: {section['status']}, {section['seconds']:.0f} s: {titles[name]}")
        body += [f"  {line}" for line in essentials(section["rows"])]
    kept = shortened(head, LIMIT // 4) + shortened(faults, LIMIT // 3)
    return kept + shortened(body, LIMIT - 200 - sum(len(line) + 1 for line in kept))


def about(result: dict[str, Any]) -> list[str]:
    """Machine, versions, and what was measured."""
    return [*describe(result), f"sources {result['sources']}, driver {result['driver']}"]


def shortened(lines: Sequence[str], room: int) -> list[str]:
    """Lines, none too long, as many as fit; those after them are counted."""
    kept, used = [], 0
    for place, line in enumerate(lines):
        line = line if len(line) <= LINE else line[: LINE - 1] + "…"
        if used + len(line) + 40 > room:
            return [*kept, f"… {len(lines) - place} more lines in the file"]
        kept.append(line)
        used += len(line) + 1
    return kept


def essentials(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A section's medians; of many checked or timed operations how many, and the worst."""
    checked = [row for row in rows if "ok" in row and "plain" in row]
    if checked:
        ratios = [row["error"] / max(row["plain"], 1e-9) for row in checked if isinstance(row["error"], float) and row["plain"]]
        ratio = f"; error over plain torch's: median {median(ratios):.2f}, largest {max(ratios):.2f}" if ratios else ""
        yield f"{sum(row['ok'] for row in checked)} of {len(checked)} results as good as plain torch's{ratio}"
    timed = [row for row in rows if "ours ms" in row]
    if len(timed) > SHOWN:
        shares = [row["share"] for row in timed]
        yield f"{len(timed)} operations timed; share of the floor: median {median(shares):.2f}; the farthest from it:"
        timed = sorted(timed, key=lambda row: row["share"])[:WORST]
    others = [row for row in rows if "ok" not in row or "plain" not in row]
    others = [row for row in others if "ours ms" not in row and not failed(row.get("error")) and not row.get("failed")]
    for row in [*timed, *others[:SHOWN]]:
        yield one_line(row, figures=True)
    if len(others) > SHOWN:
        yield f"{len(others) - SHOWN} more rows in the file"


def one_line(row: Mapping[str, Any], figures: bool = False) -> str:
    """A row in short: what it is of and its figures, or all that it says."""
    if figures and any(name in row for name in FIGURES):
        named = [str(row[name]) for name in NAMES if row.get(name) not in (None, "")]
        return ", ".join([*named, *(f"{name} {cell(row[name])}" for name in FIGURES if name in row)])
    return ", ".join(f"{name} {cell(value)}" for name, value in row.items() if not isinstance(value, list))


def markdown(result: dict[str, Any], titles: Mapping[str, str]) -> str:
    """Both what was measured and on what, as a page."""
    lines = [f"# GPU check{' (tiny)' if result['tiny'] else ''}", "", *(f"* {line}" for line in about(result)), ""]
    for name, section in result["sections"].items():
        lines += [f"## {titles[name]}", "", f"`{name}`: {section['status']}, {section['seconds']:.1f} s.", ""]
        wrong = problems(section)
        if section["rows"]:
            lines += [*table(section["rows"]), ""]
        if wrong:
            lines += [f"{len(wrong)} of {len(section['rows'])} rows are not as they should be.", ""]
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Rows as a Markdown table; columns in the order in which they first come."""
    names = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list)))  # quartiles are in the JSON
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        cells = ("" if row.get(name) is None else cell(row[name]) for name in names)
        yield f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |"


def cell(value: Any) -> str:
    """A number in three digits, or a text as it is."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
