"""What a server is started with, checked before it listens."""

import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ebr_engine.errors import EbrError

SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Settings:
    """How a server listens, what it takes in and what it keeps.

    Raises `EbrError` where it would listen to other machines without a token.
    """

    store: Path
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None  # what clients have to show
    queue: int = 64  # jobs that may wait
    upload_bytes: int = 2 << 30  # of one request's body
    megapixels: float = 100  # of a picture or a frame; of a file of several pages, of all of them
    frames: int = 20_000  # of a clip
    store_bytes: int = 20 << 30
    keep_seconds: float = 24 * 3600  # how long the files of a finished job stay
    idle_seconds: float = 20  # without a byte of a body that has begun
    uploads: int = 8  # bodies that are read at one time

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise EbrError(f"the token has {len(self.token)} characters; it needs at least {SHORTEST_TOKEN}")
        if self.token is None and not self.is_local:
            raise EbrError(
                f"--host {self.host} lets other machines in: name a file that holds a token with --token-file, or leave it out"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def admits(self, token: str | None) -> bool:
        """Whether a client that shows `token` may come in; takes the same time wherever a wrong one differs."""
        if self.token is None:
            return True
        return hmac.compare_digest((token or "").encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """The token that a file holds: its only line. `EbrError` for a file that holds none, or that others may read."""
    lines = path.read_text().split()
    if len(lines) != 1:
        raise EbrError(f"{path}: a token file holds one word, the token; this one holds {len(lines)}")
    if path.stat().st_mode & 0o077:
        raise EbrError(f"{path}: other users may read it; take that away with: chmod 600 {path}")
    return lines[0]
