"""A step of learning: only the prompt moves, the loss is the one that was asked for, and shares of a batch add up."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import load_backbone, spec
from ebr_engine.bridge.process import PROCESSES
from ebr_engine.bridge.sampler import make_table, sample
from ebr_engine.engine.plan import bake
from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import TASKS
from ebr_engine.training.data import SceneSamples
from ebr_engine.training.distributed import World
from ebr_engine.training.latents import LatentSamples
from ebr_engine.training.learner import blocks_of, check_fits, rate_factor, shareable
from tests.training.learners import CPU, QUICK, batches, start


def fixed_states(learner, pool):
    """16 states that are the same on every call."""
    return fixed_latents(learner, pool)[:3]


def fixed_latents(learner, pool):
    """The same, and the degraded latents that they belong to."""
    config = replace(learner.config, seed=99)
    numbers = list(range(16))
    degraded, clean = LatentSamples(config, SceneSamples(config, pool), learner.backbone).batch(numbers)
    t = torch.linspace(0.05, 1, 16) * config.t0
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    return *PROCESSES[config.bridge](clean, degraded, noise, t, config.t0), t, degraded


@torch.no_grad()
def fixed_loss(learner, pool):
    """The loss over fixed states and one place of the grid, as learning sees them."""
    still = replace(learner, config=replace(learner.config, on_policy=0, unroll=0), iteration=0)
    return still.loss(*fixed_latents(learner, pool)).item()


@pytest.fixture(scope="module")
def few(weights, pool):
    """Sixteen samples, made once: what is learned from them is told by their own loss."""
    learner = start(weights, task="lowlight")
    degraded, clean = batches(learner, pool)(range(16))
    return lambda numbers, following=(): tuple(latent[[i % 16 for i in numbers]] for latent in (degraded, clean))


@pytest.mark.parametrize(("bridge", "loss"), [("ebr", "x0"), ("ebr", "pixel"), ("naive", "x0"), ("ddbm", "pixel")])
def test_the_loss_falls_by_every_process(weights, pool, few, bridge, loss):
    learner = start(weights, task="lowlight", bridge=bridge, loss=loss, iterations=40, batch=8)
    before = fixed_loss(learner, pool)
    for _ in range(40):
        learner.step(few)
    # Random numbers can learn no more than to be less wrong.
    assert fixed_loss(learner, pool) < 0.97 * before


@pytest.mark.parametrize(
    "settings",
    [
        {"per_block": True},
        {"optimizer": "adamw", "weight_decay": 0.01, "clip": 0.1},
        {"on_policy": 3},
        {"unroll": 2},
        {"precision": "bf16"},
        {"precision": "fp8"},
        {"checkpointing": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_loss_falls_in_every_form(weights, pool, few, settings):
    learner = start(weights, task="lowlight", iterations=30, batch=8, **settings)
    before = fixed_loss(learner, pool)
    for _ in range(30):
        learner.step(few)
    assert fixed_loss(learner, pool) < (1 if learner.config.steps else 0.98) * before  # other states than those it learns at


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_finite_gradients(weights, pool, task):
    learner = start(weights, task=task, loss="velocity")
    progress = learner.step(batches(learner, pool))
    assert learner.iteration == 1
    assert progress.gradient > 0
    for parameter in learner.parameters:
        assert parameter.isfinite().all()
        assert learner.optimizer.state[parameter]["exp_avg"].abs().min() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_only_the_prompt_and_its_strength_change(weights, pool, precision):
    learner = start(weights, precision)
    backbone, fresh = learner.backbone, load_backbone("mini", ModelSource(weights), CPU, precision)
    before = [parameter.detach().clone() for parameter in learner.parameters]
    batch = batches(learner, pool)
    for _ in range(3):
        learner.step(batch)
    for part in ("trunk", "conditioner", "codec"):
        ours, theirs = getattr(backbone, part), getattr(fresh, part)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
        for parameter in ours.parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None
    assert torch.equal(backbone.text["context"], fresh.text["context"])
    for parameter, value in zip(learner.parameters, before):
        assert (parameter != value).all()
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == 2


@pytest.mark.parametrize("t", [0.25, 0.125, 2**-10])
def test_the_x0_loss_is_the_velocity_loss_times_t_squared(weights, pool, t):
    velocity, x0 = start(weights, loss="velocity"), start(weights, loss="x0")
    state, target, _ = fixed_states(velocity, pool)
    times = torch.full((16,), t)
    # t is a power of two, so that scaling by it rounds nothing.
    assert x0.loss(state, target, times).item() == t**2 * velocity.loss(state, target, times).item()


def test_the_x0_and_pixel_losses_are_errors_of_the_clean_estimate(weights, pool):
    x0, pixel = start(weights, loss="x0"), start(weights, loss="pixel")
    state, target, times = fixed_states(x0, pool)
    view = times.view(-1, 1, 1, 1, 1)
    clean = state - view * target
    with torch.no_grad():
        estimate = state - view * x0.backbone.velocity(state, x0.live(times * 1000, *x0.parameters))
        latents = (estimate - clean).square().mean().item()
        decoded = (x0.backbone.codec.decode(latent) for latent in (estimate, clean))
        pixels = torch.sub(*decoded).square().mean().item()
        assert x0.loss(state, target, times).item() == pytest.approx(latents, rel=1e-4)
        assert pixel.loss(state, target, times).item() == pytest.approx(pixels, rel=1e-4)
    assert abs(latents / pixels - 1) > 0.01  # so the two are told apart


def test_learning_sees_states_as_restoring_does(weights, pool):
    learner = start(weights, on_policy=3, batch=4)
    degraded, clean = batches(learner, pool)(range(4))
    state, target, t = learner.visited(degraded, clean, torch.randn(clean.shape))
    plan = bake(learner.backbone, [(learner.prompt(), 1.0)], make_table("fast", learner.config.t0, 3))
    step = plan.table.times.index(pytest.approx(t[0].item()))
    velocity = plan.seen(learner.backbone.velocity, learner.backbone.codec, degraded)(state, plan.conditioning[step])
    error = (velocity - target) * t.view(-1, 1, 1, 1, 1) * learner.backbone.codec.scale.view(1, -1, 1, 1, 1)
    with torch.no_grad():
        assert learner.loss(state, target, t, degraded).item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_off_policy_every_place_of_the_grid_is_learned(weights):
    learner = start(weights)
    t = torch.tensor([0.1, 0.3])
    seen = []
    for learner.iteration in range(40):
        view = learner.view(t)
        assert view.time is t
        seen.append(view.offset)
    assert set(seen) == set(learner.backbone.codec.offsets)


def test_tones_weigh_more_where_that_is_asked_for(weights, pool):
    plain, toned = start(weights), start(weights, tone=3.0)
    state, target, t = fixed_states(plain, pool)
    with torch.no_grad():
        whole, more = (learner.loss(state, target, t).item() for learner in (plain, toned))
        error = state - t.view(-1, 1, 1, 1, 1) * plain.backbone.velocity(state, plain.live(t * 1000, *plain.parameters))
        error = (error - state + t.view(-1, 1, 1, 1, 1) * target) * plain.backbone.codec.scale.view(1, -1, 1, 1, 1)
        tones = (error.square() * plain.backbone.codec.tones.view(1, -1, 1, 1, 1)).mean().item()
    assert more == pytest.approx(whole + 3 * tones, rel=1e-4)


def test_slight_damage_counts_more_where_that_is_asked_for(weights):
    plain, even = start(weights), start(weights, even=0.5)
    state, target = torch.randn(2, 192, 1, 2, 2), torch.randn(2, 192, 1, 2, 2)
    t = torch.tensor([0.1, 0.2])
    clean = state - t.view(-1, 1, 1, 1, 1) * target
    damage = torch.tensor([0.0, 4.0])
    degraded = clean + damage.sqrt().view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        alone = torch.stack([plain.loss(state[i : i + 1], target[i : i + 1], t[i : i + 1], degraded[i : i + 1]) for i in (0, 1)])
        weight = ((damage + 0.05) / (damage + 0.05).mean()) ** -0.5
        assert weight[0] > 8 * weight[1]
        torch.testing.assert_close(even.loss(state, target, t, degraded), (alone * weight).mean(), rtol=1e-4, atol=0)
        torch.testing.assert_close(plain.loss(state, target, t, degraded), alone.mean(), rtol=1e-4, atol=0)


def test_times_lie_between_t_min_and_t0_by_the_power(weights):
    latents = torch.zeros(64, 192, 1, 2, 2)
    even, early = (start(weights, power=power, t_min=0.1).states(range(64), latents, latents)[2] for power in (1, 0.25))
    for times in (even, early):
        assert 0.1 <= times.min() < times.max() <= 0.4
    assert torch.allclose((early - 0.1) / 0.3, ((even - 0.1) / 0.3) ** 0.25)


def test_learning_goes_on_from_a_prompt(weights, pool, few, tmp_path):
    first = start(weights, seed=5, alpha=0.3)
    for _ in range(3):
        first.step(few)
    first.prompt().save(tmp_path / "first.safetensors")
    second = start(weights, start=str(tmp_path / "first.safetensors"))
    assert torch.equal(second.residual, first.residual)
    assert torch.equal(second.alpha, first.alpha)
    second.step(few)
    assert not torch.equal(second.residual, first.residual)
    apart = start(weights, start=str(tmp_path / "first.safetensors"), per_block=True)
    assert torch.equal(apart.residual, first.residual.expand(len(apart.alpha), -1, -1))
    with pytest.raises(EbrError, match="tokens=4 and per_block=false"):
        start(weights, start=str(tmp_path / "first.safetensors"), tokens=8)
    with pytest.raises(EbrError, match="nowhere"):
        start(weights, start=str(tmp_path / "nowhere.safetensors"))


def test_with_alpha_0_only_the_strengths_move_in_the_first_step(weights, pool):
    learner = start(weights, alpha=0.0)
    before, batch = learner.residual.detach().clone(), batches(learner, pool)
    learner.step(batch)
    assert torch.equal(learner.residual, before)
    assert (learner.alpha != 0).all()
    learner.step(batch)
    assert (learner.residual != before).any()


def test_on_policy_states_are_those_of_the_sampler(weights, pool):
    learner = start(weights, on_policy=4, batch=4)
    degraded, clean = batches(learner, pool)(range(4))
    noise = torch.randn(clean.shape)
    table = make_table("fast", learner.config.t0, 4)
    plan = bake(learner.backbone, [(learner.prompt(), 1.0)], table)
    assert learner.views == plan.views  # the grid lies where restoring has it
    assert len({view.offset for view in plan.views}) == 4
    visited: dict[float, torch.Tensor] = {}

    def velocity(state, entry):
        visited[table.times[len(visited)]] = state
        return plan.seen(learner.backbone.velocity, learner.backbone.codec, degraded)(state, entry)

    sample(velocity, plan.conditioning, degraded, noise, table)
    seen = set()
    for learner.iteration in range(24):
        state, target, t = learner.visited(degraded, clean, noise)
        assert not state.requires_grad
        time = next(known for known in visited if known == pytest.approx(t[0].item()))
        assert torch.allclose(state, visited[time], atol=1e-5)
        assert torch.allclose(state - t.view(-1, 1, 1, 1, 1) * target, clean, atol=1e-4)
        assert learner.view(t) == plan.views[table.times.index(time)]
        seen.add(time)
    assert len(seen) == 4


def test_parts_and_processes_share_a_batch(weights, pool):
    """The mean gradient is the same however the batch is divided; processes' means are taken here by hand."""
    whole = start(weights, batch=8, clip=0.5)
    numbers = whole.numbers(3, 0)
    assert numbers == list(range(24, 32))
    for processes, backbone in ((1, 4), (2, 2), (4, 1)):
        shares = [
            start(weights, batch=8, accumulate=backbone, world=World(rank, processes)).numbers(3, part)
            for rank in range(processes)
            for part in range(backbone)
        ]
        assert [number for share in shares for number in share] == numbers
    divided = start(weights, batch=8, accumulate=4, clip=0.5)
    losses = [learner.step(batches(learner, pool)).loss for learner in (whole, divided)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    moments = [learner.optimizer.state[learner.residual]["exp_avg"] for learner in (whole, divided)]
    assert torch.allclose(*moments, rtol=1e-4, atol=1e-9)


def test_the_gradient_is_clipped(weights, pool):
    free, held = start(weights, loss="velocity"), start(weights, loss="velocity", clip=1e-4)
    norms = [learner.step(batches(learner, pool)).gradient for learner in (free, held)]
    assert norms[0] == norms[1] > 1e-4
    moments = [[learner.optimizer.state[p]["exp_avg"] for p in learner.parameters] for learner in (free, held)]
    assert torch.cat([m.flatten() for m in moments[1]]).norm() == pytest.approx(0.1 * 1e-4, rel=1e-3)


def test_the_average_is_saved_in_place_of_the_last_values(weights, pool):
    learner = start(weights, ema=0.5)
    batch, values = batches(learner, pool), []
    for _ in range(4):
        learner.step(batch)
        values.append(learner.residual.detach().clone())
    expected, decays = start(weights).residual.detach(), (0.1, 2 / 11, 3 / 12, 4 / 13)
    for value, decay in zip(values, decays):
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(learner.prompt().residual, expected, atol=1e-6)
    assert not torch.allclose(learner.prompt().residual, values[-1], atol=1e-4)


def test_checkpointed_blocks_give_the_same_gradients(weights, pool):
    plain, saving = start(weights), start(weights, checkpointing=True)
    runs = [0]
    block = blocks_of(saving.backbone.trunk)[0]
    block.qkv.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    found = []
    for learner in (plain, saving):
        loss = learner.loss(*fixed_states(learner, pool))
        found.append(torch.autograd.grad(loss, learner.parameters))
    assert all(torch.equal(*pair) for pair in zip(*found))
    assert runs[0] == 2  # forward, and once more in the backward pass


def test_a_seed_means_one_prompt(weights, pool):
    def learned(seed):
        learner = start(weights, seed=seed)
        learner.step(batches(learner, pool))
        return learner.residual.detach()

    assert torch.equal(learned(3), learned(3))
    assert not torch.equal(learned(3), learned(4))


def test_what_does_not_fit_is_told(weights):
    with pytest.raises(EbrError, match="batch of 6 cannot be divided among 4 process"):
        start(weights, batch=6, world=World(0, 4))
    codec = SimpleNamespace(frames=lambda count: 5)
    wan = SimpleNamespace(name="wan", spec=spec("wan"), multiple=16, codec=codec, check_start=lambda t0: None)
    with pytest.raises(EbrError, match="frames, not 2; use 5"):
        check_fits(replace(QUICK, backbone="wan", data="x", loss="x0", frames=2), wan, World())
    with pytest.raises(EbrError, match="multiples of 16, not 40"):
        check_fits(replace(QUICK, size=40), wan, World())
    flux = SimpleNamespace(**vars(wan) | {"name": "flux", "spec": spec("flux"), "text": {"context": range(3)}})
    flux.codec = SimpleNamespace(frames=lambda count: 1)
    with pytest.raises(EbrError, match="4 tokens does not fit on 3"):
        check_fits(QUICK, flux, World())


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    config = replace(QUICK, iterations=1000, warmup=10)
    factors = [rate_factor(i, config) for i in range(1001)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5, rel=1e-3)
    assert factors[9] == pytest.approx(1, rel=1e-3)
    assert factors[500] == pytest.approx(0.525)
    assert factors[1000] == pytest.approx(0.05)
    assert all(a > b for a, b in zip(factors[9:], factors[10:]))


def test_what_is_given_away_tells_no_folders_of_this_machine(tmp_path):
    told = shareable({"model": str(tmp_path / "mini.safetensors"), "data": "pairs/train", "task": "haze", "batch": 3})
    assert told == {"model": "mini.safetensors", "data": "pairs/train", "task": "haze", "batch": 3}


def test_the_file_says_whose_detail_a_picture_has(weights):
    assert start(weights).prompt().detail == "model"
    assert start(weights, detail="input").prompt().detail == "input"


def test_the_file_says_whether_pictures_are_deconvolved(weights):
    assert not start(weights).prompt().deconvolve
    assert start(weights, deconvolve=True).prompt().deconvolve
