"""What the experiments' tests share: scenes rendered in this process, photos decoded once."""

from functools import cache

import pytest
import torch

from benchmarks.claims import common
from ebr_engine.evaluation import photos
from ebr_engine.training import scenes

RENDER, LOAD_PHOTO = cache(scenes.render), cache(photos.load_photo)


@pytest.fixture(scope="module", autouse=True)  # not the package's: it would reach into whatever file the process tests next
def in_this_process():
    """No child process is started, and no photo decoded twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(scenes, "_start", scenes._render_into)
        patch.setattr(scenes, "_run", lambda processes: None)
        patch.setattr(scenes, "render", RENDER)
        patch.setattr(common, "load_photo", LOAD_PHOTO)
        yield


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Run an experiment's quick form in a folder of its own; gives what it wrote: table, plot, store."""
    import json

    def run(module, *arguments):
        module.main(["--quick", "--work", str(tmp_path), *arguments])
        name = module.__name__.rpartition(".")[2]
        folder = tmp_path / "quick"
        store = json.loads((folder / f"{name}.json").read_text())
        rows = [row for run in store.values() for row in run["rows"]]
        return (folder / f"{name}.md").read_text(), (folder / f"{name}.svg").read_text(), rows

    return run


@pytest.fixture
def every_arm():
    """`every_arm(table, plot, store)`: each arm was measured in the same cells and is shown; gives {arm: its cells}."""

    def check(text, plot, rows):
        found = {}
        for row in rows:
            found.setdefault(row["arm"], set()).add((row["task"], row["photo"], row["seed"]))
            assert 0 < row["psnr"] < 60
        assert len({frozenset(cells) for cells in found.values()}) == 1
        for arm in found:
            assert f"| {arm} |" in text
        assert plot.count("<circle") == len(found) - 1
        return found

    return check
