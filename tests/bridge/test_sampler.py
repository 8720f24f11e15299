"""The fixed-step loop: exact on an exact model, convergent with its order, and the same whatever the batch."""

import numpy as np
import pytest
import torch

from ebr_engine.bridge.process import start_state
from ebr_engine.bridge.sampler import StepTable, draw_noise, make_table, mean_velocity, place, sample, step_table
from ebr_engine.bridge.schedules import SCHEDULES, released_times

EPS = torch.finfo(torch.float32).eps
T0 = 0.4


def elementwise(state, t):
    """A nonlinear stand-in for a trunk that sees one value at a time; its conditioning is the time."""
    return torch.tanh(2 * state) + t


def run(trunk, degraded, noise, table, **options):
    """Sample with the evaluation times as conditioning."""
    return sample(trunk, table.times[:-1], degraded, noise, table, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [2, 3, 7, 20, 60])
def test_an_oracle_returns_the_clean_latent_at_any_number_of_steps(schedule, order, steps):
    clean, degraded, noise = torch.randn(3, 2, 4, 1, 5, 3).unbind()
    table = make_table(schedule, T0, steps, order)
    restored = run(lambda state, t: (state - clean) / t, degraded, noise, table)
    # The result is the last clean estimate, x − t·v, with |x| < 5; second order adds a difference of two of them.
    assert (restored - clean).abs().max() < 8 * EPS * 5
    assert (degraded - clean).abs().max() > 1


class Mixture:
    """X0 from two Gaussians given Y, so that E[X0 | X_t] under the bridge is known; one dimension, float64.

    X_t given X0 is Gaussian with mean a·X0 + A·Y and standard deviation t. The sampler's ODE keeps the marginals and cannot
    cross its own paths, so it takes the noise's p-quantile at T0 to X0's p-quantile at 0: the exact solution.
    """

    share = torch.tensor([0.35, 0.65], dtype=torch.float64)
    mean = torch.tensor([-1.0, 0.8], dtype=torch.float64)
    deviation = torch.tensor([0.35, 0.25], dtype=torch.float64)
    degraded = 0.3

    def velocity(self, state, t):
        a, b = (1 - t) * (1 - t / T0), (1 - t) * t / T0
        seen = state.double().unsqueeze(-1) - b * self.degraded - a * self.mean
        variance = a**2 * self.deviation**2 + t**2
        likely = (self.share.log() - variance.log() / 2 - seen**2 / variance / 2).softmax(-1)
        clean = (likely * (self.mean + a * self.deviation**2 * seen / variance)).sum(-1)
        return (state.double() - clean) / t

    def solution(self, noise):
        wanted = torch.special.ndtr(noise)
        low, high = torch.full_like(noise, -4), torch.full_like(noise, 4)
        for _ in range(60):
            middle = (low + high) / 2
            below = (self.share * torch.special.ndtr((middle.unsqueeze(-1) - self.mean) / self.deviation)).sum(-1)
            low, high = torch.where(below < wanted, middle, low), torch.where(below < wanted, high, middle)
        return (low + high) / 2

    def error(self, steps, order):
        """RMS error of a uniform run over 101 quantiles of the noise."""
        noise = torch.special.ndtri((torch.arange(101, dtype=torch.float64) + 0.5) / 101)
        restored = run(self.velocity, torch.full_like(noise, self.degraded), noise, make_table("uniform", T0, steps, order))
        return (restored - self.solution(noise)).square().mean().sqrt().item()


# Before these ranges the largest step is too long for the expansion that an order is proven by (the mixture's narrow
# component has a time scale of about 0.25·T0); after them the float32 state's rounding, about 1e-6, would be in the fit.
@pytest.mark.parametrize(("order", "steps", "slope"), [(1, (16, 32, 64, 128), 0.9), (2, (32, 64, 128, 256), 1.8)])
def test_the_error_falls_with_the_proven_order(order, steps, slope):
    errors = [Mixture().error(n, order) for n in steps]
    fitted = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope <= fitted <= order + 0.2, f"slope {fitted:.2f}, errors {errors}"


def test_many_steps_reach_the_exact_solution():
    assert Mixture().error(1024, 2) < 1e-5
    assert Mixture().error(1024, 1) < 1.5e-3
    assert Mixture().error(4, 1) > 0.05  # so the solution is not trivially near


def test_second_order_is_nearer_with_few_steps():
    assert Mixture().error(16, 2) < Mixture().error(16, 1) / 3


@pytest.mark.parametrize("order", [1, 2])
def test_a_run_is_the_steps_of_its_table(order):
    degraded, noise = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind()
    table = make_table("fast", T0, 4, order)
    x, before = start_state(degraded, noise, T0), torch.zeros_like(degraded)
    for t, (c0, c1, c2, c3) in zip(table.times, table.coefficients.double().tolist()):
        velocity = elementwise(x, t)
        clean = x - t * velocity
        x, before = c0 * x + c1 * velocity + c2 * degraded + c3 * (clean - before), clean
    torch.testing.assert_close(run(elementwise, degraded, noise, table), x.float(), atol=1e-5, rtol=0)


def test_the_state_is_float32_whatever_the_trunk_and_the_latents_are():
    seen = []

    def trunk(state, t):
        seen.append(state.dtype)
        return elementwise(state, t).bfloat16()

    for dtype in (torch.bfloat16, torch.float64):
        degraded, noise = torch.randn(2, 1, 3, 4, dtype=dtype).unbind()
        assert run(trunk, degraded, noise, make_table("fast", T0)).dtype == torch.float32
    assert seen == [torch.float32] * 10


