"""Errors in one line on stderr."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ebr_engine.errors import EngineWarning


def tell(line: str, kind: str = "error") -> None:
    """`error: line`, or another kind of line, on stderr."""
    typer.secho(f"{kind}: ", err=True, fg=typer.colors.RED, nl=False)
    typer.echo(line, err=True)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Warnings of the engine are told as they come, in a line each; others are left out."""

    def show(message: Warning, *where: object) -> None:
        if isinstance(message, EngineWarning):
            tell(str(message), "warning")

    with warnings.catch_warnings():
        warnings.simplefilter("always", EngineWarning)
        warnings.showwarning = show
        yield
