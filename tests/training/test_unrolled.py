"""Learning through all steps of the sampler, from the error of its result, as it will be written."""

from dataclasses import replace

import pytest
import torch

from ebr_engine.bridge.sampler import make_table, sample
from ebr_engine.engine.plan import bake
from ebr_engine.errors import EbrError
from ebr_engine.evaluation.metrics import ssim
from ebr_engine.media.detail import detail_of_input
from ebr_engine.media.sizes import enlarged, resized
from tests.training.learners import batches, start


def test_unrolled_it_learns_from_what_restoring_gives(weights, pool):
    learner = start(weights, unroll=3, batch=4, iterations=1000)
    degraded, clean = batches(learner, pool)(range(4))
    loss = learner.result_loss(range(4), degraded, clean)
    assert torch.allclose(loss, learner.measured(result_of(learner, degraded) - clean, None), rtol=1e-4)
    assert learner.prompt().steps == 3


def test_unrolled_gradients_go_through_every_step(weights, pool):
    learner = start(weights, unroll=2, batch=2)
    degraded, clean = batches(learner, pool)(range(2))
    whole = torch.autograd.grad(learner.result_loss(range(2), degraded, clean), learner.alpha)[0]
    step = 1e-2 * torch.nn.functional.normalize(whole, dim=0)

    def at(factor):
        moved = replace(learner, alpha=learner.alpha + factor * step)
        return moved.result_loss(range(2), degraded, clean).double()

    with torch.no_grad():
        slope = (at(1) - at(-1)) / 2
    assert torch.isclose(slope, (whole.double() * step.double()).sum(), rtol=0.02)


def test_where_the_detail_is_the_inputs_the_error_is_that_of_the_picture_as_it_is_written(weights, pool):
    learner = start(weights, unroll=2, batch=2, detail="input")
    degraded, clean = batches(learner, pool)(range(2))
    latents = degraded, clean, result_of(learner, degraded)
    pixels, wanted, restored = (learner.backbone.codec.decode(latent) for latent in latents)
    written = detail_of_input(pixels, pixels, restored)
    loss = learner.result_loss(range(2), degraded, clean)
    assert torch.allclose(loss, (written - wanted).square().mean(), rtol=1e-2)
    assert loss < 0.9 * replace(learner, config=replace(learner.config, detail="model")).result_loss(range(2), degraded, clean)
    assert torch.autograd.grad(loss, learner.alpha)[0].abs().min() > 0


def test_a_prompt_that_sees_pictures_finer_is_learned_on_larger_ones_and_says_so(weights, pool):
    fine, plain = (start(weights, unroll=2, batch=2, supersample=times) for times in (2, 1))
    wanted = [enlarged(plain.backbone.codec.decode(latent), 2) for latent in batches(plain, pool)(range(2))]
    given = [fine.backbone.codec.decode(latent) for latent in batches(fine, pool)(range(2))]
    for one, other in zip(given, wanted):
        assert torch.allclose(one, other, atol=1e-4)
    assert (fine.prompt().supersample, plain.prompt().supersample) == (2, 1)
    assert fine.prompt().training["supersample"] == 2
    with pytest.raises(EbrError, match="supersample must lie between 1 and 4"):
        start(weights, supersample=5)


@pytest.mark.parametrize("detail", ["model", "input"])
@pytest.mark.parametrize("times", [2, 3])
def test_seen_finer_the_error_is_that_of_the_picture_at_its_own_size(weights, pool, detail, times):
    learner = start(weights, unroll=2, batch=2, supersample=times, detail=detail)
    degraded, clean = batches(learner, pool)(range(2))
    latents = degraded, clean, result_of(learner, degraded)
    side = clean.shape[-1] * learner.backbone.codec.spatial // times
    pixels, wanted, restored = (resized(learner.backbone.codec.decode(latent), side, side) for latent in latents)
    written = detail_of_input(pixels, pixels, restored) if detail == "input" else restored
    loss = learner.result_loss(range(2), degraded, clean)
    assert torch.allclose(loss, (written - wanted).square().mean(), rtol=0.05)
    assert torch.autograd.grad(loss, learner.alpha)[0].abs().min() > 0


def test_dissimilarity_counts_beside_the_error(weights, pool):
    learner = start(weights, unroll=2, batch=2)
    degraded, clean = batches(learner, pool)(range(2))
    plain, mixed = (
        replace(learner, config=replace(learner.config, ssim_weight=w)).result_loss(range(2), degraded, clean) for w in (0, 3)
    )
    pairs = zip(*(learner.backbone.codec.decode(latent).transpose(1, 2) for latent in (result_of(learner, degraded), clean)))
    similar = [ssim(result, target) for result, target in pairs]
    assert (mixed - plain).item() == pytest.approx(3 * (1 - sum(similar) / 2), rel=1e-3)


@torch.no_grad()
def result_of(learner, degraded):
    """The latent that a run of the learner's steps gives with the prompt as it stands."""
    plan = bake(learner.backbone, [(learner.prompt(), 1.0)], make_table("fast", learner.config.t0, learner.config.unroll))
    velocity = plan.seen(learner.backbone.velocity, learner.backbone.codec, degraded)
    return sample(velocity, plan.conditioning, degraded, learner.noise(range(len(degraded)), degraded), plan.table)