@pytest.mark.parametrize("schedule", ["fast", "released"])
def test_a_result_is_deterministic_and_independent_of_the_batch(schedule):
    degraded = torch.randn(5, 4, 1, 3, 7)
    table = make_table(schedule, T0)
    whole = run(elementwise, degraded, draw_noise(degraded.shape, 42), table)
    assert torch.equal(whole, run(elementwise, degraded, draw_noise(degraded.shape, 42), table))
    for i in range(5):
        alone = run(elementwise, degraded[i : i + 1], draw_noise((1, 4, 1, 3, 7), 42), table)
        torch.testing.assert_close(alone[0], whole[i], atol=1e-6, rtol=1e-6)
    assert (whole - run(elementwise, degraded, draw_noise(degraded.shape, 43), table)).abs().max() > 0.01


def test_inputs_are_not_changed_and_no_graph_is_kept():
    degraded, noise = torch.randn(2, 2, 3, requires_grad=True).unbind()
    copies = degraded.detach().clone(), noise.detach().clone()
    assert not run(elementwise, degraded, noise, make_table("fast", T0)).requires_grad
    assert torch.equal(degraded, copies[0])
    assert torch.equal(noise, copies[1])


def test_the_callback_hears_of_every_evaluation():
    heard = []
    degraded, noise = torch.randn(2, 1, 3).unbind()
    run(elementwise, degraded, noise, make_table("fast", T0, 4), callback=lambda *progress: heard.append(progress))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_each_step_gets_its_own_conditioning():
    seen = []

    def trunk(state, step):
        seen.append(step)
        return state

    sample(trunk, ["a", "b", "c"], torch.randn(1, 2), torch.randn(1, 2), make_table("uniform", T0, 3))
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize("length", [0, 4, 6])
def test_a_conditioning_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"the conditioning has {length} steps, the step table 5"):
        sample(elementwise, [0.1] * length, torch.randn(1, 2), torch.randn(1, 2), make_table("fast", T0))


def test_the_last_released_evaluation_hardly_matters_to_a_smooth_model():
    degraded, noise = torch.randn(2, 1, 8, 1, 6, 6).unbind()
    released = step_table(released_times(20, T0), T0)
    restored, shorter = (run(elementwise, degraded, noise, table) for table in (released, make_table("exact", T0)))
    assert 0 < (restored - shorter).norm() / restored.norm() < 1e-4


def test_noise_means_the_same_for_a_seed_whatever_the_batch():
    one, four = draw_noise((1, 16, 2, 6, 5), 42), draw_noise((4, 16, 2, 6, 5), 42)
    assert four.shape == (4, 16, 2, 6, 5)
    assert four.dtype == torch.float32
    assert all(torch.equal(row, one[0]) for row in four)
    assert not torch.equal(one, draw_noise((1, 16, 2, 6, 5), 43))


def test_noise_is_the_cpu_generators_and_leaves_the_global_one_alone():
    expected = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(7))
    before = torch.get_rng_state()
    assert torch.equal(draw_noise((1, 4, 3, 5), 7), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal():
    noise = draw_noise((1, 100_000), 0)
    assert abs(noise.mean()) < 4 / 100_000**0.5
    assert abs(noise.std() - 1) < 4 / 200_000**0.5


def test_mixed_velocities_are_averaged_a_step():
    trunk = mean_velocity(lambda state, scale: scale * state)
    state = torch.randn(2, 3)
    torch.testing.assert_close(trunk(state, (1.0, 2.0, 6.0)), 3 * state)


def test_a_placed_table_is_the_table():
    degraded, noise = torch.randn(2, 1, 8, 1, 3, 5).unbind()
    for schedule in SCHEDULES:
        table = make_table(schedule, T0)
        assert torch.equal(run(elementwise, degraded, noise, table), sample_placed(degraded, noise, table))


def sample_placed(degraded, noise, table):
    return sample(elementwise, table.times[:-1], degraded, noise, place(table, "cpu"))


def test_differences_may_look_back_any_number_of_steps():
    degraded, noise = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind()
    times = (0.4, 0.3, 0.2, 0.1, 0.0)
    numbers = torch.tensor([[1, -0.1, 0, 0, 0], [0.9, 0, 0.1, 0.3, 0], [0.8, 0.1, 0, 0, 0.2], [1, -0.1, 0.2, 0.5, -0.4]])
    x, cleans = start_state(degraded, noise, 0.4), []
    for t, row in zip(times, numbers.double().tolist()):
        velocity = elementwise(x, t)
        cleans.append(x - t * velocity)
        x = row[0] * x + row[1] * velocity + row[2] * degraded
        for k, number in enumerate(row[3:]):
            x = x + (number * (cleans[-1 - k] - cleans[-2 - k]) if number else 0)
    placed = place(StepTable(0.4, times, numbers), "cpu")
    assert placed.remembered == (True, True, True, True)
    assert placed.history == 2
    torch.testing.assert_close(run(elementwise, degraded, noise, placed.table), x.float(), atol=1e-5, rtol=0)


def test_estimates_that_nothing_looks_back_to_are_not_kept():
    numbers = torch.tensor([[1, -0.1, 0, 0], [1, -0.1, 0, 0], [1, -0.1, 0, 0.5], [1, -0.1, 0, 0]])
    assert place(StepTable(0.4, (0.4, 0.3, 0.2, 0.1, 0.0), numbers), "cpu").remembered == (False, True, True, False)
    assert not any(place(make_table("released", T0), "cpu").remembered)
