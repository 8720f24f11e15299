"""What the experiments learn by themselves: the loss falls, nothing else moves, words and mixtures are what they are called."""

from dataclasses import replace

import pytest
import torch

from benchmarks.claims import a_space, f_mixtures
from benchmarks.claims.common import TINY, Learning, Study, save_random
from benchmarks.claims.learning import config_of, fitted, frozen, kept_pool
from benchmarks.claims.walking import along, restored_by
from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.evaluation.photos import load_photo, make_case
from ebr_engine.media.degradations import degrade
from ebr_engine.training.data import SceneSamples
from ebr_engine.training.latents import LatentSamples

LEARNING = Learning(iterations=30, batch=4, size=32, scenes=2)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    model = save_random(folder / "tiny.safetensors", TINY, gain=10)
    return Study("t", model, folder, folder, ("lowlight",), ("chelsea",), (0,), 32, 2, LEARNING, quick=True)


@pytest.fixture(scope="module")
def mini(study):
    return load_mini(study.model)


def learned(study, mini, iterations, seed=0):
    config = config_of(study, "lowlight", seed, iterations=iterations)
    return fitted(study, config, a_space.speaking(mini.context, lambda rows: rows))


def test_only_the_context_moves_and_the_error_falls(study, mini):
    weights = {name: value.clone() for name, value in frozen(study.model, "fp32").trunk.state_dict().items()}
    first, last = learned(study, mini, 1), learned(study, mini, 30)
    config = replace(first.config, seed=5)  # other crops
    with torch.no_grad(), LatentSamples(config, SceneSamples(config, kept_pool(2, study.work)), first.backbone) as latents:
        numbers = range(8)
        degraded, clean = latents.batch(numbers)
        losses = [float(learner.state_loss(numbers, degraded, clean)) for learner in (first, last)]
    assert losses[1] < 0.99 * losses[0]
    assert (last.residual != mini.context).any(1).all()
    assert all(torch.equal(value, weights[name]) for name, value in last.backbone.trunk.state_dict().items())


def test_learning_is_the_same_for_a_seed(study, mini):
    assert torch.equal(learned(study, mini, 2, 1).residual, learned(study, mini, 2, 1).residual)
    assert not torch.equal(learned(study, mini, 2, 1).residual, learned(study, mini, 2, 2).residual)


def test_walking_by_the_engines_steps_is_the_engines_own_restoration(study):
    case, table, backbone = make_case("coffee", "haze", 40), study.ebr_table(0.2), study.restorer.backbone
    steps = backbone.bake(torch.tensor(table.times[:-1]) * 1000, [])
    walked = restored_by(study, case.degraded, steps, table.times[:-1], along(table, backbone.noise))
    torch.testing.assert_close(walked, study.restore(case, None, table), atol=1e-5, rtol=0)


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


def test_a_context_in_place_of_the_empty_text_is_what_the_conditioner_makes_of_it(study, mini):
    backbone, context, t = frozen(study.model, "fp32"), torch.randn(16, TINY.text_dim), torch.tensor([0.1, 0.2])
    state = torch.randn(2, 48, 1, 8, 8)
    with torch.no_grad():
        expected = mini.trunk(state, mini.conditioner(t * 1000, context).batch())
        found = backbone.velocity(state, a_space.step_for(backbone, t * 1000, context))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        empty = mini.trunk(state, mini.conditioner(t * 1000, mini.context).batch())
        found = backbone.velocity(state, a_space.step_for(backbone, t * 1000, mini.context))
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
