"""Detail from the input, as `restore`, `run`, batches, clips and engine files take it."""

import dataclasses

import numpy as np
import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.errors import EbrError, PromptError
from ebr_engine.prompts.catalogue import find_prompt
from ebr_engine.prompts.prompt import load_prompt


@pytest.fixture(scope="module")
def restorer():
    return Restorer(device="cpu", precision="fp32")


def photo(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 0.3 * torch.rand(3, height, width, generator=generator)


def runs(restorer, monkeypatch):
    """The sizes (frames, height, width) of all latents that the sampler runs, in pixels."""
    found, run = [], restorer.runner.run

    def counted(plan, degraded, *rest):
        found.append((len(degraded) * degraded.shape[2], *(side * restorer.codec.spatial for side in degraded.shape[-2:])))
        return run(plan, degraded, *rest)

    monkeypatch.setattr(restorer.runner, "run", counted)
    return found


def test_the_model_runs_once_on_a_small_version(restorer, monkeypatch):
    found = runs(restorer, monkeypatch)
    restored = restorer.restore(photo(700, 1401), "haze", steps=1, tile=128)
    assert restored.shape == (3, 700, 1401)
    assert found == [(1, 256, 512)]


def test_auto_is_what_the_prompt_says(restorer):
    image = photo(70, 90)
    for task, meant in (("haze", "input"), ("lowlight", "input"), ("rain", "model")):
        auto, named = (restorer.restore(image, task, steps=1, detail=detail) for detail in ("auto", meant))
        other = restorer.restore(image, task, steps=1, detail="model" if meant == "input" else "input")
        assert torch.equal(auto, named)
        assert not torch.equal(auto, other)


def test_of_several_prompts_in_one_run_all_have_to_say_so(restorer):
    assert restorer.plan("haze+lowlight", mix="residual").detail == "input"
    assert restorer.plan("haze+rain", mix="residual").detail == "model"
    assert [stage.detail for stage in restorer.plan("haze+rain").stages] == ["input", "model"]  # in turn: each run its own
    assert restorer.plan(t0=0.2).detail == "model"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 3), (65, 130)])
def test_any_size(restorer, size):
    assert restorer.restore(photo(*size), "haze", steps=1).shape == (3, *size)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_untouched_and_depth_kept(restorer, dtype):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (40, 50, 4), dtype=dtype)
    restored = restorer.restore(image, "haze", steps=1)
    assert restored.dtype == dtype
    assert np.array_equal(restored[..., 3], image[..., 3])


def test_a_batch_is_what_its_pictures_are_alone(restorer):
    images = [photo(70, 90, 1), photo(70, 90, 2), photo(65, 81, 3)]
    for task in ("haze", "haze+rain"):
        together = restorer.restore_batch(images, task, steps=1)
        for one, image in zip(together, images):
            assert torch.allclose(one, restorer.restore(image, task, steps=1), atol=1e-4)


def test_a_still_clip_stays_still(restorer):
    clip = photo(64, 96)[None, :, None].expand(-1, -1, 5, -1, -1)
    restored = restorer.run(clip, restorer.plan("haze", steps=1))
    assert restored.shape == clip.shape
    assert torch.allclose(restored, restored[:, :, :1].expand_as(restored), atol=1e-5)


def test_chunks_of_clips_share_frames(restorer):
    haze, rain = restorer.plan("haze", steps=1), restorer.plan("rain", steps=1)
    length, overlap = restorer.chunk_size(None, None, (1080, 1920), haze)
    assert length > overlap > 0
    alone = {"temporal_window": 0}
    assert restorer.chunk_size(None, None, (1080, 1920), rain, **alone) == restorer.chunk_size(None, None, **alone)
    assert restorer.chunk_size(None, None, (1080, 1920), haze, detail="model", **alone) == restorer.chunk_size(
        None, None, **alone
    )
    assert restorer.chunk_size(3, 1, (1080, 1920), haze) == (3, 1)
    assert restorer.chunk_size(None, None, (4320, 7680), haze)[0] < length


def test_an_engine_file_knows_it(restorer, tmp_path):
    plan = restorer.plan("haze", steps=1, mix="residual", supersample=1)
    restorer.build(tmp_path / "haze.ebr", plan)
    built = Restorer.from_engine(tmp_path / "haze.ebr", device="cpu")
    image = photo(70, 90)
    assert torch.equal(built.restore(image), restorer.restore(image, plan=plan))
    assert torch.equal(built.restore(image, detail="model"), restorer.restore(image, plan=plan, detail="model"))


def test_a_prompt_file_keeps_it(tmp_path):
    prompt = load_prompt(find_prompt("mini", "rain"))
    assert prompt.detail == "model"
    dataclasses.replace(prompt, detail="input").save(tmp_path / "mine.safetensors")
    assert load_prompt(tmp_path / "mine.safetensors").detail == "input"


def test_an_unknown_detail_is_refused(restorer, tmp_path):
    with pytest.raises(EbrError, match="detail"):
        restorer.restore(photo(8, 8), "haze", detail="both")
    dataclasses.replace(load_prompt(find_prompt("mini", "rain")), detail="both").save(tmp_path / "odd.safetensors")
    with pytest.raises(PromptError, match="detail 'both'"):
        load_prompt(tmp_path / "odd.safetensors")
