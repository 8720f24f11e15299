"""The experiments past the paper: their quick forms measure every arm, and the mathematics of each is what its text says."""

from dataclasses import replace

import pytest
import torch

from benchmarks.claims import (
    common,
    i_bridge,
    j_fewer,
    k_where,
    l_few_pairs,
    m_order,
    m_weights,
    n_limits,
    o_codec,
    p_clips,
    simulators,
)
from benchmarks.claims.bridges import Bridge, BridgeLearner, sampled
from benchmarks.claims.common import TINY, WEIGHTS, Learning, Study
from benchmarks.claims.learning import config_of, fitted, frozen
from benchmarks.claims.reporting import command_of
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.bridge.process import ddbm_state, training_state
from ebr_engine.bridge.sampler import step_table
from ebr_engine.bridge.schedules import power_times
from ebr_engine.engine.restorer import Restorer
from ebr_engine.training import pretrainee
from ebr_engine.training.learner import Learner
from ebr_engine.training.scenes import ScenePool

T0 = 0.2
BRIDGES = [
    Bridge(path, noise, level, form)
    for path in ("linear", "snr")
    for noise in ("constant", "vanishing")
    for level in (0.2, 1.0)
    for form in ("released", "paper")
]


@pytest.fixture(scope="module")
def pool_of_scenes():
    with ScenePool(2, 128) as pool:
        yield pool


@pytest.mark.parametrize(
    ("module", "arms"),
    [
        (i_bridge, ["EBR, η 1", "DDBM", "paper's form, η 1", "paper's form's prompt, released sampler", "EBR, η 0.2, T0 0.4"]),
        (j_fewer, ["states, 1 evaluation", "consistency, 2 evaluations", "unroll 2, 5 evaluations"]),
        (k_where, ["one prompt", "12 tokens", "sees where", "sees the mean", "sees where, less the mean"]),
        (l_few_pairs, ["nearest prompt as it is", "4 pairs", "4 pairs, from the nearest", "endless"]),
        (n_limits, ["bundled prompt", "learned on", "256 rows", "SSIM in the loss", "all weights free"]),
        (o_codec, [f"{codec}: {how}" for codec in o_codec.CODECS for how in o_codec.SAMPLING]),
        (p_clips, [f"{seen}: frames agree" for seen in ("pictures", "clips", "clips, seen together")]),
    ],
)
def test_quick_forms_measure_every_arm(quick, every_arm, module, arms):
    found = every_arm(*quick(module))
    assert {"input", *arms} <= set(found)


def test_quick_weights_judge_every_way(quick):
    text, _, rows = quick(m_weights)
    assert {row["arm"] for row in rows} >= {"in turn, as they are", "the other way round", "residuals, 0.5", "haze alone"}
    assert all(row[judge] >= 0 for row in rows for judge in m_weights.JUDGES)
    for arm in ("input", *(f"chosen by {judge}" for judge in m_weights.JUDGES), "oracle"):
        assert f"| {arm} |" in text


def test_quick_orders_confirm_on_other_photos(quick, tmp_path):
    text, _, rows = quick(m_order)
    other = (tmp_path / "quick" / "m_order_confirmed.md").read_text()
    assert m_order.OTHERS[0] in other
    for arm in ("input", m_order.LAST, m_order.FIRST, m_order.TONES):
        assert f"| {arm} |" in text
        assert f"| {arm} |" in other
    assert not set(m_order.OTHERS) & {row["photo"] for row in rows}


def test_a_way_in_turn_is_the_engines_own_run_of_several_tasks():
    restorer = Restorer("mini", precision="fp32")
    picture = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    found = m_weights.runner(restorer, ("rain", "haze"), (1.0, 0.5))(picture)
    expected = restorer.restore(picture, "rain+haze:0.5", mix="turn", supersample=1)
    torch.testing.assert_close(found, (expected * 255).round() / 255)


