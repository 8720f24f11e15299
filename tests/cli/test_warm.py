"""`ebr-engine warm` prepares sizes, and `info` lists them."""

import json

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.engine import execute, warm


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_sizes_are_prepared_and_listed(cli, cache):
    common = ["--precision", "fp32", "--device", "cpu", "--compile", "off"]
    code, out, _ = cli("warm", "--size", "24", "--size", "32", *common)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["24 x 24", "32 x 32"]
    told = json.loads(cli("info", "--json")[1])["prepared"]
    assert list(told) == ["mini, fp32, 24 x 24", "mini, fp32, 32 x 32"]
    assert "Prepared by warm" in cli("info")[1]
    (cache / warm.FILE).write_text("{")
    assert json.loads(cli("info", "--json")[1])["prepared"] == {}


def test_auto_knows_what_compiling_takes_where_it_is_prepared(monkeypatch):
    restorer = Restorer("mini", precision="fp32", device="cpu")
    runner, plan = restorer.runner, restorer.plan("haze")
    monkeypatch.setattr(type(runner), "_evaluation_seconds", lambda *_: 1.0)
    monkeypatch.setattr(type(runner), "_compiled", lambda _: restorer.backbone)
    runner.expect([(4, 4)] * 2 + [(6, 6)] * 2)
    warm._remember(f"{warm.machine(torch.device('cpu'))}: mini, fp32, 48 x 48", {"first": 9.0, "compiled": 8.0, "kept": 0.1})
    assert execute.COMPILE_SECONDS > 4
    assert not runner._compiles((4, 4), plan)
    assert runner._compiles((6, 6), plan)


@pytest.mark.slow
def test_compiled_code_is_kept_for_the_next_process(cli, cache):
    code, out, _ = cli("warm", "--size", "32", "--precision", "fp32", "--device", "cpu")
    assert code == 0
    assert "compiled in" in out
    (one,) = warm.prepared(torch.device("cpu")).values()
    assert one["kept"] < one["compiled"]
    assert (cache / "inductor").exists()
