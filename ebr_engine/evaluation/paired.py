"""Which file is compared with which: folders whose files have the same stems, or a JSON list (`media/pair_lists.py`)."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ebr_engine.errors import EbrError
from ebr_engine.jobs.files import ALL_SUFFIXES
from ebr_engine.media.images import SUFFIXES, check_opaque, opaque_pixels
from ebr_engine.media.kinds import is_clip
from ebr_engine.media.pair_lists import INPUT_KEYS, RESTORED_KEYS, TARGET_KEYS, Entry, read_entries

ROOT_HINT = "; --root names the folder that the paths start from"


@dataclass(frozen=True)
class Media:
    """A picture (one file), or a clip: a video file, a folder of frames, or frame files in order."""

    paths: tuple[Path, ...]
    clip: bool

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} ({len(self.paths)} frames)"

    @property
    def listed(self) -> bool:
        """Whether every path is a picture, rather than one that holds many."""
        return not (self.clip and (self.paths[0].is_dir() or is_clip(self.paths[0])))

    def frames(self, limit: int | None = None) -> Iterator[np.ndarray]:
        """Pixels [H, W, 3] float32 in [0, 1] of every frame, at most `limit`; MediaError for what is damaged or transparent."""
        if not self.listed:
            from ebr_engine.media.video import open_video

            with open_video(self.paths[0], frames=limit) as reader:
                for frame in reader:
                    check_opaque(self.paths[0], frame.alpha)
                    yield frame.pixels
        else:
            yield from (opaque_pixels(path) for path in islice(self.paths, limit))

    def files(self) -> list[Path]:
        """Every file of it; of a folder, all in it."""
        return [each for path in self.paths for each in (sorted(path.iterdir()) if path.is_dir() else [path])]

    def stamp(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of every file: what a stored score is true of."""
        return [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in self.files()]


@dataclass(frozen=True)
class Item:
    """One thing to measure. `restored`: None where the restoration is yet to be made; `target`: None where there is none."""

    name: str
    source: Media | None
    target: Media | None
    restored: Media | None = None

    def stamp(self) -> list:
        """What the item's scores depend on of its files."""
        return [media.stamp() if media else None for media in (self.source, self.target, self.restored)]


def pair_folders(
    source: Path | None, target: Path | None, restored: Path | None, clips: bool = False, partial: bool = False
) -> list[Item]:
    """Items of up to three folders (or single files) whose files have the same path and stem, whatever their suffix.

    `clips`: every folder that holds pictures is a clip. `partial`: measure what is in all of them, rather than refuse.
    Raises `EbrError` naming the first file that lacks its partner, or has two.
    """
    given = {"input": source, "target": target, "restored": restored}
    found = {role: _scan(path, clips) for role, path in given.items() if path is not None}
    if all(path.is_file() for path in given.values() if path is not None):
        found = {role: {source.stem if source else restored.stem: next(iter(media.values()))} for role, media in found.items()}
    main = "input" if source is not None else "restored"
    names = [name for name in found[main] if all(name in media for media in found.values())]
    if not partial:
        for role, media in found.items():
            if alone := next((name for name in found[main] if name not in media), None):
                raise EbrError(f"{found[main][alone]}: there is no {alone} in {given[role]} ({role}); --partial leaves it out")
            if alone := next((name for name in media if name not in found[main]), None):
                raise EbrError(f"{media[alone]}: there is no {alone} in {given[main]} ({main}); --partial leaves it out")
    if not names:
        raise EbrError(f"{given[main]}: none of its {len(found[main])} files has a partner of the same name")
    items = [Item(name, *(found.get(role, {}).get(name) for role in given)) for name in names]
    return [_checked(item) for item in items]


def read_list(file: Path, root: Path | None = None, restored: Path | None = None, clips: bool = False) -> list[Item]:
    """Items of a JSON list, its paths relative to `root` (see `read_entries`).

    `restored`: a folder with the outputs, named as the items are (see `_names`). Raises `EbrError` for a list that is none,
    and for a file that is missing.
    """
    entries = list(read_entries(file, root, ROOT_HINT))
    outputs = _scan(restored, clips=True) | _scan(restored, clips=False) if restored else {}
    sources = [entry.input for entry in entries]
    items = []
    for entry, source, name in zip(entries, sources, _names(entries, file)):
        if restored is not None and name not in outputs:
            raise EbrError(f"{entry.where}: there is no {name} in {restored}")
        found = ((source, INPUT_KEYS), (entry.target, TARGET_KEYS), (entry.restored, RESTORED_KEYS))
        source, target, output = (_media(files, entry.is_list(keys)) for files, keys in found)
        items.append(_checked(Item(name, source, target, outputs.get(name, output))))
    return items


def _checked(item: Item) -> Item:
    present = [media for media in (item.source, item.target, item.restored) if media]
    if other := next((media for media in present if media.clip != present[0].clip), None):
        raise EbrError(f"{present[0]} and {other} cannot be compared: one is a picture, the other a clip")
    counted = [media for media in present if media.listed]
    if other := next((media for media in counted if len(media.paths) != len(counted[0].paths)), None):
        counts = len(counted[0].paths), len(other.paths)
        raise EbrError(f"{counted[0].paths[0].parent} has {counts[0]} frames, {other.paths[0].parent} has {counts[1]}")
    return item


def _scan(path: Path, clips: bool) -> dict[str, Media]:
    """Media below a folder by their path without suffix; or the only one, of a file."""
    if not path.exists():
        raise EbrError(f"{path}: no such file or folder")
    if path.is_file():
        return {path.stem: Media((path,), is_clip(path))}
    found: dict[str, Media] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        relative = Path(folder).relative_to(path)
        if clips and pictures:
            found[path.name if relative == Path() else relative.as_posix()] = Media((Path(folder),), clip=True)
            names = [name for name in names if name not in pictures]
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(ALL_SUFFIXES):
                continue
            file = Path(folder, name)
            key = (relative / file.stem).as_posix()
            if key in found:
                raise EbrError(f"{found[key]} and {file} have the same name; rename one")
            found[key] = Media((file,), is_clip(file))
    if not found:
        raise EbrError(f"{path}: no pictures or clips in this folder (looked for {' '.join(ALL_SUFFIXES)})")
    return found


def _media(files: tuple[Path, ...] | None, listed: bool) -> Media | None:
    """`listed`: the files are the frames of a clip."""
    return Media(files, listed or files[0].is_dir() or is_clip(files[0])) if files else None


def _names(entries: Sequence[Entry], file: Path) -> list[str]:
    """A name each: `name` where all have one of their own, or as much of the end of the input's path as tells them apart.

    A clip that is a list of frames goes by its folder.
    """
    own = [entry.name for entry in entries]
    if all(own) and len(set(own)) == len(own):
        return own
    paths = [_named_by(entry.input_value) for entry in entries]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [Path(*path.parts[-depth:]).as_posix() for path in paths]
        if len(set(names)) == len(names):
            return names
    raise EbrError(f"{file}: two entries have the same input")


def _named_by(value: str | list[str]) -> Path:
    first = Path(value[0] if isinstance(value, list) else value)
    folder = first.parent if isinstance(value, list) else first.with_suffix("")
    return folder if folder.parts else first.with_suffix("")
