"""States, targets, schedules and step tables against the formulas of the method, written here a second time."""

import numpy as np
import pytest
import torch

from ebr_engine.backbones.registry import spec
from ebr_engine.bridge.process import PROCESSES, bridge_coefficients, ddbm_state, naive_state, start_state, training_state
from ebr_engine.bridge.sampler import make_table, step_table
from ebr_engine.bridge.schedules import exact_times, power_times, released_times

STEPS = [(0.4, 0.3, 0.4), (0.31, 0.02, 0.4), (0.1, 1e-4, 0.4), (0.7, 0.35, 0.7), (0.08, 0.0, 0.15), (0.4, 0.0, 0.4)]


def latents(batch=3):
    """Clean, degraded and noise [B, 4, 2, 3, 5] float64."""
    return torch.randn(3, batch, 4, 2, 3, 5, dtype=torch.float64).unbind()


def weights(t, t0):
    """(a, A) as the design writes them."""
    return (1 - t) * (1 - t / t0), (1 - t) * t / t0


def single_step(t, s, t0, order=1, before=None):
    """The table row from t to s: in a run that starts there, or (for a slope) one that was at `before` first."""
    times = tuple(x for x in (before, t, s) if x is not None) + ((0.0,) if s else ())
    return step_table(times, t0, order).coefficients[0 if before is None else 1].double()


def apply(row, x, velocity, degraded, change=0.0):
    return row[0] * x + row[1] * velocity + row[2] * degraded + row[3] * change


@pytest.mark.parametrize("t0", [0.15, 0.4, 0.9])
def test_coefficients_go_from_the_clean_latent_to_the_degraded_one(t0):
    t = torch.linspace(0, t0, 7, dtype=torch.float64)
    a, b = bridge_coefficients(t, t0)
    for values, expected in zip((a, b), weights(t, t0)):
        torch.testing.assert_close(values, expected)
    torch.testing.assert_close(a + b, 1 - t)  # flow matching's share of a latent
    assert (a[0], b[0]) == (1, 0)
    assert a[-1] == 0


@pytest.mark.parametrize(("t", "s", "t0"), STEPS)
def test_a_first_order_step_keeps_the_noise_and_moves_along_the_bridge(t, s, t0):
    clean, degraded, x = latents()
    velocity = (x - clean) / t  # so that the clean estimate is `clean`
    (a, b), (a_s, b_s) = weights(t, t0), weights(s, t0)
    noise = (x - a * clean - b * degraded) / t
    expected = a_s * clean + b_s * degraded + s * noise
    # Coefficients are rounded to float32, and 1/t multiplies the velocity's.
    atol = 8 * torch.finfo(torch.float32).eps * velocity.abs().max().item() * t
    torch.testing.assert_close(apply(single_step(t, s, t0), x, velocity, degraded), expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("t", "s", "t0"), STEPS)
