"""A stand-in engine, so that the command line is tested without a model."""

import contextlib
import sys
import types
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from ebr_engine.backbones.registry import spec
from ebr_engine.cli import app
from ebr_engine.errors import EbrError


class Planned(dict):
    """What a plan was made of; pictures are seen as they are."""

    def stages_for(self, height, width):
        return [SimpleNamespace(supersample=1)]


class FakeRestorer:
    """Inverts pictures in five steps; knows one task; every call is kept in `calls`."""

    made: ClassVar[list] = []
    calls: ClassVar[list] = []
    expected: ClassVar[list] = []
    released: ClassVar[dict] = {"wan": (4, 6)}

    smaller = ""
    seconds = None  # that a run is expected to take

    def __init__(self, backbone="mini", **settings):
        if settings.get("device") == "cuda:9":
            raise EbrError("no device cuda:9; this machine has: cpu")
        facts = spec(backbone)
        self.backbone = SimpleNamespace(name=backbone, spec=replace(facts, released_size=self.released.get(backbone)))
        self.made.append({"backbone": backbone, **settings})

    @classmethod
    def from_request(cls, request, here=True):
        options = request.part("load")
        if engine := options.pop("engine"):
            kept = ("vae", "device", "offload", "compile", "max_memory", "low_memory", "devices")
            return cls.from_engine(engine, **{name: options[name] for name in kept})
        return cls(**options)

    @property
    def asks_per_frame(self):
        return self.backbone.spec.asks_for_frames

    @property
    def released_size(self):
        return self.backbone.spec.released_size

    def begin(self):
        pass

    def close(self):
        pass

    def diagnose(self, pictures):
        from ebr_engine.engine.classify import diagnose

        return diagnose(pictures)

    def plan_for(self, request):
        return self.plan(**request.part("plan"))

    def plan(self, task=None, prompt=None, **settings):
        if task not in (None, "haze"):
            raise EbrError(f"unknown task {task!r}; bundled with mini: haze")
        return Planned(task=task, prompt=prompt, **settings)

    def expect(self, pictures):
        self.expected.append(list(pictures))

    def estimate(self, pictures):
        return self.seconds if list(pictures) else None

    def tile_size(self, *sizes):
        pass

    def chunk_size(self, frames, overlap, *size, **tiling):
        return frames or 2, overlap or 0

    class codec:
        @staticmethod
        def frames(count):
            return count

    def run(self, clip, *, plan, callback, **settings):
        self.calls.append({"size": tuple(clip.shape), **plan, **settings})
        callback(1, 1)
        return 1 - clip

    def previewing(self):
        return contextlib.nullcontext()

    def restore(self, image, *, plan, callback, **settings):
        assert image.dtype == np.float32
        self.calls.append({"size": image.shape[:2], **plan, **settings})
        for index in range(5):
            callback(index + 1, 5)
        return 1 - image


@pytest.fixture
def engine(monkeypatch):
    """The stand-in in the engine's place; its `made` and `calls` start empty."""
    fake = types.ModuleType("ebr_engine.engine.restorer")
    fake.Restorer = type("Restorer", (FakeRestorer,), {"made": [], "calls": [], "expected": []})
    monkeypatch.setitem(sys.modules, "ebr_engine.engine.restorer", fake)
    return fake.Restorer


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run the command in an empty folder; gives (exit code, stdout, stderr) and never hides an unexpected exception."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EBR_DEBUG", raising=False)

    def run(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="ebr-engine")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run
