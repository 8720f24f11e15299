"""What is taken from the environment, and what is put there."""

import os

import pytest

from ebr_engine import settings


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_briefly_unless_told_otherwise(given, spins, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    settings.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
