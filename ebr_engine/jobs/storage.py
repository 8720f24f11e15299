"""Files behind addresses such as `s3://bucket/photos`, by fsspec (extra `cluster`): found, fetched, and put whole or not at all.

An object store shows an object when its last part has arrived, so nothing half written is ever seen there; elsewhere a file is
written under another name and renamed.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ebr_engine.errors import EbrError
from ebr_engine.jobs.journal import Stamp
from ebr_engine.jobs.texts import is_address
from ebr_engine.media.decoding import MediaError

_WHOLE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory")  # an object appears when all of it is there


@dataclass(frozen=True)
class Stored:
    """A file of a storage."""

    place: "Place"
    relative: PurePosixPath  # below what was named
    stamp: Stamp

    @property
    def address(self) -> str:
        return self.place.address


@dataclass(frozen=True)
class Place:
    """A file or a folder: a file system of fsspec, and a path in it."""

    fs: Any
    path: str

    @classmethod
    def of(cls, text: str) -> "Place":
        """The place of an address or of a path of this machine; `EbrError` for an address that nothing reads."""
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise EbrError(f"{text}: addresses need fsspec: pip install 'ebr-engine[cluster]'") from error
        try:
            fs, path = url_to_fs(
                text if is_address(text) else os.path.abspath(os.path.expanduser(text)), use_listings_cache=False
            )
        except ImportError as error:
            raise EbrError(f"{text}: {' '.join(str(error).split())}") from error
        except (ValueError, TypeError) as error:
            raise EbrError(f"{text}: no such kind of address: {' '.join(str(error).split())}") from error
        return cls(fs, path.rstrip("/"))

    @property
    def local(self) -> bool:
        """Whether it lies on this machine."""
        return "file" in _protocols(self.fs)

    @property
    def address(self) -> str:
        """As it is told to people: with its kind, but for a path of this machine."""
        return self.path if self.local else self.fs.unstrip_protocol(self.path)

    def __truediv__(self, relative: "str | PurePosixPath") -> "Place":
        return Place(self.fs, f"{self.path}/{relative}")

    def files(self) -> Iterator[Stored]:
        """The file itself, all below a folder, or all that match a pattern, in order of their names; hidden ones left aside.

        Raises MediaError where there is nothing.
        """
        with told(self.address):
            if any(sign in self.path for sign in "*?[") and not self.fs.exists(self.path):
                found, top = self.fs.glob(self.path, detail=True), _before_wildcard(self.path)
            else:
                found, top = self.fs.find(self.path, detail=True), self.path
        found = {path: about for path, about in found.items() if about["type"] == "file"}
        if not found:
            raise MediaError(f"{self.address}: no such file or folder, or nothing in it")
        for path, about in sorted(found.items()):
            relative = PurePosixPath(path[len(top) :].lstrip("/") or path.rsplit("/", 1)[-1])
            if not any(part.startswith(".") for part in relative.parts):
                yield Stored(Place(self.fs, path), relative, _stamp(about))

    def sizes(self) -> dict[str, int]:
        """Paths and bytes of all that is here: a file, or all below a folder; nothing where nothing is."""
        with told(self.address):
            return {path: about["size"] or 0 for path, about in self.fs.find(self.path, detail=True).items()}

    def is_file(self) -> bool:
        """Whether there is a file under this very name."""
        with told(self.address):
            return self.fs.isfile(self.path)

    def read(self) -> bytes:
        """The content of a file."""
        with told(self.address):
            return self.fs.cat_file(self.path)

    def fetch(self, path: Path, stamp: Stamp) -> None:
        """Have the file at a path of this machine, with its time; one that is here already is linked to."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if self.local:
            path.symlink_to(self.path)
            return
        with told(self.address):
            self.fs.get_file(self.path, str(path))
        os.utime(path, ns=(stamp.time, stamp.time))

    def put(self, path: Path) -> None:
        """Store a finished file of this machine under this name, whole or not at all."""
        with told(self.address):
            parent = self.path.rsplit("/", 1)[0]
            if set(_protocols(self.fs)) & set(_WHOLE):
                self.fs.put_file(str(path), self.path)
                return
            part = f"{parent}/.ebr-{secrets.token_hex(6)}.part"
            self.fs.makedirs(parent, exist_ok=True)
            try:
                if self.local:
                    shutil.copyfile(path, part)
                    os.replace(part, self.path)
                else:
                    self.fs.put_file(str(path), part)
                    self.fs.mv(part, self.path)
            except BaseException:
                if self.fs.exists(part):
                    self.fs.rm_file(part)
                raise

    def write(self, content: bytes) -> None:
        """Store a content under this name."""
        with told(self.address):
            if self.local:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self.fs.pipe_file(self.path, content)


@contextmanager
def told(address: str) -> Iterator[None]:
    """What a storage's own library raises, as a MediaError that names the address."""
    try:
        yield
    except (EbrError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{address}: no such file, folder or bucket") from error
    except Exception as error:  # every library has its own
        line = " ".join(str(error).split()) or type(error).__name__
        raise MediaError(f"{address}: {line}") from error


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _before_wildcard(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))])


def _stamp(about: dict[str, Any]) -> Stamp:
    """Bytes and time of change; where a storage tells no time, 0: a change that keeps the length is then not seen."""
    time = about.get("LastModified") or about.get("mtime") or about.get("updated") or about.get("last_modified") or 0
    seconds = time.timestamp() if hasattr(time, "timestamp") else float(time) if isinstance(time, int | float) else 0.0
    return Stamp(about["size"] or 0, int(seconds * 1e9))
