"""Files that go to a worker with the work: a worker sees nothing of the driver's disk."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.errors import EbrError
from ebr_engine.request import RestoreRequest

if TYPE_CHECKING:
    from ebr_engine.cluster.pool import Pool

Contents = Mapping[str, bytes]  # by the driver's path


def contents_of(paths: Iterable[Path]) -> Contents:
    """The contents of files, and of all files in folders; OSError for what cannot be read."""
    files = [each for path in paths for each in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


@contextmanager
def unpacked(contents: Contents) -> Iterator[Callable[[Path], Path]]:
    """Where each of the driver's files, and their folders, lie here while this is entered; names are kept."""
    with tempfile.TemporaryDirectory(prefix="ebr-unit-") as name:
        folders: dict[Path, Path] = {}
        for path, content in contents.items():
            parent = Path(path).parent
            here = folders.setdefault(parent, Path(name, str(len(folders)), parent.name))
            here.mkdir(parents=True, exist_ok=True)
            (here / Path(path).name).write_bytes(content)

        def place(path: Path) -> Path:
            return folders[path] if path in folders and str(path) not in contents else folders[path.parent] / path.name

        yield place


def prompts_named(requests: Iterable[RestoreRequest]) -> Contents:
    """The contents of all prompt files that requests name; a worker need not have them."""
    paths = {Path(path) for request in requests for path, _ in request.prompt if isinstance(path, str | Path)}
    try:
        return contents_of(paths)
    except OSError as error:
        raise EbrError(f"{error.filename}: {error.strerror}") from error


def as_they_end(pool: "Pool", items: Iterable[Any], give: Callable[[Any], Future], told: Any = ()) -> Iterator[tuple[Any, Any]]:
    """Items with their results, as they come: so many are given away that every worker has one and the next one waits.

    Errors of the kind `told` stand in a result's place; others are raised.
    """
    running: dict[Future, Any] = {}
    waiting = iter(items)
    end = object()
    while True:
        while len(running) < 2 * pool.size + 2 and (item := next(waiting, end)) is not end:
            running[give(item)] = item
        if not running:
            return
        done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            error = future.exception()
            yield running.pop(future), error if isinstance(error, told) else future.result()