def test_where_prompts_were_kept_is_no_part_of_a_command():
    given = ["--seeds", "0", "1", "--work", "somewhere", "--quick"]
    assert command_of("j_fewer.py", given, []) == "python -m benchmarks.claims.j_fewer --seeds 0 1 --quick"


def latents(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, 4, 1, 3, 5, generator=generator, dtype=torch.float64).unbind()


def wide(times):
    return torch.tensor(times, dtype=torch.float64).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("bridge", BRIDGES)
def test_the_target_is_the_velocity_whose_clean_estimate_is_the_clean_latent(bridge):
    clean, degraded, noise = latents()
    t = wide([0.003, 0.11, 0.199])
    state = bridge.state(clean, degraded, noise, t, T0)
    velocity = bridge.target(clean, degraded, noise, t, T0)
    torch.testing.assert_close(bridge.clean(state, degraded, velocity, t, T0), clean, rtol=0, atol=1e-11)


@pytest.mark.parametrize("path", ["linear", "snr"])
def test_the_papers_form_goes_on_from_the_released_one_away_from_the_degraded_latent(path):
    state, degraded, velocity = latents(1)
    t = wide([0.02, 0.1, T0])
    released, paper = (Bridge(path, form=form).clean(state, degraded, velocity, t, T0) for form in ("released", "paper"))
    b = Bridge(path).weights(t, T0)[1]
    torch.testing.assert_close(paper, released + b / (1 - b) * (released - degraded), rtol=0, atol=1e-11)
    assert (b / (1 - b))[-1].item() == pytest.approx((1 - T0) / T0)
    # The paper's own words: its target is the flow's, ε − X0.
    torch.testing.assert_close(Bridge(path, form="paper").target(state, degraded, velocity, t, T0), velocity - state)


def test_states_are_those_of_the_engine():
    clean, degraded, noise = latents(2)
    t = torch.tensor([0.01, 0.1, 0.19], dtype=torch.float64)
    for bridge, process in ((Bridge(), training_state), (Bridge("snr", "vanishing"), ddbm_state)):
        state, target = process(clean, degraded, noise, t, T0)
        torch.testing.assert_close(bridge.state(clean, degraded, noise, wide(t.tolist()), T0), state)
        torch.testing.assert_close(bridge.target(clean, degraded, noise, wide(t.tolist()), T0), target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0.2, 1.0])
