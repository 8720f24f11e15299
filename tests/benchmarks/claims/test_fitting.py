"""What the experiments learn by themselves: the loss falls, nothing else moves, words and mixtures are what they are called."""

from dataclasses import replace

import pytest
import torch

from benchmarks.claims import a_space, f_mixtures
from benchmarks.claims.common import TINY, Learning, save_random
from benchmarks.claims.fitting import fit
from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.bridge.process import training_state
from ebr_engine.evaluation.photos import load_photo
from ebr_engine.media.degradations import degrade
from ebr_engine.training.scenes import ScenePool

LEARNING = Learning(iterations=30, batch=4, size=32, scenes=2)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return load_mini(save_random(tmp_path_factory.mktemp("mini") / "tiny.safetensors", TINY, gain=10))


@pytest.fixture(scope="module")
def pool():
    with ScenePool(2) as pool:
        yield pool


def test_only_what_is_given_moves_and_the_error_falls(mini, pool):
    rows = mini.context.clone().requires_grad_()
    velocity = a_space.velocity_of(mini, lambda: rows)

    def error():
        generator = torch.Generator().manual_seed(5)
        clean, depth, _ = pool.crops(8, 32, generator)
        degraded = degrade(clean, "lowlight", generator, depth=depth)
        clean, degraded = (mini.codec.encode(x.unsqueeze(2)) for x in (clean, degraded))
        t = torch.linspace(0.05, 0.2, 8)
        state, target = training_state(clean, degraded, torch.randn(clean.shape, generator=generator), t, 0.2)
        with torch.no_grad():
            return ((velocity(state, t) - target) * t.view(-1, 1, 1, 1, 1)).square().mean().item()

    before, weights = error(), {name: value.clone() for name, value in mini.trunk.state_dict().items()}
    fit([rows], velocity, mini.codec, pool, a_space.degrading("lowlight"), LEARNING, 0)
    assert error() < 0.99 * before
    assert (rows != mini.context).any(1).all()
    assert all(torch.equal(value, weights[name]) for name, value in mini.trunk.state_dict().items())


def test_fitting_is_the_same_for_a_seed(mini, pool):
    def fitted(seed):
        rows = mini.context.clone().requires_grad_()
        how = a_space.degrading("haze")
        fit([rows], a_space.velocity_of(mini, lambda: rows), mini.codec, pool, how, replace(LEARNING, iterations=2), seed)
        return rows.detach()

    assert torch.equal(fitted(1), fitted(1))
    assert not torch.equal(fitted(1), fitted(2))


def test_given_embeddings_pass_through_the_frozen_encoder(mini):
    encoder = mini.text_encoder
    words = tuple(encoder.vocabulary[:15])  # with the end token all of the 16 rows
    ids = encoder.tokenize([words])
    rows = encoder.embedding(ids)[0].detach().requires_grad_()
    context = a_space.encoded(encoder, rows)
    torch.testing.assert_close(context, encoder(ids)[0])
    context.sum().backward()
    assert rows.grad.abs().sum(1).min() > 0
    assert torch.equal(encoder(ids)[0], context)  # and the encoder still reads words


def test_a_context_in_place_of_the_empty_text_is_what_the_conditioner_makes_of_it(mini):
    context, t = torch.randn(16, TINY.text_dim), torch.tensor([0.1, 0.2])
    state = torch.randn(2, 48, 1, 8, 8)
    with torch.no_grad():
        expected = mini.trunk(state, mini.conditioner(t * 1000, context).batch())
        torch.testing.assert_close(a_space.velocity_of(mini, lambda: context)(state, t), expected, atol=1e-5, rtol=1e-5)
        empty = mini.trunk(state, mini.conditioner(t * 1000, mini.context).batch())
        found = a_space.velocity_of(mini, lambda: mini.context)(state, t)
    torch.testing.assert_close(found, empty, atol=1e-5, rtol=1e-5)  # merged rows or not
    assert (expected - empty).abs().max() > 1e-3


def test_captions_are_of_the_vocabulary(mini):
    found = a_space.candidates(mini.text_encoder, "rain")
    assert () in found
    assert ("rain",) in found
    assert ("heavy", "rain") in found
    assert mini.text_encoder.tokenize(found).shape == (len(found), 16)


def test_a_mixture_is_one_degradation_after_the_other():
    clean, depth = load_photo("motorcycle", 64)

    def generator():
        return torch.Generator().manual_seed(3)

    both = f_mixtures.mixture(("haze", "rain"), 0.5)(clean, generator(), depth)
    drawn = generator()
    hazy = degrade(clean, "haze", drawn, depth=depth, strength=0.5)
    assert torch.equal(both, degrade(hazy, "rain", drawn, strength=0.5))
    assert not torch.equal(both, f_mixtures.mixture(("rain", "haze"), 0.5)(clean, generator(), depth))


def test_the_unseen_degradation_is_noise_and_levels():
    clean, _ = load_photo("coffee", 64)
    bad = f_mixtures.unseen(clean, torch.Generator().manual_seed(0), None)
    assert len(bad.unique()) <= f_mixtures.LEVELS + 1
    assert 0.06 < (bad - clean).std() < 0.1
