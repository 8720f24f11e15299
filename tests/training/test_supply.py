"""Crops made ahead by processes, kept on a device and drawn from there; windows of your own pictures; scenes kept in a file."""

import numpy as np
import pytest
import torch

from ebr_engine.errors import EbrError
from ebr_engine.media.images import write_image
from ebr_engine.media.picture import Picture
from ebr_engine.training import own_pictures, scenes, supply
from ebr_engine.training.pretrainee import VOCABULARY, MiniTextEncoder
from ebr_engine.training.scenes import ScenePool
from ebr_engine.training.supply import Recipe, Supply, crops_of

CPU = torch.device("cpu")
RECIPE = Recipe((32, 64), {32: 6, 64: 2}, (0.5, 0.5), 0.5, 0.3)
PLACES = MiniTextEncoder(VOCABULARY, 16).index


@pytest.fixture
def inline(monkeypatch):
    """Scenes are rendered in this process."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(scenes, "_start", scenes._render_into)
    monkeypatch.setattr(scenes, "_run", lambda processes: None)


@pytest.fixture
def pool(inline):
    return ScenePool(3, 64)


@pytest.fixture
def pictures(tmp_path):
    """A folder with a wide red picture and, below, a small blue one."""
    folder = tmp_path / "own"
    (folder / "more").mkdir(parents=True)
    for name, size, colour in (("red.png", (80, 200), (1, 0, 0)), ("more/blue.png", (40, 48), (0, 0, 1))):
        write_image(folder / name, Picture(np.broadcast_to(np.float32(colour), (*size, 3)).copy()))
    (folder / "notes.txt").write_text("no picture")
    return folder


def batches(pool, count):
    """What a process would put into its queue."""

    class Full(Exception):
        pass

    class Queue:
        def __init__(self):
            self.items = []

        def put(self, item):
            self.items.append(item)
            if len(self.items) == count:
                raise Full

    queue = Queue()
    with pytest.raises(Full):
        supply.make(pool, RECIPE, PLACES, 16, queue, 5)
    return queue.items


def test_a_process_makes_the_crops_and_captions_that_a_step_would(pool):
    generator, text = torch.Generator().manual_seed(5), MiniTextEncoder(VOCABULARY, 16)
    made = batches(pool, 8)
    assert {size for size, *_ in made} == {32, 64}
    for size, images, ids in made:
        assert RECIPE.size(generator) == size
        expected, words = crops_of(pool, RECIPE, size, generator)
        assert images.dtype == torch.uint8
        torch.testing.assert_close(images.float() / 255, expected, rtol=0, atol=0.502 / 255)
        assert torch.equal(ids, text.tokenize(words))


def test_new_crops_take_the_place_of_the_oldest(pool, monkeypatch):
    monkeypatch.setattr(supply, "KEPT", 8 * 3 * 32 * 32)  # eight crops
    one = Supply(pool, RECIPE, PLACES, 16, 1, CPU, 0)
    for value in (1, 2, 3):
        one.keep(32, torch.full((3, 3, 32, 32), value, dtype=torch.uint8), torch.full((3, 16), value))
    assert one.kept[32][0][:, 0, 0, 0].tolist() == [3, 1, 1, 2, 2, 2, 3, 3]
    assert one.kept[32][1][:, 0].tolist() == [3, 1, 1, 2, 2, 2, 3, 3]
    assert one.made == 9
    images, ids = one.draw_kept(32, torch.Generator().manual_seed(0))
    assert images.shape == (6, 3, 32, 32)
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), ids[:, 0])


def test_processes_fill_a_device_and_end_with_the_context(pool):
    with Supply(pool, RECIPE, PLACES, 16, 1, CPU, 0) as one:
        images, ids = one.draw(64, torch.Generator().manual_seed(0))
        processes = one.processes
    assert images.shape == (2, 3, 64, 64)
    assert 0 <= images.min() < images.max() <= 1
    assert ids.shape == (2, 16)
    assert not any(process.is_alive() for process in processes)


def test_processes_that_give_nothing_are_given_up(pool, monkeypatch):
    monkeypatch.setattr(supply, "PATIENCE", 0.01)
    one = Supply(pool, RECIPE, PLACES, 16, 1, CPU, 0)
    one.queue = torch.multiprocessing.get_context("spawn").Queue()
    with pytest.raises(RuntimeError, match="give none"):
        one.draw(32, torch.Generator())


def test_your_own_pictures_are_cut_into_windows(pictures, inline):
    pool = ScenePool(8, 64, data=pictures)
    assert not pool.has_depth
    colours = {tuple(pixels[:3].flatten(1).float().mean(1).round().int().tolist()) for pixels in pool.pixels}
    assert colours == {(255, 0, 0), (0, 0, 255)}
    images, words = crops_of(pool, Recipe((32,), {32: 64}, (1.0,), 0.5, 0.0), 32, torch.Generator().manual_seed(0))
    assert images.isfinite().all()
    assert ("clean",) in words
    assert {len(caption) for caption in words} == {1, 2}  # the damage, nothing of a scene


def test_a_window_is_a_part_at_some_scale(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32)
    write_image(tmp_path / "ramp.png", Picture(np.broadcast_to(ramp[None, :, None], (128, 256, 3)).copy()))
    spans = []
    for seed in range(12):
        cut = own_pictures.window(own_pictures.sources(tmp_path), seed, 32)
        assert (cut.shape, cut.dtype) == ((32, 32, 3), np.uint8)
        assert np.array_equal(cut, own_pictures.window(own_pictures.sources(tmp_path), seed, 32))
        spans.append(abs(int(cut[0, -1, 0]) - int(cut[0, 0, 0])))
    assert 20 < min(spans) < 60 < max(spans) < 132


@pytest.mark.parametrize(("name", "words"), [("nothing", "no folder"), ("empty", "no picture")])
def test_a_folder_without_pictures_is_told(tmp_path, inline, name, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EbrError, match=words):
        ScenePool(2, 64, data=tmp_path / name)


def test_scenes_are_rendered_once_and_read_again(tmp_path, inline, monkeypatch):
    path = tmp_path / "scenes.safetensors"
    first = ScenePool(2, 64, keep=path)
    monkeypatch.setattr(scenes, "_start", lambda *_: pytest.fail("rendered again"))
    again = ScenePool(2, 64, keep=path)
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.words, again.words)
    with pytest.raises(EbrError, match="other scenes"):
        ScenePool(3, 64, keep=path)
    path.write_bytes(b"damaged")
    with pytest.raises(EbrError, match="no file of scenes"):
        ScenePool(2, 64, keep=path)