def test_steps_of_ebr_are_the_released_ones_whatever_the_noise(level):
    clean, degraded, noise = latents(3)
    bridge, times = Bridge(level=level), (T0, 0.12, 0.05, 0.0)
    table = step_table(times, T0, order=1).coefficients.double()
    for i, (t, s) in enumerate(zip(times, times[1:])):
        t, s = (torch.tensor(time, dtype=torch.float64) for time in (t, s))
        state = bridge.state(clean, degraded, noise, t, T0)
        found = clean + 0.1 * noise  # an estimate that is not right
        velocity = (state - found) / t
        expected = table[i, 0] * state + table[i, 1] * velocity + table[i, 2] * degraded
        torch.testing.assert_close(bridge.step(state, found, degraded, noise, t, s, T0), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bridge", [*BRIDGES, Bridge(level=0.0)])
def test_every_sampler_walks_along_its_own_bridge_to_the_clean_latent(bridge):
    clean, degraded, noise = (x.float() for x in latents(4))
    times, visited = power_times(4, T0, 1.65), []

    class Perfect:
        codec = None

        @staticmethod
        def velocity(state, t):
            visited.append((t, state))
            return bridge.target(clean, degraded, noise, t, T0)

    steps = [torch.tensor(t) for t in times[:-1]]
    restored = sampled(Perfect, bridge, steps, (), degraded, noise, times, T0)
    torch.testing.assert_close(restored, clean, rtol=0, atol=1e-4)
    for t, state in visited:
        torch.testing.assert_close(state, bridge.state(clean, degraded, noise, t, T0), rtol=0, atol=1e-4)


@pytest.fixture
def study(tmp_path):
    model = common.save_random(tmp_path / "tiny.safetensors", TINY, gain=10)
    learning = Learning(iterations=2, batch=2, size=32, tokens=4, scenes=2)
    return Study("t", model, tmp_path, tmp_path, ("haze",), ("chelsea",), (0,), 32, 2, learning, quick=True)


def batch(backbone, size=32):
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand(2, 3, 1, size, size, generator=generator)
    return backbone.codec.encode(clean * 0.5 + 0.3), backbone.codec.encode(clean)


def test_the_learner_on_mini_s_own_bridge_is_the_engines(study):
    study = replace(study, model=WEIGHTS)  # with views and less noise, as `mini` has them
    backbone = frozen(study.model, "fp32")
    config = config_of(study, "haze", 0)
    degraded, clean = batch(backbone)
    losses = []
    for start in (Learner.start, BridgeLearner.on(Bridge(level=backbone.noise))):
        learner = start(config, backbone)
        loss = learner.state_loss([0, 1], degraded, clean)
        losses.append((loss.item(), torch.autograd.grad(loss, learner.parameters)))
    (ours, gradients), (theirs, others) = losses
    assert ours == pytest.approx(theirs, rel=1e-4)
    for one, other in zip(gradients, others):
        assert (one - other).norm() < 1e-3 * one.norm()


def test_later_estimates_are_targets_and_get_no_gradient(study):
    backbone = frozen(study.model, "fp32")
    degraded, clean = batch(backbone)
    config = config_of(study, "haze", 0)
    seen = []

    class Watching(j_fewer.ConsistencyLearner):
        def estimate(self, *arguments):
            found = super().estimate(*arguments)
            seen.append((arguments[-1], found.requires_grad))
            return found

    learner = Watching.start(config, backbone)
    for learner.iteration in range(12):
        learner.state_loss([0, 1], degraded, clean)
    live = [i for i, gradient in seen if gradient]
    assert len(live) == 12
    assert set(live) == set(range(5))
    later = [following for (i, gradient), following in zip(seen, seen[1:]) if gradient and i < 4]
    assert later == [(i + 1, False) for i in live if i < 4]


def test_without_a_map_s_numbers_the_trunk_answers_as_before_and_with_them_each_token_by_itself(study):
    backbone: Backbone = frozen(study.model, "fp32")
    trunk = backbone.trunk
    step = backbone.bake(torch.tensor([100.0]), [])[0]
    state = torch.randn(1, 48, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    plain = backbone.velocity(state, step)
    map = k_where.Map.start(backbone.width, backbone.blocks, "token", 0)
    with k_where.seeing(trunk, map):
        assert torch.equal(backbone.velocity(state, step), plain)
    map.up.normal_(generator=torch.Generator().manual_seed(1))
    added = {}

    def codes_of(sees):
        one = k_where.Map(map.down, map.up, sees)
        given = torch.randn(1, 5, backbone.width, generator=torch.Generator().manual_seed(2))
        return one.codes(given)

    assert codes_of("token").shape == (1, 5, k_where.RANK)
    torch.testing.assert_close(codes_of("mean"), codes_of("token").mean(1, keepdim=True))
    torch.testing.assert_close(codes_of("difference") + codes_of("mean"), codes_of("token"))
    for sees in ("token", "mean", "difference"):
        with k_where.seeing(trunk, k_where.Map(map.down, map.up, sees)):
            added[sees] = backbone.velocity(state, step)
        assert all(not torch.allclose(added[sees], other) for other in (plain, *(added[one] for one in added if one != sees)))
    assert torch.equal(backbone.velocity(state, step), plain)  # nothing stays behind


def test_a_map_is_learned_beside_the_prompt_and_nothing_else_moves(study):
    def start(config, backbone):
        return k_where.started(config, backbone, "token")

    learner = fitted(study, config_of(study, "haze", 0), start)
    assert len(learner.parameters) == 4
    assert learner.map.up.abs().max() > 0
    fresh = k_where.Map.start(learner.backbone.width, learner.backbone.blocks, "token", 0)
    assert not torch.equal(learner.map.down.detach(), fresh.down)
    assert learner.prompt().residual.shape == (4, TINY.width)


@pytest.mark.parametrize("how", simulators.SIMULATORS)
@pytest.mark.parametrize("shape", [(2, 3, 40, 72), (1, 3, 33, 47)])
def test_simulators_damage_a_part_and_are_the_same_for_a_seed(how, shape):
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def damaged(seed):
        return simulators.SIMULATORS[how](clean, torch.Generator().manual_seed(seed))

    first = damaged(1)
    assert first.shape == clean.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, damaged(1))
    assert not torch.equal(first, damaged(2))
    touched = ((first - clean).abs().amax(1) > 0.02).float().mean()
    assert touched > (0.02 if how == "film" else 0.5)
    assert how != "film" or touched < 0.8  # flaws lie over a picture that is otherwise whole


def test_few_pairs_give_crops_of_those_pairs_alone(study):
    from benchmarks.claims.learning import kept_pool

    pool = kept_pool(2, study.work)
    config = config_of(study, "film", 0, data="film")
    pairs = l_few_pairs.FewPairs("film", 1, config, pool)
    degraded, clean = l_few_pairs.pair_of(pool, "film", 0)
    both = torch.cat((degraded, clean))

    def is_of_it(crop):
        corners = (both[..., :-31, :-31] == crop[..., :1, :1]).all(0).all(0).nonzero().tolist()
        return any(torch.equal(both[..., top : top + 32, left : left + 32], crop) for top, left in corners)

    for number in range(4):
        bad, good = pairs.pixels(number)
        assert bad.shape == good.shape == (3, 1, 32, 32)
        crop = torch.stack((bad[:, 0], good[:, 0]))
        assert is_of_it(crop) or is_of_it(crop.flip(-1))
    endless = l_few_pairs.FewPairs("film", 0, config, pool)
    assert not torch.equal(endless.pixels(0)[0], endless.pixels(1)[0])
    assert torch.equal(endless.pixels(1)[0], endless.pixels(1)[0])


def test_the_way_that_a_judge_likes_best_is_chosen_in_each_cell():
    rows = [
        {"arm": arm, "task": "t", "photo": photo, "seed": 0, "psnr": psnr, "probe": probe}
        for photo, arm, psnr, probe in (("p", "a", 1.0, 0.2), ("p", "b", 2.0, 0.1), ("q", "a", 5.0, 0.3), ("q", "b", 4.0, 0.4))
    ]
    chosen = m_weights.chosen(rows, "chosen", lambda row: row["probe"])
    assert [(row["photo"], row["way"], row["psnr"]) for row in chosen] == [("p", "b", 2.0), ("q", "a", 5.0)]
    assert m_weights.rank_correlation(rows, "probe") == pytest.approx(1)
    with_more = [*rows, *({**row, "arm": "c", "psnr": 4.0} for row in rows if row["arm"] == "a")]
    assert {row["way"] for row in m_weights.best_fixed(with_more)} == {"c"}


def test_learning_through_the_sampler_on_mini_s_own_bridge_is_the_engines(study):
    study = replace(study, model=WEIGHTS)
    backbone = frozen(study.model, "fp32")
    config = config_of(study, "haze", 0, unroll=2)
    degraded, clean = batch(backbone)
    ours = BridgeLearner.on(Bridge(level=backbone.noise))(config, backbone).result_loss([0, 1], degraded, clean)
    theirs = Learner.start(config, backbone).result_loss([0, 1], degraded, clean)
    assert ours.item() == pytest.approx(theirs.item(), rel=0.02)  # the engine's second step is of second order
    one = replace(config, unroll=1)
    ours = BridgeLearner.on(Bridge(level=backbone.noise))(one, backbone).result_loss([0, 1], degraded, clean)
    theirs = Learner.start(one, backbone).result_loss([0, 1], degraded, clean)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_freed_weights_learn_and_frozen_ones_do_not(tmp_path):
    study = replace(Study("n", WEIGHTS, tmp_path, tmp_path, ("rain",)), quick=True)
    config = config_of(study, "rain", 0, **n_limits.further("rain"))
    config = replace(config, iterations=1, batch=1, size=32, scenes=2)
    before = {name: weight.clone() for name, weight in frozen(WEIGHTS, config.precision).trunk.state_dict().items()}
    free, plain = (fitted(study, config, start) for start in (n_limits.freed, Learner.start))
    assert not torch.equal(free.residual, n_limits.initial(config, free.backbone)[0])
    after, still = free.backbone.trunk.state_dict(), plain.backbone.trunk.state_dict()
    assert all(torch.equal(still[name], before[name]) for name in before)
    moved = [name for name in after if "qkv.weight" in name or "up.weight" in name]
    original = n_limits.backbone_of(config, "cpu").trunk.state_dict()
    assert moved
    assert all(0 < (after[name] - original[name]).abs().max() < 1e-2 for name in moved)


def test_a_widened_prompt_restores_as_the_bundled_one(tmp_path, monkeypatch):
    monkeypatch.setattr(n_limits, "SPREAD", 0.0)
    study = Study("n", WEIGHTS, tmp_path, tmp_path, ("rain",))
    wide, prompt = n_limits.load_prompt(n_limits.widened(study, "rain")), n_limits.load_prompt(n_limits.bundled("rain"))
    assert wide.residual.shape[-2] == n_limits.TIMES * prompt.residual.shape[-2]
    restorer = Restorer("mini", precision="fp32")
    picture = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    results = [restorer.run(picture, restorer.plan(prompt=one)) for one in (wide, prompt)]
    torch.testing.assert_close(*results, atol=0.01, rtol=0)


def test_blocks_of_eight_are_the_lapped_codec_without_its_filter():
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 1, 24, 16)
    codec = o_codec.EightCodec()
    latent = codec.encode(pixels)
    torch.testing.assert_close(codec.decode(latent), pixels, atol=1e-5, rtol=0)
    torch.testing.assert_close(latent[..., 1, 1], codec.encode(pixels[..., 8:16, 8:16])[..., 0, 0], atol=1e-5, rtol=0)


def test_a_pretraining_on_clips_has_pictures_and_clips_of_as_many_frames(pool_of_scenes):
    config = p_clips.PretrainConfig(batch=10, sizes=(64,), size_odds=(1.0,))
    model = p_clips.MiniTextEncoder(pretrainee.VOCABULARY)
    codec, generator = LappedCodec(), torch.Generator().manual_seed(0)
    found = {p_clips.mixed_batch(pool_of_scenes, codec, model, config, 64, generator)[0].shape for _ in range(8)}
    assert found == {(10, 192, 1, 8, 8), (2, 192, p_clips.FRAMES, 8, 8)}


def test_clips_to_learn_from_move_and_are_degraded_as_one_camera_sees_them(pool_of_scenes):
    config = config_of(Study("moving", WEIGHTS, None, None, ("rain",), (), ()), "rain", 0, size=32)
    samples = p_clips.MovingSamples(config, pool_of_scenes)
    degraded, clean = samples.pixels(3)
    assert degraded.shape == clean.shape == (3, p_clips.FRAMES, 32, 32)
    assert torch.equal(samples.pixels(3)[0], degraded)
    assert not torch.equal(clean[:, 0], clean[:, 1])
    assert (degraded - clean).abs().mean((0, 2, 3)).min() > 0
