"""Pictures that the transformer sees finer than their pixels: which prompts are taken, what is run and what comes out."""

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.engine import plan as planning
from ebr_engine.engine.memory import peak
from ebr_engine.errors import EbrError, EngineError, PromptError
from ebr_engine.media.sizes import enlarged, resized
from ebr_engine.prompts.catalogue import FINEST, find_prompts, fine_file, installed_file, with_fine
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.request import RestoreRequest
from tests.tiny import make_prompt, picture, save_tiny


@pytest.fixture
def restorer(tmp_path, monkeypatch):
    """A tiny backbone; of the user's prompts rain has a fine one, too, and haze has none."""
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    for seed, task in enumerate(("rain", "haze")):
        make_prompt(seed).save(installed_file("mini", task))
    make_prompt(7, supersample=2, t0=0.3).save(installed_file("mini", "fine/rain"))
    return Restorer(model=save_tiny(tmp_path / "tiny.safetensors"), device="cpu", precision="fp32", compile="off")


@pytest.fixture
def ran(restorer, monkeypatch):
    """Sides in pixels of what the sampler runs, and the T0 that it starts from."""
    found, run = [], restorer.runner.run

    def noted(plan, degraded, *rest):
        found.append((*(side * restorer.codec.spatial for side in degraded.shape[-2:]), plan.table.t0))
        return run(plan, degraded, *rest)

    monkeypatch.setattr(restorer.runner, "run", noted)
    return found


def test_a_small_picture_is_seen_finer_where_the_task_has_a_prompt_for_it(restorer, ran):
    image = picture(24, 40)
    for task, how, sides in (
        ("rain", {}, (48, 80, 0.3)),
        ("rain", {"supersample": 2}, (48, 80, 0.3)),
        ("rain", {"supersample": 1}, (24, 40, 0.2)),
        ("haze", {}, (24, 40, 0.2)),
        ("haze", {"supersample": 2}, (24, 40, 0.2)),
    ):
        ran.clear()
        assert restorer.restore(image, task, **how).shape == image.shape
        assert ran == [sides]


def test_it_is_the_larger_picture_restored_and_reduced(restorer):
    image = picture(24, 40)
    prompt = load_prompt(fine_file(installed_file("mini", "rain")))
    larger = enlarged(image.unsqueeze(2), 2)[:, :, 0]
    plain = restorer.restore(larger, prompt=make_prompt(7, t0=0.3))
    expected = resized(plain.unsqueeze(2), 24, 40)[:, :, 0]
    assert torch.allclose(restorer.restore(image, prompt=prompt), expected, atol=1e-6)
    assert torch.allclose(restorer.restore(image, "rain"), expected, atol=1e-6)


def test_a_large_picture_is_not_unless_it_is_asked_for(restorer, ran, monkeypatch):
    monkeypatch.setattr(planning, "FINE_PIXELS", 24 * 40)
    restorer.restore(picture(24, 40), "rain")
    restorer.restore(picture(24, 48), "rain")
    restorer.restore(picture(24, 48), "rain", supersample=2)
    assert ran == [(48, 80, 0.3), (24, 48, 0.2), (48, 96, 0.3)]


def test_a_clip_is_not_unless_it_is_asked_for(restorer, ran):
    clip = picture(24, 40, batch=3).transpose(0, 1)[None]
    for how, sides in (({}, (24, 40, 0.2)), ({"supersample": 2}, (48, 80, 0.3))):
        ran.clear()
        plan = restorer.plan("rain", **how)
        assert restorer.run(clip, plan, temporal_window=0).shape == clip.shape
        assert set(ran) == {sides}


def test_a_batch_is_what_its_pictures_are_alone(restorer):
    images = [picture(24, 40, seed=seed) for seed in range(3)] + [picture(32, 24)]
    for task in ("rain", "rain+haze"):
        for one, image in zip(restorer.restore_batch(images, task), images):
            assert torch.allclose(one, restorer.restore(image, task), atol=1e-4)


def test_of_prompts_in_turn_each_sees_the_picture_in_its_own_way(restorer, ran):
    restorer.restore(picture(24, 40), "haze+rain")
    assert ran == [(24, 40, 0.2), (48, 80, 0.3)]


def test_prompts_of_one_run_need_one_fineness(restorer, ran):
    files = [(installed_file("mini", "haze"), 1.0), (installed_file("mini", "fine/rain"), 1.0)]
    with pytest.raises(EngineError, match="take --mix turn"):
        restorer.restore(picture(), prompt=files, mix="residual")
    with pytest.raises(EngineError, match="other finenesses"):
        restorer.restore(picture(), "haze+rain", mix="velocity", supersample=2)
    restorer.restore(picture(24, 40), "haze+rain", mix="velocity")  # not asked for: as the one that has no fine prompt
    assert ran == [(24, 40, 0.2)]


def test_in_tiles_no_small_version_gives_the_tones(restorer, ran):
    image = picture(40, 72)
    whole = restorer.restore(image, "rain", supersample=2, tile=0)
    ran.clear()
    tiled = restorer.restore(image, "rain", supersample=2, tile=64, tile_overlap=32)
    assert len(ran) == 1  # for all tiles
    assert (tiled - whole).abs().mean() < 0.05
    restorer.restore(picture(80, 144), "rain", supersample=1, tile=64, tile_overlap=32)
    assert len(ran) == 3


