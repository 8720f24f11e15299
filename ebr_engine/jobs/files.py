"""Which pictures, clips and sounds to read and where their results go: decided and checked as a whole before any work is done."""

import fnmatch
import glob
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ebr_engine.backbones.registry import restores
from ebr_engine.jobs.manifest import Row
from ebr_engine.media import PICTURES, SOUND
from ebr_engine.media.decoding import MediaError
from ebr_engine.media.images import SUFFIXES, is_animation
from ebr_engine.media.kinds import ANIMATED, is_clip, is_sound, reason_to_leave, written_name
from ebr_engine.media.sound import SUFFIXES as SOUND_SUFFIXES
from ebr_engine.media.video import video_suffixes
from ebr_engine.media.video.folder import frames_of, names_frames
from ebr_engine.request import RestoreRequest

ALL_SUFFIXES = (*SUFFIXES, *video_suffixes())
LOOKED_FOR = {PICTURES: ALL_SUFFIXES, SOUND: SOUND_SUFFIXES}


@dataclass(frozen=True)
class Job:
    """A picture, clip or sound to restore: read `source`, write `target`, and `compare` where a side by side is wanted."""

    source: Path
    target: Path
    compare: Path | None = None
    request: RestoreRequest = RestoreRequest()
    named_task: str | None = None  # that a manifest's row names

    @property
    def is_clip(self) -> bool:
        """Whether the source is a video, a folder of frames that is one clip, or an animation that becomes a clip."""
        return is_clip(self.source) or self.source.is_dir() or self.is_animation

    @property
    def is_sound(self) -> bool:
        """Whether the source is sound."""
        return is_sound(self.source)

    @property
    def is_animation(self) -> bool:
        """Whether the source is an animated picture whose target can hold all of its frames."""
        return (_names_video(self.target) or names_frames(self.target) or _may_move(self.target)) and is_animation(self.source)

    @property
    def frames(self) -> bool:
        """Whether the target is a folder of frames, or names them by a pattern."""
        return names_frames(self.target) or (self.source.is_dir() and self.target.suffix.lower() not in video_suffixes())

    @property
    def outputs(self) -> tuple[Path, ...]:
        return (self.target, self.compare) if self.compare else (self.target,)


def _names_video(path: Path) -> bool:
    return path.suffix.lower() in video_suffixes()


def _may_move(path: Path) -> bool:
    return path.suffix.lower() in ANIMATED


def plan_jobs(inputs: Sequence[Path], out: str, compare: bool = False, overwrite: bool = False) -> list[Job]:
    """`pair_inputs`, then `check_jobs`."""
    jobs = pair_inputs(inputs, out, compare)
    check_jobs(jobs, overwrite)
    return jobs


def pair_inputs(
    inputs: Sequence[Path],
    out: str,
    compare: bool = False,
    as_clip: bool = False,
    left_out: list[tuple[Path, str]] | None = None,
    medium: str | None = PICTURES,
) -> list[Job]:
    """Pair every picture and clip, or of the medium sound every sound, with its output; None where either may be meant.

    Inputs are files; folders, which are walked (hidden files and folders, and `out` itself, left aside); and patterns
    such as `photos/**/*.jpg`. `out` is a file when the only input is one file and `out` names an image or a video;
    otherwise a folder that mirrors the input folders, for a pattern the folder before its first wildcard. A folder of
    frames is one clip where `out` is a video, or with `as_clip`; `out` may also be `frames/%06d.png` for a clip's frames.
    What a file is, its content decides; those of other kinds are put into `left_out` with a reason ("" for no picture or
    clip). One whose own name cannot be written gets the suffix of what is: `a.heic` becomes `a.heic.png`.
    Raises MediaError for an input that is missing or holds nothing.
    """
    if len(inputs) == 1 and (as_clip or is_frames(inputs[0], out)):
        return [_frames_job(inputs[0], out)]
    if as_clip:
        raise MediaError("one folder of frames is one clip; name a single folder")
    found = [each for item in inputs for each in _gather(item, Path(out), [] if left_out is None else left_out, medium)]
    if is_file_name(inputs, out):
        targets = [Path(out)]
    else:
        targets = [Path(out) / written_name(source, relative) for source, relative in found]
    return [
        Job(source, target, _compare_path(source, target) if compare else None) for (source, _), target in zip(found, targets)
    ]


def pair_found(source: Path, relative: Path, folder: Path, compare: bool = False) -> Job:
    """The job of a file that `walk` has found at `relative`: written below `folder` as `pair_inputs` would."""
    target = folder / written_name(source, relative)
    return Job(source, target, _compare_path(source, target) if compare else None)


