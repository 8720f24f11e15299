"""Which pictures and clips to read and where their results go: decided and checked as a whole before any work is done."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebr_engine.media.images import SUFFIXES, MediaError
from ebr_engine.media.video import video_suffixes

ALL_SUFFIXES = (*SUFFIXES, *video_suffixes())


@dataclass(frozen=True)
class Job:
    """A picture or clip to restore: read `source`, write `target`, and `compare` where a side by side is wanted."""

    source: Path
    target: Path
    compare: Path | None = None
    task: str | None = None  # by which its recipe is found; None is the one that the command line asks for

    @property
    def is_clip(self) -> bool:
        return is_clip(self.source)

    @property
    def outputs(self) -> tuple[Path, ...]:
        return (self.target, self.compare) if self.compare else (self.target,)


def is_clip(path: Path) -> bool:
    """Whether a file's name is that of a video."""
    return path.suffix.lower() in video_suffixes()


def plan_jobs(inputs: Sequence[Path], out: str, compare: bool = False, overwrite: bool = False) -> list[Job]:
    """Pair every picture and clip with its output.

    Inputs are files, and folders that are walked (hidden files and folders, and `out` itself, left aside). `out` is a
    file when the only input is one file and `out` names an image or a video; otherwise a folder that mirrors the input folders.
    Raises MediaError for a missing input, two inputs with one output, an output that would replace an input, or an
    existing one without `overwrite`, and a folder that cannot be written. Nothing is created.
    """
    found = [each for item in inputs for each in _gather(item, Path(out))]
    if _is_file_name(inputs, out):
        targets = [Path(out)]
    else:
        targets = [Path(out) / relative for _, relative in found]
    jobs = [
        Job(source, target, target.with_name(f"{target.stem}_compare.png") if compare and not is_clip(source) else None)
        for (source, _), target in zip(found, targets)
    ]
    _check_outputs(jobs, overwrite)
    for folder in {path.parent for job in jobs for path in job.outputs}:
        _check_writable(folder)
    return jobs


def _gather(item: Path, out: Path) -> Iterable[tuple[Path, Path]]:
    """(picture, its path below `out`) for a file, or for every picture in a folder, in a stable order."""
    if not item.exists():
        raise MediaError(f"{item}: no such file or folder")
    if not item.is_dir():
        return [(item, Path(item.name))]
    found = []
    for folder, folders, names in os.walk(item, onerror=_raise):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not _same(Path(folder, f), out))
        pictures = (n for n in sorted(names) if n.lower().endswith(ALL_SUFFIXES) and not n.startswith("."))
        found += [(path := Path(folder, name), path.relative_to(item)) for name in pictures]
    if not found:
        raise MediaError(f"{item}: no pictures or clips in this folder (looked for {' '.join(ALL_SUFFIXES)})")
    return found


def _is_file_name(inputs: Sequence[Path], out: str) -> bool:
    """Whether `out` names one output file. A name such as `x.gif` is refused rather than made a folder."""
    if out.endswith(("/", os.sep)) or Path(out).is_dir():
        return False
    suffix = Path(out).suffix.lower()
    if len(inputs) == 1 and not inputs[0].is_dir():
        if suffix and suffix not in (known := video_suffixes(writable=True) if is_clip(inputs[0]) else SUFFIXES):
            raise MediaError(f"{out}: cannot write {suffix}, only {' '.join(known)}; end a folder's name with /")
        return bool(suffix)
    if suffix in ALL_SUFFIXES:
        raise MediaError(f"{out}: has to be a folder when the input is a folder or several files")
    return False


def _check_outputs(jobs: Sequence[Job], overwrite: bool) -> None:
    inputs = {_identity(job.source): job.source for job in jobs}
    writers: dict[str, Path] = {}
    existing = []
    for job in jobs:
        for path in job.outputs:
            if path.suffix.lower() not in (video_suffixes(writable=True) if job.is_clip else SUFFIXES):
                kind = path.suffix or "a file without suffix"
                example = "out.mp4" if job.is_clip else "out.png"
                raise MediaError(f"{job.source}: cannot write {kind}; name the output file, as in -o {example}")
            first = writers.setdefault(os.path.normcase(os.path.realpath(path)), job.source)
            if first is not job.source:
                raise MediaError(f"{first} and {job.source} would both be written to {path}")
            if not path.exists():
                continue
            if _identity(path) in inputs:
                raise MediaError(f"{path}: is an input; it is never overwritten, choose another output")
            if path.is_dir():
                raise MediaError(f"{path}: is a folder")
            existing.append(path)
    if existing and not overwrite:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise MediaError(f"{existing[0]}: exists{more}; replace it with --overwrite")


def _check_writable(folder: Path) -> None:
    """Prove it by a file without a name, in the folder or in the nearest one above that exists."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MediaError(f"{folder}: cannot write there: {error.strerror}") from error


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _same(path: Path, other: Path) -> bool:
    return other.exists() and path.exists() and path.samefile(other)


def _raise(error: OSError) -> None:
    raise error
