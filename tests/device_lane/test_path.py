"""The whole way of a picture over the pretended device: what must be there is there, and the host waits once, at the end."""

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.engine.offload import inner
from tests.device_lane.pretended import Pretended
from tests.tiny import picture

CLOSE = {"fp32": 1e-5, "bf16": 0.01, "fp8": 0.03}


@pytest.fixture(scope="module")
def expected(wide, wide_prompt):
    """The picture restored on the CPU."""
    return Restorer(model=wide, device="cpu", precision="fp32", compile="off").restore(picture(), prompt=wide_prompt)


@pytest.mark.parametrize("offload", ["none", "codec", "blocks"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_picture_is_restored_on_the_device_and_read_once(precision, offload, device, wide, wide_prompt, expected):
    restorer = Restorer(model=wide, device="cuda", precision=precision, offload=offload)
    codec_there = isinstance(getattr(restorer.codec, "codec", restorer.codec).mean, Pretended)
    blocks_there = {isinstance(weight, Pretended) for weight in restorer.trunk.blocks.parameters()}
    assert (codec_there, blocks_there) == (True, {offload != "blocks"})  # mini's codec works in every step
    assert not any(isinstance(weight, Pretended) for weight in restorer.backbone.conditioner.parameters())
    device.reads.clear()
    result = restorer.restore(picture(), prompt=wide_prompt)
    assert type(result) is torch.Tensor
    assert (result - expected).abs().max() < CLOSE[precision]
    assert device.reads == ["__bool__", "to"]  # whether the result is finite, and the result
    assert device.recorded == (offload != "blocks")
    assert bool(device.products) == (precision == "fp8")


def test_pictures_of_one_size_share_a_recording(device, wide, wide_prompt):
    restorer = Restorer(model=wide, device="cuda", precision="bf16")
    results = [restorer.restore(picture(seed=seed), prompt=wide_prompt) for seed in (1, 2, 1)]
    assert device.recorded == 1
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("blend", ["latent", "pixel"])
def test_a_picture_of_tiles(blend, device, wide, wide_prompt):
    how = {"tile": 32, "tile_overlap": 8, "tile_blend": blend, "prompt": wide_prompt}
    image = picture(56, 80)  # of whole tiles: those of graphs have one size, others are cut evenly
    result = Restorer(model=wide, device="cuda", precision="fp32").restore(image, **how)
    plain = Restorer(model=wide, device="cuda", precision="fp32", compile="off").restore(image, **how)
    assert (result - plain).abs().max() < 1e-5
    assert device.recorded


def test_a_clip_in_chunks(device, wide, wide_prompt):
    clip = picture(16, 24, batch=6).transpose(0, 1)[None]  # [1, 3, 6, H, W]; four frames run together
    (result,) = Restorer(model=wide, device="cuda", precision="bf16").restore_batch([clip], prompt=wide_prompt)
    assert result.shape == clip.shape
    assert result.isfinite().all()


def test_prompts_that_are_mixed_and_several_pictures(device, wide, wide_prompt):
    restorer = Restorer(model=wide, device="cuda", precision="fp8")
    for mix in ("residual", "velocity", "turn"):
        result = restorer.restore(picture(batch=2), prompt=[wide_prompt, (wide_prompt, 0.5)], mix=mix, steps=3)
        assert result.shape == (2, 3, 24, 40)


def test_sides_that_are_no_multiple_of_anything(device, wide, wide_prompt):
    result = Restorer(model=wide, device="cuda", precision="fp8").restore(picture(19, 37), prompt=wide_prompt)
    assert result.shape == (1, 3, 19, 37)


def test_widths_that_fp8_products_do_not_take_go_without_the_library(device, weights, prompt):
    result = Restorer(model=weights, device="cuda", precision="fp8").restore(picture(), prompt=prompt)
    assert result.isfinite().all()
    assert device.products == 0


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("backbone", ["wan", "flux", "flux2"])
def test_a_model_in_the_published_layout(backbone, precision, published, device, tmp_path, monkeypatch):
    """The folder of a transformer, VAE and text encoders; a clip or a picture, and a released prompt."""
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    folder = published(backbone)
    restorer = Restorer(backbone, model=folder, device="cuda", precision=precision)
    clip = picture(24, 40, batch=5 if backbone == "wan" else 1).transpose(0, 1)[None]
    (result,) = restorer.restore_batch([clip], prompt=folder / "rain.pt", steps=2)
    assert result.shape == clip.shape
    assert result.isfinite().all()
    assert device.recorded == 1


@pytest.mark.parametrize("backbone", ["wan", "flux", "flux2"])
def test_a_codec_that_waits_changes_nothing_and_goes_back(backbone, published, device, tmp_path, monkeypatch):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    folder, results, reads = published(backbone), [], []
    for offload in ("none", "codec"):
        restorer = Restorer(backbone, model=folder, device="cuda", precision="fp32", offload=offload)
        there = [isinstance(weight, Pretended) for weight in inner(restorer.codec).vae.parameters()]
        assert set(there) == {offload == "none"}
        clip = picture(24, 40, batch=5 if backbone == "wan" else 1).transpose(0, 1)[None]
        device.reads.clear()
        results += restorer.restore_batch([clip], prompt=folder / "rain.pt", steps=2)
        reads.append([*device.reads])
    assert device.recorded == 2
    assert torch.equal(*results)
    assert reads[0] == reads[1]  # its weights are not read back
    assert not any(isinstance(weight, Pretended) for weight in inner(restorer.codec).vae.parameters())


def test_attention_in_eight_bits(device, wide, wide_prompt, expected):
    restorer = Restorer(model=wide, device="cuda", precision="fp32", fp8_attention=True)
    device.reads.clear()
    result = restorer.restore(picture(), prompt=wide_prompt)
    assert 0 < (result - expected).abs().max() < 0.02
    assert device.reads == ["__bool__", "to"]
    assert device.recorded
