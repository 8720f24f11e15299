"""What a run has to do: its jobs, each with its request, and what of it an earlier run has finished."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_engine.errors import EbrError
from ebr_engine.request import PLAN, RestoreRequest

if TYPE_CHECKING:
    from ebr_engine.jobs.files import Job
    from ebr_engine.jobs.journal import Journal


@dataclass(frozen=True)
class Work:
    """The jobs that are left to do, and the digests of their requests."""

    jobs: "list[Job]"
    digests: Mapping[RestoreRequest, str]
    skipped: int = 0  # finished by an earlier run
    journal: "Journal | None" = None
    left_out: str | None = None  # a line that tells of files that are no inputs

    @property
    def files(self) -> int:
        """How many are left to do."""
        return len(self.jobs)

    def locked(self) -> AbstractContextManager:
        """While entered, no other run may work on the same output folder; `EbrError` where one does."""
        return self.journal.locked() if self.journal else nullcontext()


def find_work(
    inputs: Sequence[Path],
    out: str | None,
    request: RestoreRequest,
    *,
    manifest: Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
) -> Work:
    """Find and check everything that is asked for; nothing is created, no model loaded.

    What runs that were killed at their end have left behind is deleted. Raises EbrError for what cannot be met.
    """
    from ebr_engine.jobs.files import check_jobs, check_writable
    from ebr_engine.jobs.journal import Journal
    from ebr_engine.jobs.sounds import check_options
    from ebr_engine.media.kinds import left_out_line
    from ebr_engine.media.video.parts import forget_finished

    if request.engine and (request.task or request.prompt):
        raise EbrError("an engine file holds its own prompt; leave --task and --prompt out, or build another one")
    left_out: list[tuple[Path, str]] = []
    jobs, folder = _pair(inputs, out, manifest, request, left_out)
    for job in jobs:
        if job.is_sound:
            check_options(job.request)
    digests = {one: one.digest(prompts_of(one)) for one in dict.fromkeys(job.request for job in jobs)}
    journal = None
    if resume and folder is not None:
        check_writable(folder)
        journal = Journal(folder)
    for job in jobs:
        if job.is_clip:
            forget_finished(job.target)
    finished = {job for job in jobs if journal and journal.finished(job, digests[job.request])}
    if journal:
        check_jobs(jobs, overwrite, lambda job, path: journal.vouches(path, job, digests[job.request]), journal.knows)
    else:
        check_jobs(jobs, overwrite)
    return Work([job for job in jobs if job not in finished], digests, len(finished), journal, left_out_line(left_out))


def prompts_of(request: RestoreRequest) -> Sequence[tuple[Path, float]]:
    """The prompt files of a request, with weights; of task auto all that it may choose from, of an engine file none.

    Raises `EbrError` unless there is a task or a prompt, and `PromptError` for a task that has none.
    """
    from ebr_engine.backbones.registry import BACKBONES
    from ebr_engine.prompts.catalogue import AUTO, TASKS, find_prompts, prompt_files, with_fine

    if request.engine:
        if request.part(PLAN) != RestoreRequest().part(PLAN):
            raise EbrError("an engine file holds its own prompt and schedule; leave task and sampling out, or build another one")
        return []
    if not request.task and not request.prompt:
        raise EbrError("neither --task nor --prompt given; say what to repair by one of them, for example --task haze")
    if request.prompt:
        return request.prompt
    if request.backbone not in BACKBONES:  # which loading it tells
        return []
    if request.task != AUTO:
        return with_fine(find_prompts(request.backbone, request.task))
    found = [(file, 1.0) for name, file in prompt_files(request.backbone).items() if name in TASKS]
    return with_fine(found) or find_prompts(request.backbone, TASKS[0])  # which tells where to get some


def _pair(
    inputs: Sequence[Path],
    out: str | None,
    manifest: Path | None,
    request: RestoreRequest,
    left_out: list[tuple[Path, str]],
) -> "tuple[list[Job], Path | None]":
    """The jobs, and the folder of their journal: None where the output is one file, whose folder is the user's own."""
    from ebr_engine.backbones.registry import medium_of
    from ebr_engine.jobs.files import is_file_name, is_frames, pair_inputs, pair_rows
    from ebr_engine.jobs.manifest import read_manifest

    compare, medium = request.compare is not None, None if request.engine else medium_of(request.backbone)
    if manifest is None:
        if not inputs:
            raise EbrError(
                "nothing to restore: name at least one INPUT, a file or a folder, or a --manifest (see ebr-engine restore --help)"
            )
        if out is None:
            raise EbrError("say where to write it: --out FILE or --out FOLDER")
        frames = len(inputs) == 1 and is_frames(inputs[0], out)
        jobs = pair_inputs(inputs, out, compare, request.as_clip, left_out, medium)
        folder = None if request.as_clip or frames or is_file_name(inputs, out) else Path(out)
        return [replace(job, request=request) for job in jobs], folder
    if inputs:
        raise EbrError(f"{inputs[0]}: name inputs or a --manifest, not both")
    folder = Path(out) if out else manifest.parent
    if folder.exists() and not folder.is_dir():
        raise EbrError(f"{folder}: has to be a folder when there is a manifest")
    rows = read_manifest(manifest, request)
    if not out and (bare := [row for row in rows if row.output is None]):
        raise EbrError(f"{bare[0].where}: has no output; name a folder for all with --out")
    if request.engine and (named := [row for row in rows if row.task]):
        raise EbrError(f"{named[0].where}: an engine file holds its own prompt; leave the manifest's task column out")
    return pair_rows(rows, folder, compare, left_out, medium), folder