def _compare_path(source: Path, target: Path) -> Path:
    moves = is_clip(source) or ((_names_video(target) or _may_move(target)) and is_animation(source))
    return target.with_name(f"{target.stem}_compare{target.suffix if moves else '.png'}")


def is_frames(source: Path, out: str) -> bool:
    """Whether a folder is asked to become a video, or a clip to become frames."""
    if source.is_dir():
        return Path(out).suffix.lower() in video_suffixes(writable=True) and not Path(out).is_dir()
    return names_frames(out) and (is_clip(source) or is_animation(source))


def _frames_job(source: Path, out: str) -> Job:
    if not source.exists():
        raise MediaError(f"{source}: no such file or folder")
    if not (source.is_dir() or is_clip(source) or is_animation(source)):
        raise MediaError(f"{source}: a clip is a video, an animated GIF or PNG, or a folder of frames")
    if source.is_dir() and Path(out).exists() and Path(out).is_dir() and Path(out).samefile(source):
        raise MediaError(f"{out}: is the input; it is never overwritten, choose another output")
    return Job(source, Path(out) / source.name if is_clip(source) and Path(out).is_dir() else Path(out))


def pair_rows(
    rows: Sequence[Row],
    folder: Path,
    compare: bool = False,
    left_out: list[tuple[Path, str]] | None = None,
    medium: str | None = PICTURES,
) -> list[Job]:
    """The jobs of a manifest: each row as `pair_inputs` would, its output below `folder`; errors name the row's line.

    A row without an output is written below `folder` by the input's own path, as the manifest has it.
    """
    jobs = []
    for row in rows:
        try:
            if row.output is None and (Path(row.input).is_absolute() or ".." in Path(row.input).parts):
                raise MediaError(f"{row.input}: lies outside of the manifest's folder; give it an output")
            out = row.output or row.input
            is_file = row.output is None and not (row.source.is_dir() or _is_pattern(row.source))
            target = str(folder / (Path(out).parent if is_file else out)) + (os.sep if is_file or out.endswith("/") else "")
            jobs += [
                replace(job, request=row.request, named_task=row.task)
                for job in pair_inputs([row.source], target, compare, left_out=left_out, medium=medium)
            ]
        except MediaError as error:
            raise MediaError(f"{row.where}: {error}") from error
    return jobs


