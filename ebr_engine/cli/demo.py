"""`ebr-engine demo`: restore the bundled degraded photos, side by side with what they were."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where to write the pictures.")] = Path("demo"),
) -> None:
    """Restore three bundled photos (hazy, dark, rainy) with mini, and write each beside its input.

    [bold]ebr-engine demo[/]
    """
    from ebr_engine.cli.progress import Progress
    from ebr_engine.errors import EbrError
    from ebr_engine.jobs.files import plan_jobs
    from ebr_engine.jobs.recipe import Recipe
    from ebr_engine.jobs.run import run_jobs
    from ebr_engine.prompts.catalogue import ASSETS

    photos = sorted((ASSETS / "demo").glob("*.jpg"))
    if not photos:
        raise EbrError(f"no photos in {ASSETS / 'demo'}: the installation is not complete")
    with Progress(len(photos)) as progress:
        from ebr_engine.engine.restorer import Restorer

        restorer = Restorer()
        failed = 0
        for photo in photos:  # named by task: haze.jpg
            jobs = plan_jobs([photo], str(out), compare=True, overwrite=True)
            failed += run_jobs(restorer, jobs, {None: Recipe({"plan": restorer.plan(photo.stem)})}, progress)
    if failed:
        raise typer.Exit(1)
    typer.echo(f"\nInput beside output: {out}/*_compare.png")
