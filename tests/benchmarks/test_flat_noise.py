"""Noise of flat areas is told as a share of the input's."""

import json

import numpy as np
import pytest

from benchmarks import quality
from ebr_engine.media.images import write_image
from ebr_engine.media.picture import Picture


@pytest.fixture
def written(tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((60, 90, 1)) * np.where(np.arange(90) < 45, 0.01, 0.1)[None, :, None]

    def write(name, times, width=90):
        picture = Picture(np.clip(0.5 + times * noise[:, :width].repeat(3, 2), 0, 1).astype(np.float32), bits=16)
        write_image(tmp_path / name, picture)
        return str(tmp_path / name)

    return write


def test_twice_the_noise_is_told_as_two(written, tmp_path):
    quality.main(["flat", written("a.png", 1), written("b.png", 2), written("c.png", 1), "--json", str(tmp_path / "flat.json")])
    louder, same = json.loads((tmp_path / "flat.json").read_text())["rows"]
    for name in ("flattest third", "same places"):
        assert louder[name] == pytest.approx(2, rel=0.01)
        assert same[name] == pytest.approx(1)


def test_files_of_another_size_are_refused(written, capsys):
    with pytest.raises(SystemExit):
        quality.main(["flat", written("a.png", 1), written("b.png", 1, width=80)])
    assert "differ in size" in capsys.readouterr().err
