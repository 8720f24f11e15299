"""Learning the classifier: labels and degradations agree, what tells nothing varies, and the loss falls."""

import pytest
import torch

from ebr_engine.engine.classify import load_classifier
from ebr_engine.media.degradations import degrade
from ebr_engine.training.classifier import (
    ClassifierConfig,
    as_stored,
    draw_batch,
    draw_labels,
    glimpses,
    spoil,
    train,
    varied,
)


class Pool:
    """Stands in for a pool of scenes: smooth pictures."""

    def crops(self, count, size, generator):
        coarse = torch.rand(count, 4, 8, 8, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
        return fine[:, :3], fine[:, 3:], []


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


def test_labels_are_none_one_or_two_in_the_shares_asked_for(generator):
    labels = draw_labels(ClassifierConfig(batch=4000), generator)
    counts = labels.sum(1)
    assert set(counts.tolist()) == {0.0, 1.0, 2.0}
    assert abs((counts == 0).float().mean() - 0.22) < 0.03
    assert abs((counts == 2).float().mean() - 0.33) < 0.03
    assert (labels.mean(0) - labels.mean()).abs().max() < 0.03


def test_pictures_without_a_label_stay_and_the_others_do_not(generator):
    pictures, labels = torch.rand(6, 3, 32, 32), torch.cat((torch.eye(5), torch.zeros(1, 5)))
    spoiled = spoil(pictures, None, labels, generator)
    changed = (spoiled - pictures).abs().mean((1, 2, 3))
    assert (changed[:5] > 0.005).all()
    assert changed[5] == 0


def test_two_degradations_come_in_the_order_of_nature(generator):
    picture, labels = torch.rand(1, 3, 32, 32), torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0]])  # rain, low light
    strengths = torch.full((5,), 0.5)
    spoiled = spoil(picture, None, labels, torch.Generator().manual_seed(2), strengths)
    again = torch.Generator().manual_seed(2)
    expected = degrade(degrade(picture, "rain", again, strength=0.5), "lowlight", again, strength=0.5)
    assert torch.equal(spoiled, expected)


def test_tones_and_storage_keep_the_range_and_change_little(generator):
    pictures = torch.rand(8, 3, 40, 56)
    toned = varied(pictures, generator)
    assert 0 <= toned.min() <= toned.max() <= 1
    stored = as_stored(toned, 1.0, generator)
    torch.testing.assert_close(stored, (stored * 255).round() / 255)
    assert 0 < (stored - toned).abs().mean() < 0.2
    assert torch.equal(as_stored(toned, 0.0, generator), (toned * 255).round() / 255)


def test_a_seed_means_one_batch():
    config = ClassifierConfig(batch=4)
    first, second = (draw_batch(Pool(), config, 128, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    glance, patches = glimpses(first[0], torch.Generator().manual_seed(1))
    assert glance.shape == (4, 3, 64, 64)
    assert patches.shape == (4, 2, 3, 96, 96)


def test_a_run_learns_and_writes_what_it_learned(tmp_path, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("ebr_engine.training.classifier.ScenePool", lambda *_, **__: nullcontext(Pool()))
    losses = []
    config = ClassifierConfig(iterations=9, batch=6, two=0.0)
    model = train(tmp_path / "new" / "c.safetensors", config, lambda index, total, loss: losses.append(loss))
    assert len(losses) == 9
    assert sum(losses[-3:]) < sum(losses[:3])
    loaded = load_classifier(tmp_path / "new" / "c.safetensors")
    glance, patches = torch.rand(2, 3, 64, 64), torch.rand(2, 2, 3, 96, 96)
    torch.testing.assert_close(loaded(glance, patches), model(glance, patches))
