"""The classifier of degradations: what it looks at, what it tells, and that the bundled one sees what is plain to see."""

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.engine.classify import PATCH, WEIGHTS, Classifier, Diagnosis, bundled, diagnose, load_classifier, views
from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import degrade, seeds
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training.classifier import ClassifierConfig, save_classifier
from ebr_engine.training.procedural import render


def scene(number, size=256):
    return torch.from_numpy(render(number, size).image).permute(2, 0, 1)[None].float() / 255


def test_the_bundled_one_is_small():
    assert WEIGHTS.stat().st_size < 1_000_000
    assert sum(parameter.numel() for parameter in bundled().parameters()) < 300_000


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (37, 53), (96, 96), (97, 200), (300, 450), (1500, 2000), (3000, 20)])
def test_any_size_is_looked_at_with_a_bounded_number_of_patches(size):
    glance, patches = views(torch.rand(3, *size))
    assert glance.shape == (1, 3, 64, 64)
    assert patches.shape[1] <= 16
    assert max(patches.shape[-2:]) <= PATCH
    diagnosis = diagnose([torch.rand(3, *size)])
    assert all(0 <= value <= 1 for value in diagnosis.probability.values())


def test_patches_reach_every_corner_of_a_picture():
    picture = torch.arange(300 * 450.0).reshape(1, 300, 450).expand(3, -1, -1) / (300 * 450)
    _, patches = views(picture)
    for corner in (picture[0, 0, 0], picture[0, 0, -1], picture[0, -1, 0], picture[0, -1, -1]):
        assert (patches == corner).any()


@pytest.mark.parametrize("task", TASKS)
def test_what_is_plain_to_see_is_seen(task):
    clean = scene(seeds("test").start + 7)
    picture = degrade(clean, task, torch.Generator().manual_seed(seeds("test").start), strength=0.9)
    assert task in diagnose([picture[0]]).tasks


def test_a_clean_scene_has_nothing_to_repair_and_a_plain_one_is_no_error():
    clean = [diagnose([scene(seeds("test").start + number)[0]]).tasks for number in range(6)]
    assert clean.count(()) >= 4
    for value in (0.0, 0.5, 1.0):
        assert set(diagnose([torch.full((3, 40, 40), value)]).probability) == set(TASKS)


def test_frames_are_judged_together():
    frames = [scene(seeds("test").start)[0], scene(seeds("test").start + 1)[0]]
    each = [torch.tensor(list(diagnose([frame]).probability.values())).logit() for frame in frames]
    both = torch.tensor(list(diagnose(frames).probability.values())).logit()
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=1e-3, atol=1e-3)


def test_a_diagnosis_names_what_is_sure_and_how_sure():
    values = dict(zip(TASKS, (0.6, 0.97, 0.1, 0.2, 0.3)))
    assert Diagnosis(values).tasks == ("rain", "haze")
    assert str(Diagnosis(values)) == "rain 97% + haze 60%"
    nothing = Diagnosis(dict.fromkeys(TASKS, 0.1) | {"blur": 0.3})
    assert nothing.tasks == ()
    assert (nothing.likeliest, str(nothing)) == ("blur", "nothing to repair (likeliest: blur 30%)")


def test_what_is_written_is_read_back(tmp_path):
    torch.manual_seed(3)
    model = Classifier().eval()
    save_classifier(tmp_path / "c.safetensors", model, {})
    picture = torch.rand(3, 50, 60)
    assert diagnose([picture], load_classifier(tmp_path / "c.safetensors")) == diagnose([picture], model)


def test_files_that_are_no_classifier_are_refused(tmp_path):
    with pytest.raises(EbrError, match="missing"):
        load_classifier(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(EbrError, match=r"text\.safetensors"):
        load_classifier(tmp_path / "text.safetensors")
    write_tensors(tmp_path / "other.safetensors", {"weight": torch.ones(2)}, {"format": "another"})
    with pytest.raises(EbrError, match="not a classifier"):
        load_classifier(tmp_path / "other.safetensors")
    write_tensors(
        tmp_path / "half.safetensors", {"weight": torch.ones(2)}, {"format": "ebr-engine classifier 1", "labels": " ".join(TASKS)}
    )
    with pytest.raises(EbrError, match=r"half\.safetensors"):
        load_classifier(tmp_path / "half.safetensors")


def test_a_restorer_chooses_by_itself():
    restorer = Restorer("mini", device="cpu", precision="fp32")
    clean = scene(seeds("test").start + 7, 128)
    dark = degrade(clean, "lowlight", torch.Generator().manual_seed(1), strength=0.8)
    assert torch.equal(restorer.restore(dark, "auto", steps=1), restorer.restore(dark, "lowlight", steps=1))
    with pytest.raises(EbrError, match="nothing to repair"):
        restorer.restore(scene(seeds("test").start + 3), "auto", steps=1)


def test_training_seeds_only():
    with pytest.raises(EbrError, match="seed"):
        ClassifierConfig(seed=seeds("test").start)
