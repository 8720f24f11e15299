"""A tiny backbone of random numbers and a pool of four small scenes, for tests of learning."""

import numpy as np
import pytest
import torch

from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.media.images import write_image
from ebr_engine.training import loop, scenes
from ebr_engine.training.scenes import ScenePool
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A backbone of random numbers that listens to its prompt; its codec weighs the channels unequally."""
    codec = LappedCodec(scale=torch.linspace(0.5, 2, LappedCodec.channels))
    return save_tiny(tmp_path_factory.mktemp("mini") / "tiny.safetensors", gain=10, time=0, codec=codec)


@pytest.fixture(scope="session")
def pool():
    """Four small scenes, rendered in this process; `numbers` are the scenes' seeds."""
    numbers = []

    def render(number, size, original=scenes.render):
        numbers.append(number)
        return original(number, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", render)
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(scenes, "_start", scenes._render_into)
        patch.setattr(scenes, "_run", lambda processes: None)
        pool = ScenePool(4, 64)
    pool.numbers = numbers
    return pool


@pytest.fixture
def small_pool(pool, monkeypatch):
    """Runs take the small pool."""
    monkeypatch.setattr(loop, "still_pool", lambda capacity: pool)


def smooth(height, width, seed):
    """A smooth picture [H, W, 3] in [0.1, 0.9]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / (7 + c) + seed) * np.cos(y / 9 - seed * c) for c in range(3)]
    return (0.5 + 0.4 * np.stack(waves, axis=2)).astype(np.float32)


@pytest.fixture
def pairs(tmp_path):
    """`pairs(folder="pairs", count=4, height=48, width=56, names=("input", "target"))`: darkened pictures beside clean ones."""

    def make(folder="pairs", count=4, height=48, width=56, names=("input", "target")):
        root = tmp_path / folder
        for name in names:
            (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            clean = smooth(height, width, i)
            write_image(root / names[0] / f"{i:02d}.png", clean * 0.4)
            write_image(root / names[1] / f"{i:02d}.png", clean)
        return root

    return make
