"""`ebr-engine inspect`: what a file holds beside its pixels, and what becomes of it in another format."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ebr_engine.errors import EbrError


def inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Pictures, clips and sounds.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FORMAT", show_default="the file's own", help="Such as jpg, png, avif, mp4 or mkv."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where something would not be kept.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a file, for programs.")] = False,
) -> None:
    """List what files hold beside their pixels, and whether a restored file keeps it.

    [bold]ebr-engine inspect photo.jpg --to webp[/]
    """
    lost = False
    for path in files:
        found = collect(path, to)
        lost = lost or any(each["fate"] == "not kept" for each in found["holdings"])
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _show(found)
    if strict and lost:
        raise typer.Exit(1)


def collect(path: Path, to: str | None = None) -> dict[str, Any]:
    """A file's holdings with their fates in a format, as plain values."""
    from ebr_engine.media.holdings import FATES, format_of, inventory, outcomes
    from ebr_engine.media.holdings.images import kind_of_file
    from ebr_engine.media.kinds import is_sound

    if path.is_dir():
        raise EbrError(f"{path}: is a folder; name files")
    kind = kind_of_file(path)
    own = kind if kind and kind not in ("heic", "bmp", "jxl") else "png" if kind else format_of(path)
    format = format_of(f"x.{to.lower().lstrip('.')}") if to else own
    known = {name for fates in FATES.values() for name in fates}
    if format not in known:
        raise EbrError(f"--to {to or format}: not a format that is written; choose from {' '.join(sorted(known))}")
    sound = is_sound(path) and kind is None
    held = outcomes(inventory(path), format, clip=kind is None and not sound)
    holdings = [
        {
            "kind": each.holding.kind,
            "where": each.holding.where,
            "detail": each.holding.detail,
            "bytes": each.holding.size,
            "fate": each.fate.value,
            "how": each.how,
        }
        for each in held
    ]
    return {"file": str(path), "kind": kind or ("sound" if sound else "video"), "to": format, "holdings": holdings}


def _show(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    console.print(f"{found['file']}: {found['kind']}, to {found['to']}", markup=False)
    if not found["holdings"]:
        console.print("  nothing beside its pixels")
        return
    table = Table("what", "where", "", "bytes", "fate", box=box.SIMPLE, pad_edge=False)
    colours = {"kept": "green", "converted": "yellow", "not kept": "red"}

    for each in found["holdings"]:
        fate = Text(each["fate"], style=colours[each["fate"]]) + Text(f": {each['how']}" if each["how"] else "")
        table.add_row(Text(each["kind"]), Text(each["where"]), Text(each["detail"]), str(each["bytes"]), fate)
    console.print(table)
