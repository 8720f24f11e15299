"""Paired differences between two ways over the same files, with bootstrap intervals of their mean.

The interval is the percentile bootstrap over files (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979). It tells
how much the mean depends on which files were drawn; of a handful of files it is too narrow.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ebr_engine.evaluation.choices import METRICS

LEVEL = 0.95
RESAMPLES = 10_000
AT_ONCE = 10_000_000  # numbers drawn together
WORST = 5  # files that a report shows


@dataclass(frozen=True)
class Difference:
    """How much one way differs from another: mean over files, its interval (None of a single file), in how many it is better."""

    mean: float
    low: float | None
    high: float | None
    files: int
    better: int

    def text(self, digits: int) -> str:
        """`+0.48 [+0.40, +0.55]`."""
        interval = "" if self.low is None else f" [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return f"{self.mean:+.{digits}f}{interval}"

    def data(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def interval(values: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of the mean of at least two finite values; the same on every call."""
    drawn, numbers = np.random.default_rng(seed), np.asarray(values, float)
    part = max(1, AT_ONCE // len(numbers))
    counts = [min(part, resamples - first) for first in range(0, resamples, part)]
    means = np.concatenate([drawn.choice(numbers, (count, len(numbers))).mean(1) for count in counts])
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2)).tolist()
    return low, high


def difference(pairs: Iterable[tuple[float, float]], metric: str) -> Difference | None:
    """Of (one, other) by file: one − other. Pairs without a finite difference are left out; None where none is left."""
    values = [one - other for one, other in pairs]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    bounds = interval(values) if len(values) > 1 else (None, None)
    better = sum(METRICS[metric].sign * value > 0 for value in values)
    return Difference(math.fsum(values) / len(values), *bounds, len(values), better)


RESTORED, INPUT, EMPTY = "restored", "input", "empty prompt"
WAYS = (INPUT, EMPTY, RESTORED)


def scores_of(row: Mapping[str, Any], way: str) -> Mapping[str, float]:
    """A row's scores of one way; none where it was not measured."""
    return row.get("scores", {}) if way == RESTORED else row.get("beside", {}).get(way, {})


def ways_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ways that any row was measured in."""
    rows = list(rows)
    return [way for way in WAYS if any(scores_of(row, way) for row in rows)]


def gains(rows: Iterable[Mapping[str, Any]], metric: str, over: str) -> dict[str, float]:
    """Name → score of the restored file minus that of another way, where both are known."""
    pairs = ((row["name"], scores_of(row, RESTORED).get(metric), scores_of(row, over).get(metric)) for row in rows)
    return {name: one - other for name, one, other in pairs if one is not None and other is not None}


def differences(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Difference]:
    """How much the restored files differ from every other way."""
    found = {}
    for way in ways_of(rows):
        if way == RESTORED:
            continue
        both = [(scores_of(row, RESTORED).get(metric), scores_of(row, way).get(metric)) for row in rows]
        found[way] = difference(((a, b) for a, b in both if a is not None and b is not None), metric)
    return {way: one for way, one in found.items() if one is not None}


def worst(rows: Sequence[Mapping[str, Any]], metric: str, count: int = WORST) -> list[str]:
    """Names of the files that gained least over their input, or where no input is known scored least; the worst first."""
    found = gains(rows, metric, INPUT) or {
        row["name"]: row["scores"][metric] for row in rows if metric in scores_of(row, RESTORED)
    }
    sign = METRICS[metric].sign
    return sorted(found, key=lambda name: (math.inf if math.isnan(found[name]) else sign * found[name], name))[:count]
