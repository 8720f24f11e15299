"""`ebr-engine cache-latents`: encode the pairs of a learning run ahead of it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.errors import EbrError


def cache_latents(
    cache: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The cache; made if missing, added to otherwise.")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", metavar="PATH", help="Pairs, as train takes them.", show_default=False)
    ] = None,
    views: Annotated[int | None, typer.Option("--views", metavar="N", show_default="1", help="Crops of each pair.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE.toml", help="Settings of the run that it is for.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE...", help="Any of them; see train --settings.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", metavar="NAME", show_default="mini", help="mini, wan or flux.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="SOURCE", show_default="the backbone's own", help="Other weights of it."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="N or HxW", show_default="by backbone", help="Height and width of the crops.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", metavar="N", show_default="by backbone", help="Frames of a crop (wan: 4n + 1).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", show_default="0", help="The run's: it draws the crops.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", show_default="auto", help="auto, cpu or cuda:N.")
    ] = None,
) -> None:
    """Encode every crop that a run will learn from: kept by content, codec and size, verified when read.

    Interrupted, the same command goes on. train uses it with the same settings and --set cache=FOLDER --set views=N.

    [bold]ebr-engine cache-latents --data pairs/ --backbone wan --views 4 -o latents/[/]
    """
    from ebr_engine.cli.train import configured
    from ebr_engine.training.config import read_assignments, read_toml

    said = (read_toml(config) if config else {}) | read_assignments(settings or [])
    if not (data or said.get("data")):
        raise EbrError("name the pairs with --data")
    # What a run has to say and a cache need not.
    needless = [f"{name}={value}" for name, value in (("task", "any"), ("views", "1")) if name not in said]
    given = {"data": data, "backbone": backbone, "model": model, "size": size, "frames": frames, "seed": seed, "device": device}
    given |= {"cache": cache, "views": views}
    chosen = configured(config, [*(settings or []), *needless], given)

    from ebr_engine.training.data import pair_samples
    from ebr_engine.training.distributed import World
    from ebr_engine.training.latents import fill_cache
    from ebr_engine.training.learner import check_fits
    from ebr_engine.training.loop import load_parts

    started = time.monotonic()
    samples = pair_samples(chosen, chosen.data)
    loaded = load_parts(chosen, chosen.device)
    check_fits(chosen, loaded, World())

    def told(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0:
            typer.echo(f"{done}/{total}  {time.monotonic() - started:.0f} s", err=True)

    made, there = fill_cache(chosen, samples, loaded, told)
    skipped = f", {len(samples.bad)} pair(s) skipped" if samples.bad else ""
    typer.echo(f"{cache}  {made} made, {there} there{skipped}, {time.monotonic() - started:.1f} s")