def test_the_work_of_a_finer_run_is_counted(restorer):
    fine, plain = restorer.plan("rain").fine, restorer.plan("rain")
    count = lambda plan, side: restorer.engine.evaluations(side, side, plan, None, None, "latent", "auto")  # noqa: E731
    assert count(fine, 64) == {(16, 16): 5}
    assert count(plain, 64) == {(8, 8): 5}


def test_an_engine_file_keeps_it(restorer, ran, tmp_path):
    image = picture(24, 40)
    restorer.build(tmp_path / "rain.engine", restorer.plan("rain", supersample=2))
    built = Restorer.from_engine(tmp_path / "rain.engine", device="cpu")
    assert torch.allclose(built.restore(image), restorer.restore(image, "rain"), atol=1e-5)


def test_files_say_it_and_impossible_ones_are_refused(tmp_path):
    make_prompt(supersample=2).save(tmp_path / "two.safetensors")
    assert load_prompt(tmp_path / "two.safetensors").supersample == 2
    make_prompt().save(tmp_path / "one.safetensors")
    assert load_prompt(tmp_path / "one.safetensors").supersample == 1
    for wrong in (0, FINEST + 1):
        make_prompt(supersample=wrong).save(tmp_path / "wrong.safetensors")
        with pytest.raises(PromptError, match="impossible settings"):
            load_prompt(tmp_path / "wrong.safetensors")
    with pytest.raises(EbrError, match="supersample must be from 1 to 2"):
        RestoreRequest(supersample=3)


def test_a_prompt_of_the_user_goes_before_the_bundled_fine_one(restorer):
    (rain, _), *_ = find_prompts("mini", "rain")
    assert [file.parent.name for file, _ in with_fine([(rain, 1.0)])] == ["mini", "fine"]
    fine_file(rain).unlink()
    assert with_fine([(rain, 1.0)]) == [(rain, 1.0)]
    assert restorer.plan("rain").fine is None


def test_a_picture_that_is_not_enlarged_is_the_same_tensor():
    clip = picture().unsqueeze(2)
    assert enlarged(clip, 1) is clip
    assert enlarged(clip, 2).shape == (1, 3, 1, 48, 80)
    assert (resized(enlarged(clip, 2), 24, 40) - clip).abs().max() < 0.15


def test_where_too_little_memory_is_allowed_a_picture_is_seen_at_its_own_pixels(restorer, ran):
    image = picture(24, 40)
    fine, plain = (
        min(peak(restorer.engine.costs, way, work) for way in ways)
        for ways, work in (restorer.engine.fallbacks((1, 3, 1, *size), None, None, "latent") for size in ((48, 80), (24, 40)))
    )
    assert plain < fine
    restorer.engine.fitting.limit = fine
    restorer.restore(image, "rain")
    restorer.engine.fitting.limit = fine - 1
    restorer.restore(image, "rain")
    assert restorer.restore_batch([image], "rain")[0].shape == image.shape
    assert [sides[:2] for sides in ran] == [(48, 80), (24, 40), (24, 40)]
    with pytest.raises(EngineError, match="at least"):
        restorer.restore(image, "rain", supersample=2)


def test_a_prompt_is_not_run_at_another_fineness_than_its_own(restorer):
    fine = load_prompt(installed_file("mini", "fine/rain"))
    with pytest.raises(EngineError, match="learned for supersample 2, not for 1"):
        restorer.restore(picture(), prompt=fine, supersample=1)
    with pytest.raises(EngineError, match="learned for supersample 1, not for 2"):
        restorer.restore(picture(), prompt=make_prompt(), supersample=2)
    assert torch.equal(restorer.restore(picture(), prompt=fine, supersample=2), restorer.restore(picture(), prompt=fine))


@pytest.fixture
def hazy(restorer):
    """The side of the small version that shows a whole picture; haze has a fine prompt too, with its input's detail."""
    for name, how in (("haze", {}), ("fine/haze", {"supersample": 2, "t0": 0.3})):
        make_prompt(9, detail="input", **how).save(installed_file("mini", name))
    return restorer.backbone.spec.small_side


def test_where_the_detail_is_the_inputs_a_smaller_version_is_seen_finer(restorer, ran, hazy):
    for height, width in ((24, 40), (hazy // 4, hazy // 2), (hazy, hazy // 2)):
        ran.clear()
        assert restorer.restore(picture(height, width), "haze").shape[-2:] == (height, width)
        scale = min(1, hazy / 2 / max(height, width))
        seen = (2 * height * scale, 2 * width * scale)
        assert ran == [(*seen, 0.3)]
        cells = tuple(side / restorer.codec.spatial for side in seen)
        assert restorer.engine.evaluations(height, width, restorer.plan("haze").fine, None, None, "latent", "auto") == {cells: 5}


def test_a_picture_that_such_a_version_would_reduce_is_not_unless_it_is_asked_for(restorer, ran, hazy):
    image = picture(hazy // 2, hazy + 16)
    restorer.restore(image, "haze")
    restorer.restore(image, "haze", supersample=2)
    (*plain, t0), (*fine, fine_t0) = ran
    assert (t0, fine_t0) == (0.2, 0.3)
    assert max(plain) == max(fine) == hazy


def test_what_is_seen_counts_against_the_memory_not_all_pixels(restorer, ran, hazy):
    ways, work = restorer.engine.fallbacks((1, 3, 1, hazy, hazy // 2), 0, None, "latent")
    restorer.engine.fitting.limit = peak(restorer.engine.costs, ways[0], work)
    restorer.restore(picture(hazy, hazy // 2), "haze")
    assert ran == [(hazy, hazy // 2, 0.3)]
