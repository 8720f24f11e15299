"""Every experiment's quick form measures all of its arms on the same cells; its own mathematics is right."""

import pytest
import torch

from benchmarks.claims import __main__ as estimate
from benchmarks.claims import a_space, b_process, c_secretly_knows, common, d_schedule, e_prompt, f_mixtures, g_baselines
from benchmarks.claims.b_process import ddbm_sample, ddbm_weights
from benchmarks.claims.common import TINY
from ebr_engine.bridge import ddbm_state, power_times


@pytest.mark.parametrize(
    ("module", "arms"),
    [
        (a_space, ["empty text", "best words", "token embeddings", "encoder's output, replaced"]),
        (b_process, ["input", "naive prompt, EBR sampler", "EBR prompt, naive sampler", "DDBM prompt, DDBM sampler"]),
        (e_prompt, ["tokens 1", "alpha 0.0", "per_block True", "loss velocity"]),
        (c_secretly_knows, ["input", "clean only: empty prompt", "random: learned prompt", "degraded seen: learned prompt"]),
        (
            f_mixtures,
            ["velocity mean (released)", "automatic choice", "prompt learned on the mixture"],
        ),
        (d_schedule, ["T0 0.2, 2 steps, order 2", "T0 0.4, 1 steps, order 1"]),
        (g_baselines, ["input", "classical", "U-Net, same data and time", "EBR prompt"]),
    ],
)
def test_quick_forms_measure_every_arm(quick, module, arms):
    text, plot, rows = quick(module)
    found = {}
    for row in rows:
        found.setdefault(row["arm"], set()).add((row["task"], row["photo"], row["seed"]))
        assert 0 < row["psnr"] < 60
    assert set(arms) <= set(found)
    assert len({frozenset(cells) for cells in found.values()}) == 1
    assert len(next(iter(found.values()))) == 4  # two photos, two seeds
    for arm in found:
        assert f"| {arm} |" in text
    assert plot.count("<circle") == len(found) - 1
    found.pop("automatic choice", None)  # which may choose what another arm has
    values = {arm: [row["psnr"] for row in rows if row["arm"] == arm] for arm in found}
    assert len({tuple(value) for value in values.values()}) == len(values)  # no arm is another under a second name


def test_ddbms_weights_are_its_states():
    t0, t = 0.4, torch.tensor([0.1, 0.25, 0.399])
    clean, degraded, noise = torch.randn(3, 3, 2, 1, 1, 1).unbind(0)
    state, _ = ddbm_state(clean, degraded, noise, t, t0)
    for i, time in enumerate(t.tolist()):
        a, b, c = ddbm_weights(time, t0)
        torch.testing.assert_close(state[i], a * clean[i] + b * degraded[i] + c * noise[i], atol=1e-5, rtol=1e-5)
    assert ddbm_weights(t0, t0) == pytest.approx((0, 1 - t0, 0), abs=1e-6)


def test_ddbms_sampler_with_a_perfect_network_ends_at_the_clean_latent():
    t0 = 0.4
    clean, degraded, noise = torch.randn(3, 2, 3, 1, 4, 4, dtype=torch.float64).unbind(0)
    visited = []

    def velocity(state, t):
        visited.append((t, state))
        return (state - clean) / t

    times = power_times(4, t0)
    restored = ddbm_sample(velocity, times[:-1], degraded, noise, times, t0)
    torch.testing.assert_close(restored, clean)
    assert torch.equal(visited[0][1], (1 - t0) * degraded)
    for t, state in visited[1:]:  # it walks along the bridge that prompts learn on
        expected, _ = ddbm_state(clean, degraded, noise, torch.full((2,), t, dtype=torch.float64), t0)
        torch.testing.assert_close(state, expected)


def test_a_backbone_pre_trained_on_clean_images_sees_no_degraded_one(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(c_secretly_knows, "pretrain", lambda path, config: (seen.append(config), path.write_bytes(b"weights")))
    model = c_secretly_knows.save_random(tmp_path / "tiny.safetensors", TINY)
    path = tmp_path / "clean.safetensors"
    assert c_secretly_knows.clean_only(path, model, 3.0) == path
    c_secretly_knows.clean_only(path, model, 3.0)
    assert [(config.degraded, config.minutes) for config in seen] == [(0.0, 3.0)]


def test_mixtures_take_no_tasks(capsys):
    with pytest.raises(SystemExit):
        f_mixtures.main(["--quick", "--tasks", "haze"])
    assert "--tasks" in capsys.readouterr().err


def test_the_estimate_counts_the_arms_that_there_are(tmp_path, capsys):
    study = common.Study("t", common.WEIGHTS, tmp_path, tmp_path, ("haze",))
    each = estimate.SEEDS * estimate.PHOTOS
    assert (len(study.seeds), len(study.photos)) == (estimate.SEEDS, estimate.PHOTOS)
    for module, tasks in ((a_space, 3), (b_process, 5), (d_schedule, 3), (e_prompt, 3), (g_baselines, 5)):
        name = module.__name__.rpartition(".")[2]
        assert estimate.WORK[name][1] == tasks * len(module.arms(study)) * each
    mixed, alone = f_mixtures.mixed_arms(study, ("haze", "rain")), f_mixtures.unseen_arms(study)
    assert estimate.WORK["f_mixtures"][1] == (len(f_mixtures.MIXTURES) * len(mixed) + len(alone)) * each
    backbones = dict.fromkeys(("one", "two", "three"), common.WEIGHTS)
    assert estimate.WORK["c_secretly_knows"][1] == 5 * len(c_secretly_knows.arms(study, backbones)) * each
    estimate.main(["--quick", "--size", "32"])
    text = capsys.readouterr().out
    assert all(name in text for name in estimate.WORK)
    assert "core minutes, estimated" in text
