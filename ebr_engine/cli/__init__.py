"""The `ebr-engine` command.

One file a command; `group.COMMANDS` is the whole list, `options` what they have in common; what they do lies in `jobs`,
`training` and `evaluation`. A command's file holds its signature and help, and is imported when help or the command itself is
asked for: at its top it may import only light things (typer, the standard library).
"""

from typing import Annotated

import typer

from ebr_engine.cli.group import EbrGroup
from ebr_engine.cli.process import begin
from ebr_engine.cli.threads import use_cores
from ebr_engine.version import __version__

app = typer.Typer(
    cls=EbrGroup,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ebr-engine {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def ebr_engine(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors (or set EBR_DEBUG=1).")] = False,
) -> None:
    """Restore photos with a frozen diffusion transformer and a learned prompt, or learn such prompts."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Entry point of the `ebr-engine` script."""
    ending = begin()
    use_cores()
    try:
        app(prog_name="ebr-engine")
    except SystemExit as left:
        ending.code = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
