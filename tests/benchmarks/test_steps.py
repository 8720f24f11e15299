"""The sweep of schedules runs, compares like with like, and its third order is exact where it should be."""

import json
import math
from importlib.metadata import version

import pytest
import torch

from benchmarks import quality, steps
from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.bridge.process import start_state
from ebr_engine.bridge.sampler import sample, step_table
from ebr_engine.bridge.schedules import power_times

T0 = 0.3


@pytest.fixture(scope="module")
def mini():
    return load_mini()


def test_moments_are_the_integrals():
    t, s = 0.25, 0.1
    tau = torch.linspace(t, s, 200001, dtype=torch.float64)
    for k, moment in zip((1, 2), steps.moments(t, s, T0)):
        integral = torch.trapezoid((1 / T0 - tau**-2) * (tau - t) ** k, tau)
        assert moment == pytest.approx(s * integral.item(), rel=1e-7)


def test_moments_at_the_end_are_their_limits():
    for moment, limit in zip(steps.moments(0.25, 0.0, T0), steps.moments(0.25, 1e-7, T0)):
        assert moment == pytest.approx(limit, abs=1e-5)


def toy(clean):
    """A trunk whose clean estimate is a function of time alone; its conditioning is the times themselves."""
    return lambda state, t: (state - clean(t)) / t


def solution(clean, times, degraded, noise, order):
    """The state at the end of a run, in float64."""
    arguments = toy(clean), times[:-1], degraded, noise
    if order == 3:
        return steps.third_order(*arguments, times, T0)
    return sample(*arguments, step_table(times, T0, order)).double()


def test_third_order_carries_a_parabola_on_exactly():
    def clean(t):
        return torch.tensor(2 - 3 * t + 5 * t * t, dtype=torch.float64)

    degraded, noise = torch.randn(2, 4, dtype=torch.float64)
    # At t = 0 the result is the clean estimate there, carried on from the last three: 2 for a parabola, not for a line.
    second, third = (solution(clean, power_times(6, T0, 1.5), degraded, noise, order) for order in (2, 3))
    torch.testing.assert_close(third, torch.full_like(degraded, 2.0), atol=1e-12, rtol=0)
    assert (second - 2).abs().min() > 1e-3


def test_higher_order_comes_nearer_on_a_smooth_estimate():
    def clean(t):
        return torch.tensor(math.exp(-4 * t), dtype=torch.float64)

    degraded, noise = torch.randn(2, 4, dtype=torch.float64)
    errors = [(solution(clean, power_times(6, T0, 1.0), degraded, noise, order) - 1).abs().max() for order in (1, 2, 3)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_third_order_with_two_steps_is_the_second_order_sampler(mini, relative_rms):
    task = steps.load_task(mini, "rain", ["coffee"], 32)
    second, third = (steps.restore(mini, task, steps.Run("fast", 2, order)) for order in (2, 3))
    assert relative_rms(third, second) < 1e-5
    assert relative_rms(third, start_state(task.degraded, task.noise, task.prompt.t0)) > 1e-2


def test_more_steps_come_nearer_and_the_yardstick_counts(mini):
    task = steps.load_task(mini, "lowlight", ["coffee"], 32)
    chosen = [steps.Run("released", 20, 1), *(steps.Run("fast", n, 2) for n in (2, 4, 8))]
    rows = steps.sweep(mini, [task], chosen, 32)
    distances = [row["distance"] for row in rows]
    assert distances[1] > 2 * distances[2] > 3 * distances[3] > 0
    near = [row["as_near"] for row in steps.means(rows)]
    assert near == [int(distance <= distances[0]) for distance in distances]
    assert near[0] == 1
    assert near[1] == 0


def test_sharpness_is_one_for_the_clean_photo_and_less_when_blurred():
    clean = torch.rand(2, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(clean, 3, stride=1, padding=1)
    assert (steps.gradient_energy(blurred) < 0.5 * steps.gradient_energy(clean)).all()
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    assert steps.gradient_energy(ramp) == 1


def test_the_quick_form_writes_every_row(tmp_path, capsys):
    file = tmp_path / "steps.json"
    quality.main(["steps", "--quick", "--tasks", "blur", "--json", str(file)])
    text, result = capsys.readouterr().out, json.loads(file.read_text())
    assert {(row["schedule"], row["steps"]) for row in result["rows"]} >= {("released", 20), ("exact", 19), ("fast", 4)}
    assert {row["order"] for row in result["rows"]} == {1, 2, 3}
    assert len({row["t0_factor"] for row in result["rows"]}) == 2
    assert len(result["means"]) == len(result["rows"])
    assert all(math.isfinite(row[name]) for row in result["rows"] for name in ("psnr", "sharpness", "distance"))
    for word in ("sharpness", "x0.75", "1 of 1 tasks", result["commit"], version("torch")):
        assert word in text


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"power": 1.5, "t0_factor": 1.0, "psnr": 20.0, "sharpness": 0.5, "distance": 0.01}
    rows = [row | {"schedule": "released", "steps": 20, "order": 1}]
    rows += [row | {"schedule": "fast", "steps": n, "order": order, "distance": 0.1 / n} for n in (1, 4) for order in (1, 2)]
    steps.plot({"means": rows, "steps": (1, 4)}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [["--size", "100"], ["--photos", "0"], ["--tasks", "dust"]])
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        quality.main(["steps", *arguments])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
