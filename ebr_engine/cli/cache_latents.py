"""`ebr-engine cache-latents`: encode the pairs of a learning run ahead of it."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ebr_engine.cli import options
from ebr_engine.cli.learning_options import with_settings
from ebr_engine.errors import EbrError


@with_settings("data", "views", "backbone", "model", "size", "frames", "seed", "device", panels=False, views="1")
def cache_latents(
    given: dict[str, Any],
    cache: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The cache; made if missing, added to otherwise.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE.toml", help="Settings of the run that it is for.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE...", help="Any of them; see train --settings.")
    ] = None,
    cluster: options.cluster(None) = None,
    cluster_cores: options.cores(None) = 1,
) -> None:
    """Encode every crop that a run will learn from: kept by content, codec and size, verified when read.

    Interrupted, the same command goes on. train uses it with the same settings and --set cache=FOLDER --set views=N.

    [bold]ebr-engine cache-latents --data pairs/ --backbone wan --views 4 -o latents/[/]
    """
    from ebr_engine.cli.train import configured
    from ebr_engine.training.config import read_assignments, read_toml

    said = (read_toml(config) if config else {}) | read_assignments(settings or [])
    if not (given.get("data") or said.get("data")):
        raise EbrError("name the pairs with --data")
    # What a run has to say and a cache need not.
    needless = [f"{name}={value}" for name, value in (("task", "any"), ("views", "1")) if name not in said]
    chosen = configured(config, [*(settings or []), *needless], given | {"cache": cache})

    from ebr_engine.training.data import pair_samples
    from ebr_engine.training.distributed import World
    from ebr_engine.training.latents import fill_cache
    from ebr_engine.training.learner import check_fits
    from ebr_engine.training.loop import backbone_of

    started = time.monotonic()
    samples = pair_samples(chosen, chosen.data)

    def tell(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0:
            typer.echo(f"{done}/{total}  {time.monotonic() - started:.0f} s", err=True)

    if cluster:
        from ebr_engine.cluster.latents import fill_on

        made, there = fill_on(cluster, cluster_cores, chosen, samples, lambda text: typer.echo(text, err=True), tell)
    else:
        loaded = backbone_of(chosen, chosen.device)
        check_fits(chosen, loaded, World())
        made, there = fill_cache(chosen, samples, loaded, tell)
    skipped = f", {len(samples.bad)} pair(s) skipped" if samples.bad else ""
    typer.echo(f"{cache}  {made} made, {there} there{skipped}, {time.monotonic() - started:.1f} s")
