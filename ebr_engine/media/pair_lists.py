"""JSON lists of what belongs together: an input, its target, a result; for learning and for measuring alike.

A list is a JSON array of objects, an object that holds such an array, or an object a line. Keys, the first that says
something: `INPUT_KEYS`, `TARGET_KEYS`, `RESTORED_KEYS`, and `name`. A value is a file, a folder of frames, or a list of frame
files. The released lists give media that have no target their own input as one, or none: no target is known for those, nor
where `no_reference` is true.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebr_engine.errors import EbrError
from ebr_engine.media.images import SUFFIXES

INPUT_KEYS = ("image_path", "input_path", "input", "lq_path", "lq", "degraded")
TARGET_KEYS = ("target_path", "target", "gt_path", "gt", "clean", "hq")
RESTORED_KEYS = ("restored_path", "restored", "output")


@dataclass(frozen=True)
class Entry:
    """One record of a list; what it names is looked for when it is asked for."""

    record: Any
    where: str  # the list and the record's number, for errors
    roots: tuple[Path, ...]  # folders that paths may start from
    hint: str  # what to do about a file that is missing

    @property
    def name(self) -> str | None:
        """The name that the record gives, if it does."""
        name = self.record.get("name")
        return name if isinstance(name, str) and name else None

    @property
    def input_value(self) -> Any:
        """The input as the record has it: a path, or a list of paths; None where it names none."""
        return self._value(INPUT_KEYS)

    @property
    def input(self) -> tuple[Path, ...]:
        """The input's files; `EbrError` where none is named."""
        if found := self._files(INPUT_KEYS):
            return found
        raise EbrError(f"{self.where}: names no input (looked for {', '.join(INPUT_KEYS)})")

    @property
    def target(self) -> tuple[Path, ...] | None:
        """The target's files; None for no target. `EbrError` where input and target are unequal numbers of frames."""
        found = None if self.record.get("no_reference") else self._files(TARGET_KEYS)
        if found is None or found == self.input:
            return None
        counted = [files for files in (self.input, found) if all(file.suffix.lower() in SUFFIXES for file in files)]
        if len(counted) == 2 and len(self.input) != len(found):
            raise EbrError(f"{self.where}: has {len(self.input)} input and {len(found)} target frames")
        return found

    @property
    def restored(self) -> tuple[Path, ...] | None:
        """The result's files, if it names one."""
        return self._files(RESTORED_KEYS)

    def is_list(self, keys: Sequence[str]) -> bool:
        """Whether the value of the first of `keys` is a list: frames of a clip, be it one."""
        return isinstance(self._value(keys), list)

    def _value(self, keys: Sequence[str]) -> Any:
        if not isinstance(self.record, dict):
            raise EbrError(f"{self.where}: is no JSON object")
        return next((self.record[key] for key in keys if self.record.get(key)), None)

    def _files(self, keys: Sequence[str]) -> tuple[Path, ...] | None:
        value = self._value(keys)
        texts = [value] if isinstance(value, str) else value
        if texts is None:
            return None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise EbrError(f"{self.where}: a path has to be a text, or a list of texts, not {value!r}")
        return tuple(map(self._found, texts))

    def _found(self, text: str) -> Path:
        for root in self.roots:
            if (root / text).exists():
                return root / text
        raise EbrError(f"{self.where}: names {self.roots[0] / text}, which does not exist{self.hint}")


def read_entries(file: Path, root: Path | None = None, hint: str = "") -> Iterator[Entry]:
    """The entries of a list. Paths start from `root`, by default the list's folder, else the one above it, else the current one.

    `hint` ends the error of a file that is missing. Raises `EbrError` for a file that cannot be read or is no such list.
    """
    roots = (root,) if root else (file.parent, file.parent.parent, Path())
    records = _records(file)
    return (Entry(record, f"{file}, entry {number}", roots, hint) for number, record in enumerate(records, 1))


def _records(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EbrError(f"{file}: cannot be read as text: {error}") from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise EbrError(f"{file}: is no JSON list: {whole}") from whole
    if isinstance(found, dict):
        tables = (value for value in found.values() if isinstance(value, list) and all(isinstance(one, dict) for one in value))
        found = next(filter(None, tables), [found])
    if not isinstance(found, list) or not found:
        raise EbrError(f"{file}: has to be a JSON array of objects, at least one")
    return found
