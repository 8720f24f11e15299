"""Every experiment's quick form measures all of its arms on the same cells; its own mathematics is right."""

import importlib
from dataclasses import replace

import pytest
import torch

from benchmarks.claims import __main__ as overview
from benchmarks.claims import (
    a_space,
    b_process,
    c_secretly_knows,
    common,
    d_schedule,
    e_prompt,
    f_mixtures,
    g_baselines,
    h_adaptive,
)
from benchmarks.claims.b_process import ddbm_sample, ddbm_weights
from benchmarks.claims.common import TINY
from ebr_engine.backbones.mini.model import load_mini, save_mini
from ebr_engine.bridge.process import ddbm_state
from ebr_engine.bridge.schedules import power_times


@pytest.mark.parametrize(
    ("module", "arms"),
    [
        (a_space, ["empty text", "best words", "token embeddings", "encoder's output, replaced"]),
        (b_process, ["input", "naive prompt, EBR sampler", "EBR prompt, naive sampler", "DDBM prompt, DDBM sampler"]),
        (e_prompt, ["tokens 1", "per_block True", "loss velocity"]),
        (
            c_secretly_knows,
            ["input", *(f"{name}: learned prompt" for name in ("given", "degraded seen", "clean only", "random"))],
        ),
        (
            f_mixtures,
            ["velocity mean (released)", "automatic choice", "prompt learned on the mixture"],
        ),
        (d_schedule, ["T0 0.2, 2 steps, order 2", "T0 0.4, 1 steps, order 1"]),
        (g_baselines, ["input", "classical", *(f"U-Net, {name}" for name in g_baselines.WIDTHS.values()), "EBR prompt"]),
        (h_adaptive, ["one prompt", "by moment", "by picture"]),
    ],
)
def test_quick_forms_measure_every_arm(quick, every_arm, module, arms):
    text, plot, rows = quick(module)
    found = every_arm(text, plot, rows)
    assert set(arms) <= set(found)
    assert len(next(iter(found.values()))) == 4  # two photos, two seeds
    found.pop("automatic choice", None)  # which may choose what another arm has
    values = {arm: [row["psnr"] for row in rows if row["arm"] == arm] for arm in found}
    assert len({tuple(value) for value in values.values()}) == len(values)  # no arm is another under a second name


@torch.no_grad()
def test_strengths_of_each_sample_are_those_of_a_run_of_its_own(tmp_path, relative_rms):
    mini = load_mini(common.save_random(tmp_path / "tiny.safetensors", TINY, gain=10))
    trunk = mini.trunk
    residual, weight = torch.randn(2, 4, TINY.width), torch.rand(3, 2, TINY.num_layers)  # [P, L, D], [B, P, blocks]
    timesteps, state = torch.tensor([200.0, 150.0, 20.0]), torch.randn(3, 48, 1, 4, 6)
    none = torch.zeros(TINY.num_layers)
    tables = mini.conditioner(timesteps, mini.context, [(one, none) for one in residual])
    with h_adaptive.own_strengths_in(trunk):
        together = trunk(state, h_adaptive.strengthened(tables.batch(), weight))
    for i, strengths in enumerate(weight):
        alone = mini.conditioner(timesteps[i : i + 1], mini.context, list(zip(residual, strengths)))
        assert relative_rms(together[i : i + 1], mini.trunk(state[i : i + 1], alone[0])) < 1e-5
    assert relative_rms(together[:1], mini.trunk(state[:1], mini.conditioner(timesteps[:1], mini.context)[0])) > 1e-3


def test_strengths_by_the_moment_and_by_the_picture(tmp_path):
    model = common.save_random(tmp_path / "tiny.safetensors", TINY, gain=10)
    study = common.Study("t", model, tmp_path, tmp_path, ("haze",), learning=common.Learning(t0=0.4), quick=True)
    moment = h_adaptive.Adaptive(study, 1, "moment", 0)
    moment.gain.fill_(0.05)
    found = moment.strengths(torch.tensor([0.0, 0.2, 0.4]), None)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([0.05, 0.1, 0.15]))
    picture = h_adaptive.Adaptive(study, 2, "picture", 0)
    picture.gain[1].fill_(0.5)
    z = torch.randn(3, TINY.width)
    found = picture.strengths(torch.tensor([0.4]), z)
    torch.testing.assert_close(found[:, 0], torch.full((3, TINY.num_layers), 0.1))
    torch.testing.assert_close(found[:, 1, 0], 0.1 + 0.5 * z.sum(1))


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


def test_backbones_to_compare_differ_in_the_share_of_degraded_images_only(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        c_secretly_knows, "pretrain", lambda path, config, clock: (seen.append(config), path.write_bytes(b"weights"))
    )
    made = [c_secretly_knows.pretrained(tmp_path, name, 3.0) for name in ("degraded seen", "clean only", "clean only")]
    assert made[0] != made[1] == made[2]
    assert len(seen) == 2  # what is there is not made again
    assert replace(seen[0], degraded=0.0) == seen[1]
    assert seen[0].degraded > 0.5
    assert seen[0].minutes == 3


def test_what_is_told_of_a_backbones_training_counts_all_of_its_runs(tmp_path):
    training = {"minutes": 2.0, "iterations": 30, "before": {"minutes": 1.5, "iterations": 12}}
    mini = replace(load_mini(common.save_random(tmp_path / "tiny.safetensors", TINY)), training=training)
    save_mini(tmp_path / "two.safetensors", mini)
    assert c_secretly_knows.told_training(tmp_path / "two.safetensors") == "42 iterations in 4 minutes"


def test_mixtures_take_no_tasks(capsys):
    with pytest.raises(SystemExit):
        f_mixtures.main(["--quick", "--tasks", "haze"])
    assert "--tasks" in capsys.readouterr().err


def test_the_estimate_counts_the_arms_that_there_are(tmp_path):
    study = common.Study("t", common.WEIGHTS, tmp_path, tmp_path, ("haze",))
    for module in (a_space, b_process, d_schedule, e_prompt, g_baselines, h_adaptive):
        assert overview.WORK[module.__name__.rpartition(".")[2]][1] == len(module.arms(study))
    backbones = dict.fromkeys(("one", "two", "three", "four"), common.WEIGHTS)
    assert overview.WORK["c_secretly_knows"][1] == len(c_secretly_knows.arms(study, backbones))
    mixed, alone = f_mixtures.mixed_arms(study, ("haze", "rain")), f_mixtures.unseen_arms(study)
    assert overview.WORK["f_mixtures"][1] * 5 >= len(f_mixtures.MIXTURES) * len(mixed) + len(alone)


def test_the_estimate_tells_what_each_takes(capsys, tmp_path):
    overview.main(["--quick", "--size", "32", "--work", str(tmp_path)])
    text = capsys.readouterr().out
    assert all(name in text for name in overview.WORK)
    assert "core minutes, estimated" in text


def test_all_runs_every_experiment_with_the_same_options(monkeypatch):
    ran = []
    for name in overview.WORK:
        module = importlib.import_module(f"benchmarks.claims.{name}")
        monkeypatch.setattr(module, "main", lambda given, name=name: ran.append((name, given)))
    overview.main(["all", "--seeds", "0", "1"])
    assert ran == [(name, ["--seeds", "0", "1"]) for name in overview.WORK]