def check_jobs(
    jobs: Sequence[Job],
    overwrite: bool = False,
    ours: Callable[[Job, Path], bool] = lambda job, path: False,
    known: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Raise MediaError unless every job can be done as planned; nothing is created.

    That is for two inputs with one output, an output that would replace an input, or an existing one without `overwrite`
    (but for those that are `ours`: another run would make the same), a format that cannot be written, and a folder that
    cannot be written. `known` tells outputs that an earlier run has made.
    """
    if (existing := _check_outputs(jobs, ours)) and not overwrite:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        how = ", made with other settings or from an input that has changed" if known(existing[0]) else ""
        raise MediaError(f"{existing[0]}: exists{more}{how}; replace it with --overwrite")
    for folder in {path.parent for job in jobs for path in job.outputs}:
        check_writable(folder)


def _gather(item: Path, out: Path, left_out: list[tuple[Path, str]], medium: str | None) -> list[tuple[Path, Path]]:
    """(file, its path below `out`) for a file, or for every one in a folder or that a pattern matches, in a stable order."""
    if item.is_dir():
        files = list(walk(item, out))
    elif item.exists():
        check_medium(item, medium)
        return [(item, Path(item.name))]
    elif _is_pattern(item):
        files = list(_matching(item, out))
    else:
        raise MediaError(f"{item}: no such file or folder")
    found = []
    for path, relative in files:
        if (reason := _reason(path, medium)) is None:
            found.append((path, relative))
        else:
            left_out.append((path, reason))
    if not found:
        one, several = ("sound", "sounds") if medium == SOUND else ("picture or clip", "pictures or clips")
        what = f"no {several} in this folder" if item.is_dir() else f"no {one} matches this pattern"
        raise MediaError(f"{item}: {what} (looked for {' '.join(LOOKED_FOR[medium or PICTURES])})")
    return found


def _reason(path: Path, medium: str | None) -> str | None:
    """Why a file of a folder is no input, as `reason_to_leave` says it; None where it is one."""
    if medium is not None:
        return reason_to_leave(path, medium)
    return None if reason_to_leave(path, SOUND) is None else reason_to_leave(path)


def check_medium(path: Path, medium: str | None) -> None:
    """MediaError for a file that is sound where pictures are restored, or none where sound is."""
    if medium is None or is_sound(path) == (medium == SOUND):
        return
    if medium == SOUND:
        raise MediaError(f"{path}: is no WAV or FLAC, and {' and '.join(restores(SOUND))} restores nothing else")
    raise MediaError(f"{path}: is sound, which is restored with --backbone {' or '.join(restores(SOUND))}")


def walk(
    top: Path, out: Path, depth: int | None = None, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, Path]]:
    """Files below a folder, at most `depth` folders deep, `out` left aside; links to folders are not followed.

    A folder that cannot be read is told to `onerror` and left out; without it the error is raised.
    """
    for folder, folders, names in os.walk(top, onerror=onerror or _raise):
        deep = len(Path(folder).relative_to(top).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not _same(Path(folder, f), out) and deep != depth)
        shown = (name for name in sorted(names) if not name.startswith("."))
        yield from ((path := Path(folder, name), path.relative_to(top)) for name in shown)


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path)) and not path.exists()


def _matching(pattern: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """What a pattern matches, with paths below its part before the first wildcard; `**` is any number of folders."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    depth = None if "**" in parts else len(parts) - first - 1
    top = Path(*parts[:first])
    if top.is_dir():  # not glob, which follows links round and round
        yield from (each for each in walk(top, out, depth) if _matches(parts[first:], each[1].parts))


def _matches(pattern: Sequence[str], names: Sequence[str]) -> bool:
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(pattern[1:], names) or _matches(pattern, names[1:])
    return fnmatch.fnmatch(names[0], pattern[0]) and _matches(pattern[1:], names[1:])


def is_file_name(inputs: Sequence[Path], out: str) -> bool:
    """Whether `out` names one output file. A name such as `x.gif` is refused rather than made a folder."""
    if out.endswith(("/", os.sep)) or Path(out).is_dir():
        return False
    suffix = Path(out).suffix.lower()
    if len(inputs) == 1 and not inputs[0].is_dir() and not _is_pattern(inputs[0]):
        clip = is_clip(inputs[0]) or (suffix in video_suffixes() and is_animation(inputs[0]))
        known = SOUND_SUFFIXES if is_sound(inputs[0]) else video_suffixes(writable=True) if clip else SUFFIXES
        if suffix and suffix not in known:
            raise MediaError(f"{out}: cannot write {suffix}, only {' '.join(known)}; end a folder's name with /")
        return bool(suffix)
    if suffix in (*ALL_SUFFIXES, *SOUND_SUFFIXES):
        raise MediaError(f"{out}: has to be a folder when the input is a folder or several files")
    return False


def _existing_frames(job: Job) -> list[Path]:
    """The frames in the way of a job that writes frames; one that reads from the same folder is refused."""
    pattern = names_frames(job.target)
    folder = job.target.parent if pattern else job.target
    if pattern and job.target.suffix.lower() not in SUFFIXES:
        raise MediaError(f"{job.target}: frames are written as {' '.join(SUFFIXES)}")
    if folder.exists() and not folder.is_dir():
        raise MediaError(f"{folder}: is a file, not a folder for frames")
    if job.source.is_dir() and _same(folder, job.source):
        raise MediaError(f"{folder}: is an input; it is never overwritten, choose another output")
    if pattern:
        return frames_of(job.target)
    return sorted(folder.iterdir())[:1] if folder.is_dir() else []


def _check_outputs(jobs: Sequence[Job], ours: Callable[[Job, Path], bool]) -> list[Path]:
    """The outputs that exist, but for those that are `ours`."""
    inputs = {_identity(job.source): job.source for job in jobs}
    writers: dict[str, Path] = {}
    existing = []
    for job in jobs:
        if job.frames:
            existing += _existing_frames(job)
            continue
        for path in job.outputs:
            if path.suffix.lower() not in _writable(job):
                kind = path.suffix or "a file without suffix"
                example = "out.wav" if job.is_sound else "out.mp4" if job.is_clip else "out.png"
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
            if not ours(job, path):
                existing.append(path)
    return existing


def _writable(job: Job) -> tuple[str, ...]:
    """The suffixes that a job may write under."""
    if job.is_sound:
        return SOUND_SUFFIXES
    if not job.is_clip:
        return SUFFIXES
    return (*video_suffixes(writable=True), *ANIMATED) if job.is_animation else video_suffixes(writable=True)


def check_writable(folder: Path) -> None:
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
