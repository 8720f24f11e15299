"""Models from the Hugging Face hub: only the files that are needed, resumed where a fetch was cut off, kept in its cache."""

import re
from collections.abc import Collection
from pathlib import Path

from ebr_engine.errors import BackboneError, EbrError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PART_FOLDERS = {"vae": "vae", "text_encoder": "text_encoder*", "tokenizer": "tokenizer*"}
PARTS = ("transformer", *PART_FOLDERS)
INDEX = "model_index.json"  # what a pipeline is made of


def fetch(
    hub_id: str,
    revision: str | None,
    offline: bool,
    parts: Collection[str],
    transformers: Collection[str] = ("transformer",),
) -> Path:
    """The folder, named by its commit, of a model in diffusers' layout that has (at least) the parts asked for.

    `parts`: of `transformer`, `vae`, `text_encoder`, `tokenizer`. `offline`: take what is cached and never ask the hub.
    `transformers`: the folders that the transformer may be in.
    Raises: `BackboneError` when the hub has no such model, does not give it or cannot be reached, `EbrError` without its library.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise EbrError("fetching models needs huggingface_hub: pip install 'ebr-engine[models]'") from error
    pinned = f" at revision {revision!r}" if revision else ""
    wanted = patterns(parts, transformers)
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=wanted, local_files_only=offline)
    except errors.GatedRepoError as error:
        licence = f"accept its licence at https://huggingface.co/{hub_id}"
        raise BackboneError(f"{hub_id} is a gated model: {licence}, then run `huggingface-cli login` or set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise BackboneError(
            f"{hub_id} is no file or folder here and no public model on the hub: check the name, or log in if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BackboneError(f"{hub_id} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        if offline:
            hint = "fetch it once without the offline flag, or name a local folder"
            raise BackboneError(f"{hub_id}{pinned} is not, or not completely, in the local cache: {hint}") from error
        raise BackboneError(
            f"the hub cannot be reached and {hub_id}{pinned} is not completely in the local cache: "
            "check the network, or name a local folder"
        ) from error
    except Exception as error:  # what a broken transfer raises depends on the HTTP library that huggingface_hub is built on
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BackboneError(f"cannot fetch {hub_id}{pinned} (run again to resume): {reason}") from error
    return Path(folder)


def patterns(parts: Collection[str], transformers: Collection[str] = ("transformer",)) -> list[str]:
    """The files of a model's parts, and what says its kind and sizes; weights as safetensors only.

    `ValueError` for a part that is not known.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"unknown part(s) {', '.join(sorted(unknown))}; there is: {', '.join(PARTS)}")
    wanted = [INDEX, *(f"{folder}/config.json" for folder in transformers)]
    for part in sorted(parts):
        for folder in transformers if part == "transformer" else (PART_FOLDERS[part],):
            wanted += [f"{folder}/*"] if part == "tokenizer" else [f"{folder}/*.json", f"{folder}/*.safetensors"]
    return wanted
