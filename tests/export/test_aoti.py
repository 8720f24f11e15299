"""A trunk compiled ahead of time into a package."""

import shutil

import pytest
import torch

from ebr_engine.errors import EngineError
from ebr_engine.export.aoti import load_runner, write_package
from ebr_engine.export.graph import ExportedTrunk, Graph

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("kind", "latent"), [("wan", (16, 3, 4, 6)), ("wan", None), ("flux", (16, 1, 4, 2))])
def test_a_package_gives_the_numbers_of_torch_at_every_step(tmp_path, make_tiny, kind, latent):
    model = make_tiny(kind)
    write_package(tmp_path / "x.pt2", model.trunk, model.step(1), latent, frames=True)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt2"]
    loaded = load_runner(tmp_path / "x.pt2", CPU)
    assert loaded.shapes == {name: list(table.shape) for name, table in model.step(1)._asdict().items()}
    run = ExportedTrunk(loaded, model.trunk.config, Graph("aoti", "float32", latent, None))
    for seed, size in ((1, latent or (16, 5, 2, 8)), (2, latent or (16, 1, 6, 2))):
        step, x = model.step(seed), torch.randn(2, *size)
        torch.testing.assert_close(run(x, step), model.trunk(x, step), **CLOSE)
    with pytest.raises(EngineError, match="compiled for cpu, not for cuda"):
        load_runner(tmp_path / "x.pt2", torch.device("cuda"))


def test_what_is_no_package_is_told_in_one_line(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"no package")
    with pytest.raises(EngineError, match="torch cannot load"):
        load_runner(tmp_path / "x.pt2", CPU)
