"""Tables and plots of an experiment: means, and paired differences with bootstrap intervals over photos and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from benchmarks.claims.common import Row, Study, cells, in_order
from benchmarks.report import about, describe
from ebr_engine.media.images import write_atomically

DRAWS = 4000


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and the interval that holds it with 95 % by the bootstrap."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def sign(self) -> str:
        """Whether the interval excludes 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference shown"


def difference(rows: Sequence[Row], arm: str, reference: str, value: str = "psnr") -> Difference:
    """How much better an arm is than another in the cells that both have, which have to be the same.

    Photos and seeds are drawn with replacement, independently of each other; tasks are all that there are, so they stay.
    """
    ours, theirs = cells(rows, arm, value), cells(rows, reference, value)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{arm!r} and {reference!r} were not measured on the same cells")
    tasks, photos, seeds = (sorted({key[i] for key in ours}) for i in range(3))
    gaps = np.array([[[ours[t, p, s] - theirs[t, p, s] for s in seeds] for p in photos] for t in tasks]).mean(0)
    random = np.random.default_rng(0)
    chosen = random.integers(len(photos), size=(DRAWS, len(photos), 1)), random.integers(len(seeds), size=(DRAWS, 1, len(seeds)))
    low, high = np.percentile(gaps[chosen].mean((1, 2)), (2.5, 97.5))
    return Difference(float(gaps.mean()), float(low), float(high))


def table(rows: Sequence[Row], reference: str) -> str:
    """Markdown: an arm a line, means over everything and by task, and its difference to the reference."""
    tasks = in_order(rows, "task")
    lines = [f"| arm | PSNR dB | against {reference} | SSIM | {' | '.join(tasks)} |", "|---" * (4 + len(tasks)) + "|"]
    for arm in in_order(rows, "arm"):
        values, similar = cells(rows, arm), cells(rows, arm, "ssim")
        gap = "reference" if arm == reference else str(difference(rows, arm, reference))
        by_task = [f"{_mean([v for (t, *_), v in values.items() if t == task]):.2f}" for task in tasks]
        found = f"{_mean(values.values()):.2f} | {gap} | {_mean(similar.values()):.3f}"
        lines.append(f"| {arm} | {found} | {' | '.join(by_task)} |")
    return "\n".join(lines)


def means_by_task(rows: Sequence[Row], value: str, name: str, digits: int) -> list[str]:
    """A note an arm: the means by task of a value that the table has not, `name` to a person."""
    notes = []
    for arm in in_order(rows, "arm"):
        values = cells(rows, arm, value)
        by_task = {task: _mean([v for (t, *_), v in values.items() if t == task]) for task in in_order(rows, "task")}
        notes.append(f"{name} of {arm}: " + ", ".join(f"{task} {mean:.{digits}f}" for task, mean in by_task.items()))
    return notes


def finish(
    study: Study,
    question: str,
    rows: Sequence[Row],
    reference: str,
    command: str,
    notes: Sequence[str] = (),
    learned: bool = True,
) -> str:
    """Write NAME.md and NAME.svg beside the store; returns the table's text. `learned`: whether the study learns its prompts."""
    others = [arm for arm in in_order(rows, "arm") if arm != reference]
    gaps = {arm: difference(rows, arm, reference) for arm in others}
    learning = study.learning
    budget = f"{learning.iterations} iterations of {learning.batch} crops of {learning.size} pixels, T0 {learning.t0:g}"
    several = len(study.seeds) > 1
    how = [
        f"{len(study.photos)} photos of {study.size} x {study.size} pixels ({', '.join(study.photos)}), {len(study.seeds)} seed"
        + "s" * several
        + f", {study.steps} evaluations" * learned
        + f"; tasks: {', '.join(study.tasks)}",
        f"learned in {budget}" if learned else "the prompts are the bundled ones: nothing is learned",
        f"differences in dB with 95 % bootstrap intervals over photos{' and seeds' * several}, {DRAWS} draws",
        *notes,
    ]
    if study.quick:
        how.insert(0, "QUICK FORM: the numbers mean nothing")
    text = table(rows, reference)
    plot = study.out / f"{study.name}.svg"
    write_atomically(plot, forest(gaps, f"PSNR in dB against: {reference}").encode())
    lines = [f"# {question}", "", text, "", f"![Differences]({plot.name})", "", *(f"* {line}" for line in how), ""]
    lines += ["Made by", "", f"    {command}", "", *(f"{line}  " for line in describe(about())), ""]
    write_atomically(study.out / f"{study.name}.md", "\n".join(lines).encode())
    print(f"{question}\n\n{text}\n")
    for arm, gap in gaps.items():
        print(f"{arm}: {gap} dB, {gap.sign}")
    return text


def forest(gaps: dict[str, Difference], title: str) -> str:
    """A plot as SVG: a line an arm, its mean difference as a dot and the interval as a bar, and zero."""
    width, left, row, top = 760, 300, 24, 50
    low = min([0.0, *(gap.low for gap in gaps.values())])
    high = max([0.0, *(gap.high for gap in gaps.values())])
    span = max(high - low, 1e-9)

    def x(value: float) -> float:
        return left + (value - low) / span * (width - left - 40)

    height = top + row * len(gaps) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
    ]
    parts.append(
        f'<rect width="{width}" height="{height}" fill="white"/><text x="12" y="24" font-weight="bold">{escape(title)}</text>'
    )
    parts.append(
        f'<line x1="{x(0):.1f}" y1="{top - 14}" x2="{x(0):.1f}" y2="{height - 30}" stroke="#999" stroke-dasharray="4 3"/>'
    )
    for i, (arm, gap) in enumerate(gaps.items()):
        y = top + row * i
        colour = {"better": "#1a7f37", "worse": "#cf222e"}.get(gap.sign, "#57606a")
        parts.append(f'<text x="12" y="{y + 4}">{escape(arm)}</text>')
        parts.append(f'<line x1="{x(gap.low):.1f}" y1="{y}" x2="{x(gap.high):.1f}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<circle cx="{x(gap.mean):.1f}" cy="{y}" r="5" fill="{colour}"/>')
    for value in {low, 0.0, high}:
        parts.append(f'<text x="{x(value):.1f}" y="{height - 12}" text-anchor="middle" fill="#57606a">{value:+.2f}</text>')
    return "\n".join([*parts, "</svg>", ""])


def command_of(module: str, arguments: Sequence[str] | None, given: Sequence[str]) -> str:
    """The command line that made a result, but for where learned prompts were kept."""
    words = list(given if arguments is None else arguments)
    kept = [word for before, word in zip(["", *words], words) if "--work" not in (before, word)]
    return " ".join(["python -m", f"benchmarks.claims.{Path(module).stem}", *kept])


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
