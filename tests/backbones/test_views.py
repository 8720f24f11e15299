"""What happens around `mini`'s transformer: the grid moves and nothing else does, and detail keeps its mean."""

from types import SimpleNamespace

import pytest
import torch

from ebr_engine.backbones.mini.codec import PixelCodec
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.views import View, levelled, moved, moved_back, room_of, seen, spun, views

OFFSETS = [(0, 0), (4, 4), (4, 0), (2, 6), (8, 8)]


def codecs():
    return [kind(torch.randn(kind.channels), torch.rand(kind.channels) + 0.1) for kind in (PixelCodec, LappedCodec)]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("codec", codecs(), ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("size", [(8, 8), (24, 16)])
def test_a_moved_grid_is_one_token_larger_and_comes_back(codec, offset, size):
    latent = codec.encode(torch.rand(2, 3, 1, *size))
    there = moved(latent, codec, offset)
    cells = codec.span // codec.spatial
    assert there.shape[-2:] == tuple(side + cells for side in latent.shape[-2:])
    torch.testing.assert_close(moved_back(there, codec, offset), latent, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("codec", codecs(), ids=lambda codec: type(codec).__name__)
def test_what_lies_beyond_the_picture_is_its_reflection(codec):
    pixels = torch.rand(1, 3, 1, 16, 16)
    wider = codec.decode(moved(codec.encode(pixels), codec, (3, 5)))
    torch.testing.assert_close(wider[..., 3:19, 5:21], pixels, atol=1e-4, rtol=0)
    torch.testing.assert_close(wider[..., :3, 5:21], pixels[..., :3, :].flip(-2), atol=1e-4, rtol=0)
    torch.testing.assert_close(wider[..., 3:19, 21:], pixels[..., -3:].flip(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("time", [0.2, torch.tensor([0.1, 0.3])])
def test_a_clean_estimate_takes_the_degraded_picture_s_mean_detail_and_keeps_its_tones(time):
    codec = LappedCodec()
    state, velocity, degraded = (torch.randn(2, 192, 1, 3, 4) for _ in range(3))
    t = time.view(-1, 1, 1, 1, 1) if isinstance(time, torch.Tensor) else time
    before, after = (state - t * v for v in (velocity, levelled(velocity, state, degraded, time, codec.tones)))
    means = [x.mean((2, 3, 4)) for x in (before, after, degraded)]
    torch.testing.assert_close(means[1][:, ~codec.tones], means[2][:, ~codec.tones], atol=1e-5, rtol=0)
    torch.testing.assert_close(after[:, codec.tones], before[:, codec.tones])
    # Only a constant was added: what differs from place to place stays.
    torch.testing.assert_close(after - after.mean((2, 3, 4), keepdim=True), before - before.mean((2, 3, 4), keepdim=True))


def test_the_transformer_sees_the_moved_grid_and_the_sampler_does_not():
    codec = LappedCodec()
    codec.levels = False
    latent = codec.encode(torch.rand(1, 3, 1, 24, 24))
    shapes = []

    def half(state, step):
        shapes.append(tuple(state.shape[-2:]))
        return state * step

    for offset in (*OFFSETS, None):
        torch.testing.assert_close(spun(half, codec, latent)(latent, (0.5, View(0.1, offset))), latent * 0.5, atol=1e-5, rtol=0)
    assert shapes == [(4, 4)] * len(OFFSETS) + [(3, 3)]


def test_a_bias_that_every_token_has_is_taken_out():
    codec = LappedCodec()
    degraded = codec.encode(torch.rand(1, 3, 1, 64, 64))
    texture = torch.randn(1, 192, 1, 1, 1) * ~codec.tones.view(1, -1, 1, 1, 1)
    velocity = spun(lambda state, bias: state * 0.1 + bias, codec, degraded)
    plain, biased = (velocity(degraded, (bias, View(0.2, (4, 4)))) for bias in (0, texture))
    torch.testing.assert_close(biased, plain, atol=1e-4, rtol=0)


def test_gradients_pass_through():
    codec = LappedCodec()
    degraded, weight = codec.encode(torch.rand(1, 3, 1, 16, 16)), torch.ones(192, requires_grad=True)
    velocity = spun(lambda state, step: state * step.view(1, -1, 1, 1, 1), codec, degraded)
    velocity(degraded, (weight, View(torch.tensor([0.2]), (4, 2)))).square().sum().backward()
    assert (weight.grad != 0).all()


def test_steps_have_other_grids_the_last_ones_always_the_same():
    mini = SimpleNamespace(spec=SimpleNamespace(moves=True), codec=LappedCodec(), fixed=None)
    five, three = views(mini, (0.2, 0.16, 0.1, 0.05, 0.02)), views(mini, (0.2, 0.1, 0.02))
    assert [view.time for view in five] == [0.2, 0.16, 0.1, 0.05, 0.02]
    assert len({view.offset for view in five}) == 5
    assert room_of(mini.codec, five) == 1
    assert [view.offset for view in three] == [view.offset for view in five[2:]]
    assert views(SimpleNamespace(spec=SimpleNamespace(moves=False)), (0.2, 0.1)) == ()


def test_a_graph_of_one_size_keeps_its_grid():
    mini = SimpleNamespace(spec=SimpleNamespace(moves=True), codec=LappedCodec(), fixed=(1, 64, 64))
    assert {view.offset for view in views(mini, (0.2, 0.1, 0.05))} == {None}


def test_steps_without_views_stay_as_they_are():
    assert seen("ab", ()) == "ab"
    assert seen("ab", (View(0.2, None), View(0.1, None))) == [("a", View(0.2, None)), ("b", View(0.1, None))]
