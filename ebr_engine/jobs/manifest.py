"""A list of work as a file: CSV or JSON lines with an input in each row, and if wanted an output and what is asked for it."""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ebr_engine.errors import EbrError
from ebr_engine.jobs.texts import is_prompt, prompts_of_texts
from ebr_engine.media.decoding import MediaError
from ebr_engine.request import FIELDS, RestoreRequest, typed

ASKED = tuple(name for name, one in FIELDS.items() if one.metadata.get("by_file") and name != "prompt")
COLUMNS = ("input", "output", *ASKED)
MAX_BYTES = 100_000_000  # of a manifest: a million rows


@dataclass(frozen=True)
class Row:
    """One row; `input` and `output` as written."""

    where: str  # the manifest's name and the line
    input: str
    output: str | None
    request: RestoreRequest  # of all files, but for what the row names
    task: str | None  # as the row names it
    folder: Path  # the manifest's own, that the rest is relative to

    @property
    def source(self) -> Path:
        return self.folder / Path(self.input).expanduser()


def read_manifest(path: Path, request: RestoreRequest = RestoreRequest()) -> list[Row]:
    """The rows of a manifest: `.csv` with a header line, or `.jsonl` with an object a line.

    Columns are input (required), output, and the fields of a request that may differ between files, such as task or strength;
    what a row leaves empty is as in `request`. A task may be prompt files, `FILE[:WEIGHT];FILE…`, relative to the manifest.
    Raises MediaError, naming the line, for a file that cannot be read, an unknown or missing column, or a wrong value.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise MediaError(f"{path}: a manifest is a .csv or .jsonl file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MediaError(f"{path}: is larger than {MAX_BYTES // 10**6} MB, so it is no manifest")
        if not path.is_file():
            raise MediaError(f"{path}: not a regular file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise MediaError(f"{path}:{line}: is not UTF-8 text; save it as UTF-8") from error
    read = _csv if path.suffix.lower() == ".csv" else _json_lines
    rows = [_row(path, line, values, request) for line, values in read(path, text)]
    if not rows:
        raise MediaError(f"{path}: has no rows")
    return rows


def _csv(path: Path, text: str):
    """(line, column → value) of each row that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if names is None:
                names = cells
                _check_names(path, reader.line_num, names)
                continue
            if len(cells) > len(names):
                raise MediaError(f"{path}:{reader.line_num}: has {len(cells)} cells, the header {len(names)}")
            yield reader.line_num, dict(zip(names, cells))
    except csv.Error as error:
        raise MediaError(f"{path}:{reader.line_num}: is not CSV: {error}") from error


def _json_lines(path: Path, text: str):
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise MediaError(f'{path}:{line}: is not JSON; a line is an object such as {{"input": "a.png"}}') from error
        if not isinstance(values, dict):
            raise MediaError(f'{path}:{line}: is no JSON object, such as {{"input": "a.png"}}')
        _check_names(path, line, list(values))
        yield line, values


def _check_names(path: Path, line: int, names: list[str]) -> None:
    if unknown := [name for name in names if name not in COLUMNS]:
        raise MediaError(f"{path}:{line}: unknown column {unknown[0]!r}; a manifest has {', '.join(COLUMNS)}")
    if "input" not in names:
        raise MediaError(f"{path}:{line}: has no column named input")
    if len(set(names)) < len(names):
        raise MediaError(f"{path}:{line}: names a column twice")


def _row(path: Path, line: int, values: dict, request: RestoreRequest) -> Row:
    where = f"{path}:{line}"
    for name, value in values.items():
        if value is not None and not isinstance(value, str) and name in ("input", "output", "task"):
            raise MediaError(f"{where}: {name} has to be text, not {json.dumps(value)[:40]}")
        if isinstance(value, str) and value and not _can_name(value):
            raise MediaError(f"{where}: {name} holds characters that no file name has")
    if not values.get("input"):
        raise MediaError(f"{where}: the input is empty")
    task = values.get("task") or None
    try:
        asked = {name: typed(FIELDS[name], values[name]) for name in ASKED if values.get(name) not in (None, "")}
        if task and any(map(is_prompt, task.split(";"))):
            texts = [str(path.parent / Path(part.strip()).expanduser()) for part in task.split(";")]
            asked |= {"task": None, "prompt": prompts_of_texts(texts)}
        elif task:
            asked |= {"prompt": ()}
        made = request.with_(**asked)
    except EbrError as error:
        raise MediaError(f"{where}: {error}") from error
    return Row(where, values["input"], values.get("output") or None, made, task, path.parent)


def _can_name(text: str) -> bool:
    """Whether the system takes a text as a path."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a character outside of the first plane, which JSON can write
        return False
