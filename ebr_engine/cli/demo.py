"""`ebr-engine demo`: restore the bundled degraded photos, side by side with what they were."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where to write the pictures.")] = Path("demo"),
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="FOLDER", help="Only copy the degraded photos there, to try commands on.")
    ] = None,
) -> None:
    """Restore three bundled photos (hazy, dark, rainy) with mini, and write each beside its input.

    [bold]ebr-engine demo[/]

    [bold]ebr-engine demo --inputs photos/[/]
    """
    from ebr_engine.errors import EbrError
    from ebr_engine.prompts.catalogue import ASSETS

    photos = sorted((ASSETS / "demo").glob("*.jpg"))
    if not photos:
        raise EbrError(f"no photos in {ASSETS / 'demo'}: the installation is not complete")
    if inputs is not None:
        folder = inputs.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for photo in photos:
            shutil.copyfile(photo, folder / photo.name)
        typer.echo(f"{folder}: {', '.join(photo.name for photo in photos)}")
        typer.echo(f"Next: ebr-engine restore {folder / photos[0].name} -o clear.jpg --task {photos[0].stem}")
        return

    from ebr_engine.cli.progress import Display
    from ebr_engine.jobs.files import check_jobs, pair_inputs
    from ebr_engine.jobs.run import run_work
    from ebr_engine.jobs.work import Work
    from ebr_engine.request import RestoreRequest

    asked = {photo: RestoreRequest(task=photo.stem, compare="side") for photo in photos}  # named by task: haze.jpg
    folder = str(out.expanduser())
    jobs = [replace(job, request=asked[job.source]) for job in pair_inputs(photos, folder, compare=True)]
    check_jobs(jobs, overwrite=True)
    with Display(len(jobs)) as progress:
        from ebr_engine.engine.restorer import Restorer

        failed = run_work(Restorer(), Work(jobs, {}), progress)
    if failed:
        raise typer.Exit(1)
    typer.echo(f"\nInput beside output: {folder}/*_compare.png")
    typer.echo("Next, a photo of your own: ebr-engine restore photo.jpg -o better.jpg --task auto")
