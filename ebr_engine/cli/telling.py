"""Errors in one line on stderr."""

import typer


def tell(line: str, kind: str = "error") -> None:
    """`error: line`, or another kind of line, on stderr."""
    typer.secho(f"{kind}: ", err=True, fg=typer.colors.RED, nl=False)
    typer.echo(line, err=True)
