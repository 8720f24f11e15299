"""Finding pairs of degraded and clean media: folders in the usual layouts, JSON lists, or clean media alone.

Folders: two that stand side by side under one of the names in `FOLDERS` (case does not matter), at the top or up to three
levels below it; where there is a training part, the rest is left aside, and test parts always are. That covers `input` and
`target`, Restormer's `train/input` and `train/target`, BasicSR's `lq` and `gt`, FoundIR's `LQ` and `GT`. Files pair by their
path below those folders without suffix. A BasicSR `meta_info*.txt` beside them says which files count.

JSON lists: see `media/pair_lists.py`; a folder of frames in one is a clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ebr_engine.errors import EbrError
from ebr_engine.jobs.files import ALL_SUFFIXES
from ebr_engine.media.images import SUFFIXES
from ebr_engine.media.kinds import is_clip
from ebr_engine.media.pair_lists import Entry, read_entries
from ebr_engine.media.video.folder import by_number

FOLDERS = (
    ("input", "target"),
    ("input_crops", "target_crops"),
    ("lq", "gt"),
    ("lq", "hq"),
    ("low", "high"),
    ("blur", "sharp"),
    ("hazy", "clear"),
    *((name, "gt") for name in ("input", "blur", "haze", "hazy", "low", "rain", "snow")),
)
TRAINING = ("train", "training", "trainingset", "train_set")
HELD_OUT = ("test", "testing", "testset", "val", "valid", "validation")
DEPTH = 3  # levels below the top at which pairs of folders are looked for
Source = tuple[Path, ...]  # one picture or video, or the frames of a clip


@dataclass(frozen=True)
class Pair:
    """A degraded picture or clip and its clean form; without a degraded one it is degraded on the fly."""

    name: str
    clean: Source
    degraded: Source | None


@dataclass(frozen=True)
class Problem:
    """Something that cannot be trained on, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def find_pairs(data: Path, frames: int = 1, synthetic: bool = False) -> tuple[list[Pair], list[Problem]]:
    """The pairs under `data` in a stable order, and what is there but cannot be one.

    With `frames` above 1 a folder of pictures is a clip. `synthetic`: everything in the folder is clean. Raises `EbrError`
    where there is nothing to find.
    """
    if not data.exists():
        raise EbrError(f"{data}: no such folder or list")
    if data.is_file():
        pairs, problems = _listed(data)
    elif synthetic:
        clean, problems = _media(data, frames)
        pairs = [Pair(name, source, None) for name, source in clean.items()]
    else:
        pairs, problems = _paired(data, frames)
    if not pairs:
        first = f" ({problems[0]}, …)" if problems else ""
        raise EbrError(f"{data}: no pairs found{first}")
    return pairs, problems


def _paired(root: Path, frames: int) -> tuple[list[Pair], list[Problem]]:
    folders = list(_pair_folders(root, DEPTH))
    if not folders:
        names = ", ".join(f"{a}/ and {b}/" for a, b in FOLDERS[:3])
        raise EbrError(f"{root}: no pairs of folders here, such as {names}; for clean media alone add --set synthetic=true")
    pairs, problems = [], []
    for low, high in folders:
        degraded, wrong = _media(low, frames)
        clean, also_wrong = _media(high, frames)
        problems += wrong + also_wrong
        listed = _meta_info(low.parent)
        for name in sorted(degraded.keys() | clean.keys() | (listed or set())):
            if listed is not None and name not in listed:
                continue
            where = {low: name in degraded, high: name in clean}
            if all(where.values()):
                shown = str((high / name).relative_to(root))
                pairs.append(Pair(shown, clean[name], degraded[name]))
            else:
                here = next((folder for folder, there in where.items() if there), low)
                missing = " or ".join(str(folder) for folder, there in where.items() if not there)
                problems.append(Problem(str(here / name), f"has no counterpart in {missing}"))
    return pairs, problems


def _pair_folders(root: Path, depth: int) -> Iterator[tuple[Path, Path]]:
    """(degraded, clean) folders at `root` or below it."""
    children = {child.name.lower(): child for child in sorted(root.iterdir()) if child.is_dir() and child.name[0] != "."}
    found = [(children[low], children[high]) for low, high in FOLDERS if low in children and high in children]
    if found or not depth:
        yield from found
        return
    training = [child for name, child in children.items() if name in TRAINING]
    for child in training or [child for name, child in children.items() if name not in HELD_OUT]:
        yield from _pair_folders(child, depth - 1)


def _media(folder: Path, frames: int) -> tuple[dict[str, Source], list[Problem]]:
    """Path without suffix → source, for all media below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ALL_SUFFIXES and path.name[0] != ".")
    found: dict[str, list[Path]] = {}
    problems = []
    for path in files:
        relative = path.relative_to(folder)
        as_clip = frames > 1 and not is_clip(path)
        if as_clip and relative.parent == Path():
            problems.append(Problem(str(path), f"is a picture, where clips of {frames} frames are learned from (frames = 1?)"))
            continue
        name = (relative.parent if as_clip else relative.with_suffix("")).as_posix()
        if name in found and not as_clip:
            problems.append(Problem(str(path), f"has the name of {found[name][0].name} beside it"))
            continue
        found.setdefault(name, []).append(path)
    return {name: tuple(sorted(paths, key=lambda path: by_number(path.name))) for name, paths in sorted(found.items())}, problems


def _meta_info(folder: Path) -> set[str] | None:
    """The names that a BasicSR `meta_info*.txt` lists, without suffixes; None where there is none.

    A line is a clean file's path, maybe a comma and the degraded one's, and maybe its size.
    """
    files = sorted(folder.glob("meta_info*.txt"))
    if not files:
        return None
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    names = (line.split(",")[0].split(" (")[0].strip() for line in lines if line)
    return {Path(name).with_suffix("").as_posix() for name in names}


def _listed(file: Path) -> tuple[list[Pair], list[Problem]]:
    """The pairs of a JSON list."""
    pairs, problems = [], []
    for entry in read_entries(file):
        try:
            pairs.append(_pair(entry))
        except EbrError as error:
            problems.append(Problem(entry.where, str(error).removeprefix(f"{entry.where}: ")))
    return pairs, problems


def _pair(entry: Entry) -> Pair:
    """The pair of a record; `EbrError` for one without a target."""
    degraded, clean = entry.input, entry.target
    if clean is None:
        raise EbrError(f"{entry.where}: has no target")
    return Pair(str(clean[0]), _frames(clean), _frames(degraded))


def _frames(source: Source) -> Source:
    """The files of a source; of a folder, its frames."""
    if len(source) != 1 or not source[0].is_dir():
        return source
    frames = [path for path in source[0].iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    if not frames:
        raise EbrError(f"{source[0]}: has no pictures")
    return tuple(sorted(frames, key=lambda path: by_number(path.name)))
