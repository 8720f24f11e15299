"""The memory model holds against measured peaks: every setting within a fifth, each in a process of its own."""

import pytest

from benchmarks.memory import CASES, run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_predicted_is_measured_within_a_fifth(case):
    assert run(case)["ratio"] == pytest.approx(1, abs=0.2)
