"""Errors in one line on stderr."""

import typer

from ebr_engine.errors import EbrError


def tell(line: str, kind: str = "error") -> None:
    """`error: line`, or another kind of line, on stderr."""
    typer.secho(f"{kind}: ", err=True, fg=typer.colors.RED, nl=False)
    typer.echo(line, err=True)


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
