"""`ebr-engine cache-latents`: a cache that train then learns from without encoding anything."""

import shutil

import numpy as np
import pytest

from ebr_engine.media.images import write_image
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.training.latents import LatentSamples

QUICK = ("--size", "32", "--seed", "3", "--device", "cpu")


@pytest.fixture
def data(tmp_path):
    for side, shade in (("lq", 0.4), ("gt", 0.8)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i in range(3):
            write_image(tmp_path / "pairs" / side / f"{i}.png", np.full((40, 48, 3), shade - i / 10, np.float32))
    return "pairs"


def test_a_run_learns_the_same_from_a_cache(cli, data, monkeypatch):
    code, stdout, stderr = cli("cache-latents", "--data", data, "--views", "2", "-o", "latents", *QUICK)
    assert code == 0, stderr
    assert stdout.startswith("latents  6 made, 0 there, ")
    assert "6/6" in stderr
    assert "0 made, 6 there" in cli("cache-latents", "--data", data, "--views", "2", "-o", "latents", *QUICK)[1]
    train = ["train", "--task", "fog", "--data", data, "-n", "4", "--batch", "2", "--tokens", "3", "--set", "views=2", *QUICK]
    assert cli(*train, "-o", "plain.safetensors")[0] == 0
    monkeypatch.setattr(LatentSamples, "_encoded", None)
    code, _, stderr = cli(*train, "-o", "cached.safetensors", "--set", "cache=latents")
    assert code == 0, stderr
    plain, cached = load_prompt("plain.safetensors"), load_prompt("cached.safetensors")
    assert (plain.residual == cached.residual).all()
    assert plain.task == "fog"


def test_settings_of_the_run_are_read_from_its_file(cli, data, tmp_path):
    (tmp_path / "run.toml").write_text('task = "fog"\ndata = "pairs"\nviews = 3\nsize = 32\ndevice = "cpu"\n')
    code, stdout, stderr = cli("cache-latents", "-c", "run.toml", "-o", "latents")
    assert code == 0, stderr
    assert "9 made" in stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--data"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--data", "pairs", "--views", "0"], ["views"]),
        (["--data", "pairs", "--size", "36"], ["multiple of 8"]),
        (["--data", "pairs", "--frames", "5"], ["frames"]),
    ],
)
def test_what_cannot_be_cached_is_told_in_one_line(cli, data, arguments, words):
    code, stdout, stderr = cli("cache-latents", "-o", "latents", "--device", "cpu", *arguments)
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1
    assert all(word in stderr for word in words)


def test_a_bad_pair_is_refused_by_name_or_skipped(cli, data, tmp_path):
    shutil.copy(tmp_path / "pairs/lq/0.png", tmp_path / "pairs/lq/lone.png")
    command = ("cache-latents", "--data", data, "-o", "latents", *QUICK)
    code, _, stderr = cli(*command)
    assert code == 2
    assert "lone" in stderr
    assert "3 made" in cli(*command, "--set", "bad_data=skip")[1]
