"""Errors in one line on stderr."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ebr_engine.errors import EbrError, EngineWarning


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


def one_line(error: BaseException) -> str | None:
    """What to tell a person about an expected error; None for an error that is nobody's input, but a bug."""
    if isinstance(error, EbrError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OSError):
        return " ".join(str(error).split()) or type(error).__name__
    if out_of_memory(error):
        return "not enough memory; a smaller --tile needs less"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether torch (on any device) or Python ran out of memory; told by name, so that torch need not be imported."""
    by_name = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or by_name
