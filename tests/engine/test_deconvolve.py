"""Where the blur that a picture shows is taken out of it before it is restored, and where it is not."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine import Restorer
from ebr_engine.engine import memory
from ebr_engine.engine import run as running
from ebr_engine.engine.memory import size_of
from ebr_engine.errors import EbrError, EngineError, PromptError
from ebr_engine.evaluation.metrics import psnr
from ebr_engine.evaluation.photos import load_photo
from ebr_engine.prompts.catalogue import installed_file
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.request import RestoreRequest
from tests.tiny import make_prompt, picture, save_tiny


def sharper(frames):
    """Stands in for a deconvolution: what it has seen is told by what comes out."""
    return (frames * 0.5 + 0.25 * frames.mean()).clamp(0, 1)


@pytest.fixture
def restorer(tmp_path, monkeypatch):
    """A tiny backbone whose prompt for blur wants pictures deconvolved, and whose prompt for haze does not."""
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    make_prompt(0, deconvolve=True).save(installed_file("mini", "blur"))
    make_prompt(1).save(installed_file("mini", "haze"))
    monkeypatch.setattr(running, "deconvolved", sharper)
    return Restorer(model=save_tiny(tmp_path / "tiny.safetensors"), device="cpu", precision="fp32", compile="off")


def test_the_prompt_says_whether_and_the_request_may_say_otherwise(restorer):
    image = picture(24, 40)
    plain = {task: restorer.restore(image, task, deconvolve="off") for task in ("blur", "haze")}
    before = sharper(image)
    for task, how, seen in (
        ("blur", {}, before),
        ("blur", {"deconvolve": "on"}, before),
        ("haze", {}, image),
        ("haze", {"deconvolve": "on"}, before),
    ):
        expected = restorer.restore(seen, task, deconvolve="off")
        assert torch.equal(restorer.restore(image, task, **how), expected)
        assert torch.equal(expected, plain[task]) == (seen is image)


def test_it_is_done_once_and_before_everything_else(restorer, monkeypatch):
    sizes = []
    monkeypatch.setattr(running, "deconvolved", lambda frames: sizes.append(tuple(frames.shape)) or sharper(frames))
    restorer.restore(picture(150, 230), "blur", detail="input", tile=64, tile_overlap=16)
    assert sizes == [(1, 3, 150, 230)]
    sizes.clear()
    clip = picture(24, 40).unsqueeze(2).expand(-1, -1, 3, -1, -1).clone()
    restorer.run(clip, restorer.plan("blur"), temporal_window=1)
    assert sizes == [(3, 3, 24, 40)]
    sizes.clear()
    restorer.restore(picture(24, 40), "haze+blur", mix="turn")  # before its own run, not before the first
    assert sizes == [(1, 3, 24, 40)]


def test_many_pictures_are_as_one_by_one(restorer):
    images = [picture(24, 40), picture(24, 40, seed=5), picture(21, 38)]
    together = restorer.restore_batch(images, "blur")
    for image, found in zip(images, together):
        assert torch.allclose(found, restorer.restore(image, "blur"), atol=1e-6)


def test_noise_of_calm_places_stays_what_it_was(restorer):
    image = picture(40, 64)
    image[..., :36] = 0.5 + 0.002 * torch.randn(image[..., :36].shape)

    def noise(result):
        return result[..., 4:-4, 4:28].unfold(-1, 7, 1).unfold(-2, 7, 1).std(dim=(-2, -1)).median()

    loud, calm = (restorer.restore(image, "blur", deconvolve=how) for how in ("off", "on"))
    assert noise(loud) > 2 * noise(image)
    assert noise(calm) < 0.5 * noise(loud)
    assert (calm - loud)[..., 46:].std() > 0.001  # what is lively is restored
    (together,) = restorer.restore_batch([image], "blur")
    assert torch.allclose(together, calm, atol=1e-6)


def test_mixed_prompts_deconvolve_only_together(restorer):
    blur, other = make_prompt(0, deconvolve=True), make_prompt(2, deconvolve=True)
    assert restorer.plan(prompt=[blur, other], mix="residual").deconvolve
    assert not restorer.plan(prompt=[blur, make_prompt(1)], mix="residual").deconvolve
    assert not restorer.plan(t0=0.3).deconvolve


def test_prompt_and_engine_files_keep_it(restorer, tmp_path):
    file = installed_file("mini", "blur")
    assert load_prompt(file).deconvolve
    assert not load_prompt(installed_file("mini", "haze")).deconvolve
    image = picture(24, 40)
    restorer.build(tmp_path / "blur.engine", restorer.plan("blur"))
    built = Restorer.from_engine(tmp_path / "blur.engine", device="cpu", compile="off")
    assert torch.allclose(built.restore(image), restorer.restore(image, "blur"), atol=1e-6)
    damaged = file.read_bytes().replace(b'"deconvolve":"true"', b'"deconvolve":"trux"')
    file.write_bytes(damaged)
    with pytest.raises(PromptError, match="impossible settings: deconvolve 'trux'"):
        load_prompt(file)


def test_a_wrong_value_is_refused():
    with pytest.raises(EbrError, match="deconvolve"):
        RestoreRequest(deconvolve="yes")


def test_a_limit_that_leaves_no_room_for_it_is_refused(restorer, monkeypatch):
    image = picture(64, 96)
    monkeypatch.setattr(restorer.engine.fitting, "limit", size_of("1G"))
    restorer.restore(image, "blur")
    monkeypatch.setattr(memory, "FILTERED", 2**30)
    with pytest.raises(EngineError, match=r"taking the blur out of a picture of 96 x 64 pixels needs .* --deconvolve off"):
        restorer.restore(image, "blur")
    restorer.restore(image, "blur", deconvolve="off")
    restorer.restore(image, "haze")


def test_a_blurred_clip_gets_sharper_by_the_bundled_prompt():
    clean = torch.cat([load_photo("coffee", 224)[0][..., 2 * i : 2 * i + 160, i : i + 160] for i in range(3)])
    seen = torch.stack([disc_blurred(frame) for frame in clean]).transpose(0, 1)  # a clip [3, F, H, W]
    restorer = Restorer("mini", device="cpu", precision="fp32", compile="off")
    (restored,) = restorer.run(seen[None].contiguous(), restorer.plan("blur"))
    for before, after, frame in zip(seen.transpose(0, 1), restored.transpose(0, 1), clean):
        assert psnr(after[None], frame[None]) > psnr(before[None], frame[None]) + 1.5


def disc_blurred(frame, radius=3):
    """A frame [3, H, W] out of focus, with some noise."""
    y, x = torch.meshgrid(*(torch.arange(-radius, radius + 1),) * 2, indexing="ij")
    disc = ((x**2 + y**2) <= (radius + 0.3) ** 2).float()
    padded = F.pad(frame[:, None], (radius,) * 4, mode="reflect")
    blurred = F.conv2d(padded, (disc / disc.sum())[None, None])[:, 0]
    return (blurred + 0.002 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
