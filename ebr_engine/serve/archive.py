"""Many files as one ZIP, made while it is sent: nothing of it lies on the disk or, but for a block, in memory."""

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK = 1 << 20


class _Sent(io.RawIOBase):
    """A file that only goes forward, and hands on what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self._written.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """What has been written since the last time."""
        taken = b"".join(self._written)
        self._written.clear()
        return taken


def zipped(files: Iterable[tuple[Path, str]]) -> Iterator[bytes]:
    """The archive of (file, name in the archive), stored as they are; of equal names later ones get a number.

    A file that is gone by the time its turn comes is left out.
    """
    sent, used = _Sent(), set()
    with zipfile.ZipFile(sent, "w", strict_timestamps=False) as archive:
        for path, wanted in files:
            try:
                source = path.open("rb")
            except FileNotFoundError:
                continue
            with source, archive.open(zipfile.ZipInfo.from_file(path, _free(wanted, used)), "w") as member:
                while block := source.read(BLOCK):
                    member.write(block)
                    yield sent.taken()
    yield sent.taken()


def _free(wanted: str, used: set[str]) -> str:
    stem, dot, suffix = wanted.rpartition(".")
    name, number = wanted, 1
    while name.casefold() in used:  # as systems see it that do not tell a from A
        number += 1
        name = f"{stem} ({number}){dot}{suffix}"
    used.add(name.casefold())
    return name
