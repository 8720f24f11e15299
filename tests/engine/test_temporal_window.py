"""Clips of a backbone that knows no time: frames agree with their neighbours after each was restored alone."""

import numpy as np
import pytest
import torch

pytest.importorskip("cv2")

from ebr_engine import Restorer
from ebr_engine.errors import EngineError, EngineWarning
from ebr_engine.evaluation.moving import make_clip, warping_error
from ebr_engine.media import motion
from ebr_engine.media.calm import kept_calm


@pytest.fixture(scope="module")
def restorer():
    return Restorer("mini", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def clip():
    return make_clip(0, "snow", 96, 5)


@pytest.fixture(scope="module")
def pixels(clip):
    return clip.degraded.transpose(0, 1)[None]


@pytest.fixture(scope="module")
def alone(restorer, pixels):
    return restorer.run(pixels, restorer.plan("snow"), temporal_window=0)


def test_by_default_frames_agree(restorer, pixels, alone, clip):
    restored = restorer.run(pixels, restorer.plan("snow"))
    expected = motion.agreed(alone[0].movedim(0, -1).contiguous().numpy(), restorer.backbone.spec.window)
    expected = kept_calm(clip.degraded, torch.from_numpy(expected).movedim(-1, 1))
    assert np.array_equal(restored[0].transpose(0, 1).numpy(), expected.numpy())
    frames = [x[0].transpose(0, 1) for x in (restored, alone)]
    assert torch.nn.functional.mse_loss(frames[0], clip.clean) < 0.8 * torch.nn.functional.mse_loss(frames[1], clip.clean)
    assert warping_error(frames[0], clip.clean) < 0.7 * warping_error(frames[1], clip.clean)


def test_pictures_are_not_touched(restorer, pixels):
    plan = restorer.plan("snow")
    picture = pixels[:, :, 0]
    assert torch.equal(restorer.run(picture, plan), restorer.run(picture, plan, temporal_window=0))


def test_clips_of_a_batch_stay_apart(restorer, pixels, alone):
    plan = restorer.plan("snow")
    both = restorer.run(torch.cat((pixels, pixels.flip(-1))), plan, temporal_window=1)
    assert torch.allclose(both[:1], restorer.run(pixels, plan, temporal_window=1), atol=1e-4)
    assert both.shape == (2, *pixels.shape[1:])


def test_chunks_are_long_enough_for_the_window(restorer):
    plan = restorer.plan("snow")
    length, overlap = restorer.chunk_size(None, None, (240, 320), plan)
    assert length > 2 * restorer.backbone.spec.window > overlap > 0
    assert restorer.chunk_size(None, None, (240, 320), plan, temporal_window=0) == restorer.backbone.spec.chunk
    assert restorer.chunk_size(5, 1, (240, 320), plan) == (5, 1)


def test_without_opencv_a_clip_is_restored_frame_by_frame_and_a_line_says_so(restorer, pixels, alone, monkeypatch):
    monkeypatch.setattr(motion, "available", lambda: False)
    with pytest.warns(EngineWarning, match=r"ebr-engine\[clips\]"):
        restored = restorer.run(pixels, restorer.plan("snow"))
    assert torch.equal(restored, alone)


def test_a_backbone_that_knows_time_refuses_it(restorer, monkeypatch):
    from dataclasses import replace

    backbone = restorer.engine.backbone
    monkeypatch.setattr(restorer.engine, "backbone", replace(backbone, spec=replace(backbone.spec, knows_time=True)))
    with pytest.raises(EngineError, match="temporal-window"):
        restorer.engine.window(2)
    assert restorer.engine.window(None) == 0


@pytest.mark.parametrize(("noise", "agree"), [(0.0, False), (0.05, True)])
def test_with_the_detail_of_the_input_frames_agree_where_it_is_noisy(restorer, noise, agree):
    clip = make_clip(0, "haze", 96, 3).degraded
    drawn = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    pixels = (clip + noise * drawn).clamp(0, 1).transpose(0, 1)[None]
    plan = restorer.plan("haze")
    by_default, alone, asked = (restorer.run(pixels, plan, temporal_window=n) for n in (None, 0, 3))
    assert torch.equal(by_default, asked if agree else alone)
    assert not torch.equal(asked, alone)
