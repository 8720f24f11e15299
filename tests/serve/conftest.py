"""A server in this process: with the tiny backbone, or with a stand-in whose steps a test holds in its hand."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from ebr_engine.engine.classify import Diagnosis
from ebr_engine.jobs.files import Job
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.media.images import Picture, write_image
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.serve.app import Server, make_app
from ebr_engine.serve.hub import Hub
from ebr_engine.serve.settings import Settings


class StandIn:
    """Copies a file in `steps` steps, each of which waits until `go` is set; speaks as `Restorer` does."""

    backbone = SimpleNamespace(name="mini")

    def __init__(self, steps: int = 3):
        self.steps = steps
        self.go, self.began = threading.Event(), threading.Event()
        self.go.set()
        self.seen: list[dict] = []
        self.error: BaseException | None = None

    def restore_file(self, source: Path, target: Path, *, callback, resume, **options) -> Outcome:
        self.seen.append(options)
        self.began.set()
        if self.error is not None:
            raise self.error
        for step in range(self.steps):
            self.go.wait(10)
            callback((step + 1) / self.steps, f"step {step + 1}/{self.steps}")
        shutil.copyfile(source, target)
        return Outcome(Job(Path(source), Path(target)), seconds=0.1, width=8, height=8, bits=8)

    def begin(self) -> None: ...

    def diagnose(self, pictures) -> Diagnosis:
        return Diagnosis(dict.fromkeys(TASKS, 0.1) | {"haze": 0.9, "rain": 0.6})

    def plan_for(self, request) -> str:
        return request.task

    def restore(self, pixels, *, plan, seed, callback):
        self.seen.append({"task": plan})
        self.began.set()
        self.go.wait(10)
        callback(1, 1)
        return pixels * (0.2 + len(plan) / 20)


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@contextmanager
def listening(store: Path, restorer, **settings) -> Iterator[SimpleNamespace]:
    """A real server on a free port of this machine, ended in good order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(Hub(Settings(store, port=port, **settings), restorer))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, hub=server.hub, server=server)
    finally:
        server.handle_exit(15, None)
        thread.join(15)
        assert not thread.is_alive()


@contextmanager
def process(script: str, folder: Path) -> Iterator[tuple]:
    """A client of a server in a process of its own, and the process: `script` gets the store and the port as arguments."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", script, str(folder / "store"), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def is_up() -> bool:
        assert server.poll() is None, server.stderr.read()
        try:
            return inside.get("/healthz").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as inside:
            until(is_up, 90)
            yield inside, server
    finally:
        server.kill()
        server.communicate()


@contextmanager
def client(store: Path, restorer, **settings):
    """A client of the application without a network."""
    from starlette.testclient import TestClient

    hub = Hub(Settings(store, **settings), restorer)
    with TestClient(make_app(hub), base_url="http://127.0.0.1") as inside:
        inside.hub = hub
        yield inside


def until(met, seconds: float = 30.0):
    """The first true value of `met()`; fails after some seconds."""
    end = time.monotonic() + seconds
    while not (value := met()):
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)
    return value


def over(inside, id: str) -> dict:
    """A job's status when it is over."""
    return until(lambda: (job := inside.get(f"/v1/restorations/{id}").json())["status"] not in ("queued", "running") and job)


def png(path: Path, height: int = 16, width: int = 24, bits: int = 8, alpha: bool = False) -> Path:
    """A small picture of smooth values."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], -1).astype("float32") * 0.8 + 0.1
    write_image(path, Picture(pixels, alpha=pixels[..., 0] if alpha else None, bits=bits))
    return path


def post(inside, *paths: Path, request: str = '{"task": "haze"}', **more):
    """Send files to be restored."""
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    return inside.post("/v1/restorations", files=files, data={"request": request, **more})
