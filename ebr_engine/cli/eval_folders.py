"""The part of `ebr-engine eval` that makes tables of folders of results."""

from pathlib import Path

import typer

from ebr_engine.errors import EbrError


def show_folders(folders: list[Path], compare: bool, form: str, out: Path | None) -> None:
    """Print the table of several folders, or of two against each other; into the file `out` too, if one is named."""
    from ebr_engine.evaluation.collecting import collected, compared

    if compare and len(folders) != 2:
        raise EbrError(f"--compare takes two folders of results, not {len(folders)}")
    if not folders:
        raise EbrError("--collect takes folders of results")
    if out is not None and out.is_dir():
        raise EbrError(f"{out}: is a folder; name a file for the table")
    if compare:
        means, by_file, notes = compared(*folders)
        text = "\n\n".join([means.render(form), by_file.render(form)])
    else:
        text, notes = collected(folders).render(form), []
    typer.echo(text)
    for note in notes:
        typer.echo(note, err=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
