"""`ebr-engine cache-text`: run the text encoders of a model once, and keep what they make of the empty text."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli.options import takes
from ebr_engine.errors import EbrError
from ebr_engine.request import RestoreRequest


@takes(
    *("backbone", "model", "revision", "offline"),
    backbone=...,
    help={"backbone": "One whose weights are published: wan, flux, flux2 …"},
)
def cache_text(
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", show_default="in the cache", help="Where to write it, for --context."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make it again, and replace the file.")] = False,
    request: RestoreRequest,
) -> None:
    """Encode the empty text of a model, the only one that restoring needs, and keep the result (a few MB).

    restore does so by itself on the first run with a model; after this it needs no text encoder.

    [bold]ebr-engine cache-text --backbone wan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers[/]
    """
    backbone, model, revision, offline = (getattr(request, name) for name in ("backbone", "model", "revision", "offline"))
    if out is not None and out.exists() and not overwrite:
        raise EbrError(f"{out} exists; add --overwrite to replace it")

    from ebr_engine.backbones.checkpoint import find_model
    from ebr_engine.backbones.text import cached_context, context_file, encode_empty, save_context

    started = time.monotonic()
    identity = find_model(backbone, model, revision=revision, offline=offline, parts=()).identity
    file = out or context_file(backbone, identity)
    context = None if overwrite else cached_context(backbone, identity)
    if context is not None and out is None:
        typer.echo(f"{file} holds the empty text of {identity} already; --overwrite makes it again")
        return
    if context is None:
        parts = ("text_encoder", "tokenizer")
        files = find_model(backbone, model, revision=revision, offline=offline, parts=parts)
        typer.echo(f"encoding the empty text of {identity}; a full-size encoder takes minutes on a CPU", err=True)
        context = encode_empty(backbone, files.text_encoders, files.tokenizers)
    save_context(file, backbone, identity, context)
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in context.items())
    size, seconds = file.stat().st_size / 1e6, time.monotonic() - started
    typer.echo(f"{file}  {identity}: {shapes}; {size:.1f} MB, {seconds:.1f} s")
