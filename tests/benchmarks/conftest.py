"""A run of the GPU check's sections on the CPU."""

import json
import sys
import time

import pytest
import torch

from benchmarks import clock
from ebr_engine.kernels import backend


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A tiny run whose operations go through their registrations, as on a device; `rows()` reads what it kept."""
    monkeypatch.setattr(backend, "FORCED", True)
    one = clock.Run(torch.device("cpu"), True, time.monotonic() + 600, (tmp_path / "rows").open("w"), tmp_path)
    one.rows = lambda: [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    yield one
    one.file.close()


@pytest.fixture
def undone():
    """What a section sets for its own process does not outlive a test of it."""
    yield
    if "torch._dynamo" in sys.modules:  # or it would be imported to be reset
        torch.compiler.reset()
