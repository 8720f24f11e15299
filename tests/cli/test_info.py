"""`ebr-engine info` tells what is there, and why something is not."""

import json
from dataclasses import dataclass

import pytest

from ebr_engine.kernels import backend
from ebr_engine.version import __version__


@dataclass(frozen=True)
class Backend:
    name: str
    available: bool
    reason: str


@pytest.fixture(autouse=True)
def two_backends(monkeypatch):
    found = [Backend("reference", True, "always"), Backend("triton", False, "no CUDA device [none]")]
    monkeypatch.setattr(backend, "backends", lambda: found)


def test_json_holds_every_fact(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    code, stdout, stderr = cli("info", "--json")
    assert (code, stderr) == (0, "")
    facts = json.loads(stdout)
    assert facts["version"] == __version__
    assert facts["device"] in ("cpu", "cuda")
    assert facts["precision"] in ("bf16", "fp32")
    assert facts["cpu"]["threads"] >= 1
    assert facts["cpu"]["name"]
    assert facts["folders"]["cache"] == str(tmp_path / "cache")
    assert facts["kernels"] == [
        {"name": "reference", "available": True, "reason": "always"},
        {"name": "triton", "available": False, "reason": "no CUDA device [none]"},
    ]
    assert facts["backbones"]["flux-dev"]["conditioner_parameters"] == 3_292_296_192
    assert facts["backbones"]["flux-dev"]["trunk_bytes"] == 2 * 8_609_112_128
    for name in ("python", "torch", "safetensors", "pyvips", "libvips"):
        assert facts["versions"][name][0].isdigit()
    assert set(facts["versions"]) >= {"triton", "diffusers", "transformers"}


def test_the_table_tells_the_same(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, stdout, _ = cli("info")
    assert code == 0
    facts = json.loads(cli("info", "--json")[1])
    for word in (__version__, facts["cpu"]["name"], facts["versions"]["libvips"], facts["folders"]["prompts"]):
        assert word in stdout
    assert "no CUDA device [none]" in stdout
    assert "\x1b" not in stdout


def test_prompts_in_the_users_folder_are_listed_and_broken_ones_do_not_stop_it(cli, tmp_path, monkeypatch):
    import torch

    from ebr_engine.prompts.prompt import Prompt

    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path))
    Prompt(torch.ones(2, 4), torch.ones(3), "flux", task="moire").save(tmp_path / "deep" / "x.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"junk")
    assert json.loads(cli("info", "--json")[1])["tasks"]["flux"] == ["moire"]
    assert "moire" in cli("info")[1]


def test_a_missing_package_is_told_not_raised(cli, monkeypatch):
    from ebr_engine.cli import info

    monkeypatch.setattr(info, "PACKAGES", ("torch", "surely-not-installed"))
    assert json.loads(cli("info", "--json")[1])["versions"]["surely-not-installed"] is None
    assert "not installed" in cli("info")[1]


def test_every_backbone_tells_the_memory_that_it_needs_and_the_least(cli):
    needs = json.loads(cli("info", "--json")[1])["memory"]
    assert set(needs) >= {"mini", "wan-1.3b", "wan-14b", "flux-dev"}
    assert all(0 < n["least_bytes"] <= n["low_bytes"] < n["bytes"] for n in needs.values())
    assert "832 x 480, 33 frames" in cli("info")[1]
