"""Plots as PNG and SVG, where matplotlib is there; what is missing is told in one line."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ebr_engine.errors import warn

FORMS = ("png", "svg")


def can_plot(tell: bool = True) -> bool:
    """Whether matplotlib is there; `tell`: how to get it where it is not."""
    if find_spec("matplotlib") is None:
        if tell:
            warn("no plots are drawn: matplotlib is missing: pip install 'ebr-engine[curves]'")
        return False
    return True


def draw_histogram(path: Path, values: Sequence[float], label: str) -> list[Path]:
    """A histogram of values, a line at zero; the files written, `path` with the suffixes of `FORMS`."""
    figure, (axes,) = _figure(1)
    axes.hist(values, bins="auto", color="#4477aa")
    axes.axvline(0, color="black", linewidth=1)
    axes.set(xlabel=label, ylabel="files")
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _saved(figure, path)


def draw_curves(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str) -> list[Path]:
    """Curves by their label, each in axes of its own; one of positive numbers that span decades gets a logarithmic axis."""
    figure, places = _figure(len(curves))
    for axes, (label, (positions, values)) in zip(places, curves.items()):
        axes.plot(positions, values, linewidth=1, marker="o" if len(values) < 20 else None, markersize=3)
        axes.set(xlabel=x, ylabel=label)
        if values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
    return _saved(figure, path)


def _figure(count: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * count, 3.5), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _saved(figure: Any, path: Path) -> list[Path]:
    from matplotlib import rc_context

    files = [path.with_suffix(f".{form}") for form in FORMS]
    for file in files:
        with rc_context({"svg.hashsalt": "ebr-engine"}):  # the same file from the same numbers
            figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