def test_a_first_order_step_is_the_released_formula(t, s, t0):
    clean = 1 - s / t + s * (s - t) / t0
    expected = torch.tensor([s / t + clean, -t * clean, s * (t - s) / t0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(single_step(t, s, t0), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("t", "s", "t0"), [step for step in STEPS if step[1] > 0])
def test_the_second_order_term_integrates_a_linear_clean_estimate(t, s, t0):
    # dx/dτ = a'D + A'Y + (x − aD − AY)/τ; with D(τ) = D_t + m(τ − t), m adds ∫ (s/τ)(a' − a/τ)(τ − t) dτ from t to s.
    a = np.polynomial.Polynomial([1, -1 - 1 / t0, 1 / t0])
    nodes, shares = np.polynomial.legendre.leggauss(200)
    tau = np.exp((np.log(s) * (1 + nodes) + np.log(t) * (1 - nodes)) / 2)  # even in log τ, as s/τ² wants
    integrand = s / tau * (a.deriv()(tau) - a(tau) / tau) * (tau - t)
    bracket = float((shares * integrand * tau).sum() * np.log(s / t) / 2)
    before = t + 0.07
    row = single_step(t, s, t0, order=2, before=before)
    torch.testing.assert_close(row[3].item(), bracket / (t - before), rtol=1e-6, atol=1e-9)
    assert torch.equal(row[:3], single_step(t, s, t0)[:3])


def test_the_last_second_order_step_extrapolates_the_clean_estimate_to_zero():
    before, t = 0.3, 0.12
    row = single_step(t, 0.0, 0.4, order=2, before=before)
    torch.testing.assert_close(row[3].item(), -t / (t - before), rtol=1e-6, atol=0)


def test_the_first_step_of_a_second_order_run_is_first_order():
    one, two = (make_table("uniform", 0.4, 6, order).coefficients for order in (1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[:, :3], two[:, :3])
    assert (one[:, 3] == 0).all()
    assert (two[1:, 3] != 0).all()


@pytest.mark.parametrize("t0", [0.15, 0.4])
def test_a_training_state_and_its_target_give_the_clean_latent(t0):
    clean, degraded, noise = latents()
    t = torch.tensor([1e-3, 0.3 * t0, t0], dtype=torch.float64)
    state, target = training_state(clean, degraded, noise, t, t0)
    wide = t.view(-1, 1, 1, 1, 1)
    a, b = weights(wide, t0)
    torch.testing.assert_close(state, a * clean + b * degraded + wide * noise)
    torch.testing.assert_close(state - wide * target, clean)
    torch.testing.assert_close(target, (noise - clean) + (1 - wide) / t0 * (degraded - clean), rtol=1e-9, atol=1e-9)


def test_training_ends_where_sampling_starts():
    clean, degraded, noise = latents()
    state, _ = training_state(clean, degraded, noise, torch.full((3,), 0.4, dtype=torch.float64), 0.4)
    torch.testing.assert_close(state, start_state(degraded, noise, 0.4))
    torch.testing.assert_close(state, 0.6 * degraded + 0.4 * noise)


def test_the_naive_process_is_flow_matching_and_never_sees_the_degraded_latent():
    clean, degraded, noise = latents()
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    state, target = naive_state(clean, degraded, noise, t, 0.4)
    torch.testing.assert_close(state[0], clean[0])
    torch.testing.assert_close(state[1], 0.75 * clean[1] + 0.25 * noise[1])
    torch.testing.assert_close(state[2], noise[2])
    torch.testing.assert_close(target, noise - clean)
    assert torch.equal(naive_state(clean, degraded * 7, noise, t, 0.4)[0], state)


def test_the_ddbm_bridge_is_pinned_at_both_ends():
    clean, degraded, noise = latents(2)
    t = torch.tensor([1e-9, 0.4], dtype=torch.float64)
    state, _ = ddbm_state(clean, degraded, noise, t, 0.4)
    torch.testing.assert_close(state[0], clean[0], atol=1e-7, rtol=0)
    torch.testing.assert_close(state[1], 0.6 * degraded[1], atol=1e-7, rtol=0)  # √(1 − r) of r rounded: 1e-8


def test_the_ddbm_bridge_between_its_ends_is_table_1_of_the_paper():
    clean, degraded, noise = latents(1)
    t, t0 = 0.17, 0.4
    state, target = ddbm_state(clean, degraded, noise, torch.tensor([t], dtype=torch.float64), t0)
    alpha, sigma, alpha_end, sigma_end = 1 - t, t, 1 - t0, t0
    ratio = (alpha_end / sigma_end) ** 2 / (alpha / sigma) ** 2  # SNR_T / SNR_t
    end = alpha_end * degraded
    mean = ratio * alpha / alpha_end * end + alpha * (1 - ratio) * clean
    torch.testing.assert_close(state, mean + sigma * (1 - ratio) ** 0.5 * noise)
    torch.testing.assert_close(state - t * target, clean)


def test_processes_are_called_alike_and_differ():
    clean, degraded, noise = latents()
    t = torch.full((3,), 0.2, dtype=torch.float64)
    states = [process(clean, degraded, noise, t, 0.4)[0] for process in PROCESSES.values()]
    assert sorted(PROCESSES) == ["ddbm", "ebr", "naive"]
    assert all((x - y).abs().max() > 0.1 for i, x in enumerate(states) for y in states[:i])


def test_released_times_end_with_an_evaluation_at_t_min():
    times = released_times(20, 0.4, 1e-4)
    assert len(times) == 21
    np.testing.assert_allclose(times, [*np.linspace(0.4, 1e-4, 20), 0.0], rtol=1e-12)
    assert exact_times(20, 0.4, 1e-4) == (*times[:-2], 0.0)


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
def test_power_times(power):
    expected = [0.4 * (1 - i / 5) ** power for i in range(6)]
    np.testing.assert_allclose(power_times(5, 0.4, power), expected, rtol=1e-12)
    assert power_times(5, 0.4, power)[0] == 0.4


@pytest.mark.parametrize(
    ("schedule", "default", "order", "times"),
    [
        ("fast", 5, 2, lambda n: power_times(n, 0.4, 1.65)),
        ("uniform", 5, 2, lambda n: power_times(n, 0.4)),
        ("released", 20, 1, lambda n: released_times(n, 0.4, 1e-4)),
        ("exact", 19, 1, lambda n: exact_times(n + 1, 0.4, 1e-4)),
    ],
)
def test_each_schedule_has_its_defaults_and_counts_evaluations(schedule, default, order, times):
    for steps, wanted in ((None, default), (3, 3)):
        table = make_table(schedule, 0.4, steps)
        assert len(table) == wanted
        assert table.t0 == 0.4
        assert table.times == times(wanted)
        assert table.coefficients.shape == (wanted, 4)
        assert table.coefficients.dtype == torch.float32
    assert bool((make_table(schedule, 0.4).coefficients[:, 3] != 0).any()) == (order == 2)
    for forced in (1, 2):
        expected = step_table(table.times, 0.4, forced).coefficients
        assert torch.equal(make_table(schedule, 0.4, 3, forced).coefficients, expected)


def test_a_run_of_one_step_returns_the_clean_estimate():
    for schedule in ("fast", "uniform", "exact"):
        table = make_table(schedule, 0.4, 1)
        assert table.times == (0.4, 0.0)
        torch.testing.assert_close(table.coefficients, torch.tensor([[1.0, -0.4, 0.0, 0.0]]))


def test_released_timesteps_are_those_the_authors_code_feeds():
    times = released_times(20, 0.4, 1e-4)
    for backbone, first, last in (("wan", [399, 378, 357], [20, 0]), ("flux", [400, 379, 358], [21, 1])):
        fed = spec(backbone).released_timesteps(times).tolist()
        assert len(fed) == 20
        assert fed[:3] == first
        assert fed[-2:] == last


@pytest.mark.parametrize("steps", [2, 6, 33, 999])
def test_released_timesteps_look_up_the_nearest_of_a_thousand_entries(steps):
    times = released_times(steps, 0.397)
    entries = np.arange(1, 1001)
    for backbone, sigma, timestep in (("wan", 0.000999, np.floor(0.999 * entries)), ("flux", 0.001, entries)):
        nearest = np.abs(np.array(times[:-1])[:, None] - sigma * entries).argmin(axis=1)
        assert spec(backbone).released_timesteps(times).tolist() == timestep[nearest].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quick", 0.4), "unknown schedule 'quick'; choose one of fast, released, exact, uniform"),
        (("fast", 0.0), "t0 must lie between 0 and 1, got 0.0"),
        (("fast", 1.0), "t0 must lie between 0 and 1, got 1.0"),
        (("fast", float("nan")), "t0 must lie between 0 and 1, got nan"),
        (("fast", 0.4, 0), "the fast schedule cannot have 0 steps"),
        (("uniform", 0.4, -3), "the uniform schedule cannot have -3 steps"),
        (("exact", 0.4, 0), "the exact schedule cannot have 0 steps"),
        (("released", 0.4, 1), "the released schedule cannot have 1 steps"),
        (("fast", 0.4, 5, 3), "order must be 1 or 2, got 3"),
    ],
)
def test_impossible_tables_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        make_table(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("times", [(), (0.0,), (0.4,), (0.4, 0.1), (0.4, 0.4, 0.0), (0.2, 0.4, 0.0)])
def test_times_that_do_not_decrease_to_zero_are_refused(times):
    with pytest.raises(ValueError, match="times must decrease to 0, got"):
        step_table(times, 0.4)
