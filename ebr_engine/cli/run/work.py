"""What a run has to do: its jobs, with which prompts, and what of it an earlier run has finished."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.cli.run.choosing import chosen_prompts, is_prompt, prompts_of
from ebr_engine.cli.run.loading import plain
from ebr_engine.errors import EbrError

if TYPE_CHECKING:
    from ebr_engine.media.files import Job
    from ebr_engine.media.journal import Journal

# Options that change nothing in a file that is written; any other, a new one too, makes its outputs other ones.
_NO_MATTER = {
    *("inputs", "manifest", "task", "prompt", "out", "overwrite", "resume", "fail_fast", "quiet", "json", "preview", "yes"),
    *("strict", "device", "offload", "offline"),
}


@dataclass(frozen=True)
class Choice:
    """With which prompts to restore: a task by name, or prompt files with weights; neither with an engine file."""

    task: str | None
    prompts: Sequence[tuple[Path, float]]


@dataclass(frozen=True)
class Work:
    """The jobs that are left to do, and the choices and the digests of the settings by their tasks."""

    jobs: "list[Job]"
    choices: Mapping[str | None, Choice]
    digests: Mapping[str | None, str]
    skipped: int
    journal: "Journal | None"
    left_out: str | None = None  # a line that tells of files that are no inputs


def plan_work(asked: Mapping[str, Any]) -> Work:
    """Find and check everything that `restore` was asked for, by its parameters; nothing is created, no model loaded.

    What runs that were killed at their end have left behind is deleted.
    Raises EbrError for what cannot be met.
    """
    from ebr_engine.media.files import check_jobs, check_writable
    from ebr_engine.media.journal import Journal
    from ebr_engine.media.kinds import left_out_line
    from ebr_engine.media.video.parts import forget_finished

    # Prompt files may follow one --prompt, where the parser can only see more inputs.
    words = asked["inputs"] or []
    inputs = [Path(word) for word in words if not is_prompt(word)]
    texts = [*(asked["prompt"] or []), *filter(is_prompt, words)]
    if asked["engine"] and (asked["task"] or texts):
        raise EbrError("an engine file holds its own prompt; leave --task and --prompt out, or build another one")
    left_out: list[tuple[Path, str]] = []
    jobs, folder = _pair(inputs, asked, bool(asked["compare"] or asked["compare_as"]), left_out)
    choices = {key: _choice(key, asked, texts) for key in dict.fromkeys(job.task for job in jobs)}
    digests = {key: _digest(asked, choice) for key, choice in choices.items()}
    journal = None
    if asked["resume"] and folder is not None:
        check_writable(folder)
        journal = Journal(folder)
    for job in jobs:
        if job.is_clip:
            forget_finished(job.target)
    finished = {job for job in jobs if journal and journal.finished(job, digests[job.task])}
    if journal:
        check_jobs(jobs, asked["overwrite"], lambda job, path: journal.vouches(path, job, digests[job.task]), journal.knows)
    else:
        check_jobs(jobs, asked["overwrite"])
    left = [job for job in jobs if job not in finished]
    return Work(left, choices, digests, len(finished), journal, left_out_line(left_out))


def _pair(
    inputs: Sequence[Path], asked: Mapping[str, Any], compare: bool, left_out: list[tuple[Path, str]]
) -> "tuple[list[Job], Path | None]":
    """The jobs, and the folder of their journal: None where the output is one file, whose folder is the user's own."""
    from ebr_engine.media.files import is_file_name, is_frames, pair_inputs, pair_rows
    from ebr_engine.media.manifest import read_manifest

    manifest, out = asked["manifest"], asked["out"]
    if manifest is None:
        if not inputs:
            raise EbrError(
                "nothing to restore: name at least one INPUT, a file or a folder, or a --manifest (see ebr-engine restore --help)"
            )
        if out is None:
            raise EbrError("say where to write it: --out FILE or --out FOLDER")
        if asked["as_clip"] or (len(inputs) == 1 and is_frames(inputs[0], out)):
            return pair_inputs(inputs, out, compare, asked["as_clip"]), None
        return pair_inputs(inputs, out, compare, left_out=left_out), None if is_file_name(inputs, out) else Path(out)
    if inputs:
        raise EbrError(f"{inputs[0]}: name inputs or a --manifest, not both")
    folder = Path(out) if out else manifest.parent
    if folder.exists() and not folder.is_dir():
        raise EbrError(f"{folder}: has to be a folder when there is a manifest")
    rows = read_manifest(manifest)
    if not out and (bare := [row for row in rows if row.output is None]):
        raise EbrError(f"{bare[0].where}: has no output; name a folder for all with --out")
    jobs = pair_rows(rows, folder, compare, left_out)
    return [replace(job, task=_from_folder(job.task, manifest.parent)) for job in jobs], folder


def _from_folder(key: str | None, folder: Path) -> str | None:
    """A manifest's task; prompt files in its place are relative to the manifest."""
    if key is None or not any(map(is_prompt, key.split(";"))):
        return key
    return ";".join(str(folder / part.strip()) for part in key.split(";"))


def _choice(key: str | None, asked: Mapping[str, Any], texts: list[str]) -> Choice:
    """What a job's task means; None is what the command line asks for."""
    if asked["engine"]:
        if key is not None:
            raise EbrError("an engine file holds its own prompt; leave the manifest's task column out")
        return Choice(None, [])
    if key is None:
        return Choice(asked["task"], chosen_prompts(asked["backbone"], asked["task"], texts, auto=True))
    if any(map(is_prompt, key.split(";"))):
        return Choice(None, chosen_prompts(asked["backbone"], None, key.split(";")))
    return Choice(key, chosen_prompts(asked["backbone"], key, [], auto=True))


def _digest(asked: Mapping[str, Any], choice: Choice) -> str:
    """A digest of all that decides what is written: the options, and the prompt files' content."""
    named = [] if choice.task is None else prompts_of(asked["backbone"], choice.task)
    prompts = [[hashlib.sha256(path.read_bytes()).hexdigest(), weight] for path, weight in [*named, *choice.prompts]]
    files = {name: [status.st_size, status.st_mtime_ns] for name, status in _statuses(asked)}
    options = {name: plain(value) for name, value in asked.items() if name not in _NO_MATTER}
    content = json.dumps([options, choice.task, prompts, files], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _statuses(asked: Mapping[str, Any]) -> "list[tuple[str, os.stat_result]]":
    """The files among the options' values, as they are now."""
    return [(name, value.stat()) for name, value in asked.items() if isinstance(value, Path) and value.is_file()]
