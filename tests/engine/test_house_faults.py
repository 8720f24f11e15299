"""The Python interface keeps what it promises: batches, plans, paths, arrays of every form, precision where weights wait."""

import numpy as np
import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.backbones import layers
from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import load_backbone
from ebr_engine.engine.classify import Diagnosis
from ebr_engine.errors import BackboneError, EbrError, EngineWarning
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.prompts.catalogue import TASKS
from tests.tiny import make_prompt, picture

ROUNDING = 1e-5


def test_in_a_batch_prompts_in_turn_restore_what_they_restore_alone(restorer):
    plan = restorer.plan(prompt=[make_prompt(0), make_prompt(1)], mix="turn")
    images = [picture(37, 53)[0], picture(24, 33)[0], picture(40, 56)[0]]
    for image, together in zip(images, restorer.restore_batch(images, plan=plan)):
        torch.testing.assert_close(together, restorer.restore(image, plan=plan), atol=ROUNDING, rtol=0)


def test_a_batch_may_leave_the_task_to_auto(monkeypatch):
    restorer = Restorer("mini", device="cpu", precision="fp32")
    seen = iter(["haze", "rain", "haze"])

    def diagnose(pictures):
        probability = dict.fromkeys(TASKS, 0.0)
        return Diagnosis(probability | {next(seen): 1.0})

    monkeypatch.setattr(restorer, "diagnose", diagnose)
    images = [picture(16, 16, seed=seed)[0] for seed in range(3)]
    together = restorer.restore_batch(images, task="auto", steps=1)
    for image, task, result in zip(images, ("haze", "rain", "haze"), together):
        torch.testing.assert_close(result, restorer.restore(image, task=task, steps=1), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("method", ["restore", "restore_batch"])
def test_what_is_misspelt_or_asked_twice_is_refused(restorer, method):
    plan, image = restorer.plan(prompt=make_prompt()), picture(16, 16)[0]
    images = image if method == "restore" else [image]
    with pytest.raises(EbrError, match="'seeds'; did you mean 'seed'"):
        getattr(restorer, method)(images, plan=plan, seeds=3)
    with pytest.raises(EbrError, match="a plan has its task"):
        getattr(restorer, method)(images, task="haze", plan=plan)
    with pytest.raises(EbrError, match="a plan has its steps"):
        getattr(restorer, method)(images, plan=plan, steps=2)


def test_a_tensor_that_could_be_two_things_is_refused_where_it_matters(restorer):
    plan, pictures = restorer.plan(prompt=make_prompt()), torch.cat([picture(16, 16, seed=seed) for seed in range(3)])
    assert restorer.restore(pictures, plan=plan).shape == (3, 3, 16, 16)
    with pytest.raises(EbrError, match="three pictures or a clip"):
        restorer.restore_batch([pictures], plan=plan)
    (clip,) = restorer.restore_batch([pictures.transpose(0, 1)[None]], plan=plan)
    assert clip.shape == (1, 3, 3, 16, 16)
    (batch,) = restorer.restore_batch([pictures[:2]], plan=plan)
    torch.testing.assert_close(batch, restorer.restore(pictures[:2], plan=plan), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 1), (16, 24, 2), (16, 24, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_grey_and_transparent_arrays_come_back_as_they_came(restorer, shape, dtype):
    plan = restorer.plan(prompt=make_prompt())
    values = np.random.default_rng(0).random(shape) * 0.4 + 0.3
    image = (values * 255).astype(np.uint8) if dtype is np.uint8 else values.astype(np.float32)
    result = restorer.restore(image, plan=plan)
    assert (result.shape, result.dtype) == (image.shape, image.dtype)
    assert not np.array_equal(result, image)
    if shape[-1] in (2, 4):
        assert np.array_equal(result[..., -1], image[..., -1])
    colours = image[..., :3] if shape[-1] == 4 else np.repeat(image.reshape(16, 24, -1)[..., :1], 3, axis=-1)
    alone = restorer.restore(np.ascontiguousarray(colours), plan=plan)
    if shape[-1] == 4:
        assert np.array_equal(result[..., :3], alone)


def test_a_path_gives_an_array_of_its_depth(restorer, tmp_path):
    plan = restorer.plan(prompt=make_prompt())
    pixels = picture(16, 24)[0].permute(1, 2, 0).numpy()
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        write_image(tmp_path / f"{bits}.png", Picture(pixels, bits=bits))
        result = restorer.restore(str(tmp_path / f"{bits}.png"), plan=plan)
        assert (result.shape, result.dtype) == ((16, 24, 3), dtype)


def test_a_file_is_restored_as_the_command_does_it(tmp_path):
    restorer = Restorer("mini", device="cpu", precision="fp32")
    write_image(tmp_path / "in.png", Picture(picture(16, 24)[0].permute(1, 2, 0).numpy(), bits=16))
    heard = []
    outcome = restorer.restore_file(
        tmp_path / "in.png", tmp_path / "out.png", task="haze", steps=2, callback=lambda share, where: heard.append(share)
    )
    assert (outcome.width, outcome.height, outcome.bits, outcome.error) == (24, 16, 16, None)
    assert read_image(tmp_path / "out.png").bits == 16
    assert heard == sorted(heard)
    assert heard
    with pytest.raises(EbrError, match="exists"):
        restorer.restore_file(tmp_path / "in.png", tmp_path / "out.png", task="haze")
    with pytest.raises(EbrError, match=r"nope\.png"):
        restorer.restore_file(tmp_path / "nope.png", tmp_path / "x.png", task="haze")
    with pytest.raises(EbrError, match="did you mean 'strength'"):
        restorer.restore_file(tmp_path / "in.png", tmp_path / "x.png", task="haze", strenght=1)


def test_where_weights_wait_precision_goes_by_the_device_that_computes(weights, monkeypatch):
    monkeypatch.setattr(layers, "cpu_has_bf16", lambda: False)
    cpu, source = torch.device("cpu"), ModelSource(weights)
    assert load_backbone("mini", source, cpu, "auto").dtype == torch.float32
    assert load_backbone("mini", source, cpu, "auto", torch.device("cuda")).dtype == torch.bfloat16
    assert load_backbone("mini", source, cpu, "fp8", torch.device("cuda")).dtype == torch.bfloat16
    assert load_backbone("mini", source, cpu, "bf16", torch.device("cuda")).dtype == torch.bfloat16


def test_a_cpu_without_bf16_takes_float32_in_its_place_and_says_so(weights, monkeypatch):
    cpu, source = torch.device("cpu"), ModelSource(weights)
    monkeypatch.setattr(layers, "cpu_has_bf16", lambda: True)
    assert load_backbone("mini", source, cpu, "bf16").dtype == torch.bfloat16
    monkeypatch.setattr(layers, "cpu_has_bf16", lambda: False)
    with pytest.warns(EngineWarning, match="no bf16 arithmetic: float32"):
        assert load_backbone("mini", source, cpu, "bf16").dtype == torch.float32


@pytest.mark.parametrize("given", [{"vae": "nowhere"}, {"context": "nowhere"}, {"revision": "main"}, {"sample_latents": True}])
def test_what_mini_does_not_take_is_refused(given):
    with pytest.raises(BackboneError, match="mini backbone takes no"):
        Restorer("mini", **given)


def test_a_size_that_is_not_published_is_refused():
    with pytest.raises(EbrError, match="mini has no published size"):
        _ = Restorer("mini", device="cpu").released_size
