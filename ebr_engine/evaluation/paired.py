"""Which file is compared with which: folders whose files have the same stems, or the JSON lists of the released code.

A list is a JSON array (or one object a line) of objects. Keys, the first that is there: `image_path`, `input_path`, `input`,
`lq_path` or `lq`; `target_path`, `target`, `gt_path` or `gt`; `restored_path`, `restored` or `output`; and `name`. A value is
a file, a folder of frames, or a list of frame files, relative to a root. The released lists give media that have no target
their own input as one, or none: no target is known for those, nor where `no_reference` is true.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ebr_engine.errors import EbrError
from ebr_engine.media.files import ALL_SUFFIXES, is_clip
from ebr_engine.media.images import SUFFIXES, check_opaque, opaque_pixels

INPUT_KEYS = ("image_path", "input_path", "input", "lq_path", "lq")
TARGET_KEYS = ("target_path", "target", "gt_path", "gt")
RESTORED_KEYS = ("restored_path", "restored", "output")


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

    def stamp(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of every file: what a stored score is true of."""
        files = [each for path in self.paths for each in (sorted(path.iterdir()) if path.is_dir() else [path])]
        return [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]


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
    """Items of a JSON list, its paths relative to `root` (by default the list's folder, or else the current one).

    `restored`: a folder with the outputs, named as the items are (see `_names`). Raises `EbrError` for a list that is none,
    and for a file that is missing.
    """
    records = _records(file)
    roots = [root] if root else [file.parent, Path()]
    outputs = _scan(restored, clips=True) | _scan(restored, clips=False) if restored else {}
    items = []
    for number, (record, name) in enumerate(zip(records, _names(records, file)), 1):
        where = f"{file}, entry {number}"
        source = _media(_value(record, INPUT_KEYS), roots, where)
        wanted = None if record.get("no_reference") else _media(_value(record, TARGET_KEYS), roots, where)
        output = _media(_value(record, RESTORED_KEYS), roots, where)
        if source is None:
            raise EbrError(f"{where}: none of the keys {', '.join(INPUT_KEYS)} is there")
        if restored is not None and name not in outputs:
            raise EbrError(f"{where}: there is no {name} in {restored}")
        same = wanted is not None and wanted.paths == source.paths
        items.append(_checked(Item(name, source, None if same else wanted, outputs.get(name, output))))
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


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EbrError(f"{file}: cannot be read as text: {error}") from error
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    except json.JSONDecodeError as error:
        raise EbrError(f"{file}: is no JSON list: {error}") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise EbrError(f"{file}: has to be a JSON array of objects, at least one")
    return records


def _value(record: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if key in record), None)


def _media(value: Any, roots: Sequence[Path], where: str) -> Media | None:
    if value is None or value == "" or value == []:
        return None
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise EbrError(f"{where}: a path has to be a text, or a list of texts, not {value!r}")
    paths = tuple(_found(text, roots, where) for text in texts)
    return Media(paths, clip=isinstance(value, list) or paths[0].is_dir() or is_clip(paths[0]))


def _found(text: str, roots: Sequence[Path], where: str) -> Path:
    for root in roots:
        if (root / text).exists():
            return root / text
    raise EbrError(f"{where}: {roots[0] / text}: no such file; --root names the folder that the paths start from")


def _names(records: Sequence[dict[str, Any]], file: Path) -> list[str]:
    """A name each: `name` where all have one of their own, or as much of the end of the input's path as tells them apart.

    A clip that is a list of frames goes by its folder.
    """
    own = [record.get("name") for record in records]
    if all(isinstance(name, str) and name for name in own) and len(set(own)) == len(own):
        return own
    values = [_value(record, INPUT_KEYS) for record in records]
    paths = [_named_by(value) for value in values]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [Path(*path.parts[-depth:]).as_posix() for path in paths]
        if len(set(names)) == len(names):
            return names
    raise EbrError(f"{file}: two entries have the same input")


def _named_by(value: Any) -> Path:
    first = Path(str(value[0] if isinstance(value, list) and value else value))
    folder = first.parent if isinstance(value, list) else first.with_suffix("")
    return folder if folder.parts else first.with_suffix("")
