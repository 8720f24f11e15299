"""Which way serves is timed once for a kind of call, kept, and never in the way of a run."""

import json
import time

import pytest

from ebr_engine.kernels import backend, tune

WORK = tune.LEAST


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder; calling it is the next process."""

    def process(asked="on"):
        monkeypatch.setattr(backend, "TUNE", asked)
        monkeypatch.setattr(tune, "_choices", {})
        monkeypatch.setattr(tune, "_spent", 0.0)
        tune._read.cache_clear()

    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    process()
    yield process
    tune._read.cache_clear()


@pytest.fixture
def ways():
    """Two ways, and how often each ran: the second one is faster."""
    runs = {"slow": 0, "fast": 0}

    def way(name, seconds):
        def run():
            runs[name] += 1
            started = time.thread_time()
            while time.thread_time() - started < seconds:
                pass

        return run

    return {"slow": way("slow", 0.02), "fast": way("fast", 0.001)}, runs


def test_the_fastest_way_is_found_once_and_kept(fresh, ways, tmp_path):
    given, runs = ways
    assert tune.chosen("sum", ("float32", 3), WORK, given) == "fast"
    before = dict(runs)
    assert tune.chosen("sum", ("float32", 3), WORK, given) == "fast"
    fresh()
    assert tune.chosen("sum", ("float32", 3), WORK, given) == "fast"
    assert runs == before
    assert json.loads((tmp_path / "cache" / tune.FILE).read_text())
    assert tune.summary()["sum"]["float32, 3"].startswith("fast (fast ")


def test_another_kind_is_timed_by_itself(ways):
    given, runs = ways
    tune.chosen("sum", ("float32",), WORK, given)
    before = dict(runs)
    tune.chosen("sum", ("bfloat16",), WORK, given)
    assert runs["fast"] > before["fast"]


def test_a_way_that_hardly_gains_does_not_displace_the_first(monkeypatch, ways):
    monkeypatch.setattr(tune, "timed", lambda ways: {"slow": 1.02, "fast": 1.0})
    assert tune.chosen("sum", (), WORK, ways[0]) == "slow"


@pytest.mark.parametrize(("asked", "work"), [("off", WORK), ("on", WORK - 1)])
def test_off_and_small_calls_take_the_first_way_untimed(fresh, ways, asked, work):
    fresh(asked)
    assert tune.chosen("sum", (), work, ways[0]) == "slow"
    assert ways[1] == {"slow": 0, "fast": 0}


def test_again_times_anew(fresh, ways, monkeypatch):
    tune.chosen("sum", (), WORK, ways[0])
    fresh("again")
    monkeypatch.setattr(tune, "timed", lambda ways: {"slow": 1.0, "fast": 2.0})
    assert tune.chosen("sum", (), WORK, ways[0]) == "slow"
    fresh()
    assert tune.chosen("sum", (), WORK, ways[0]) == "slow"


def test_no_process_spends_more_than_its_budget(ways, monkeypatch):
    monkeypatch.setattr(tune, "_budget", 0.001)
    assert tune.chosen("sum", (1,), WORK, ways[0]) == "fast"
    assert tune.chosen("sum", (2,), WORK, ways[0]) == "slow"


def test_another_number_of_threads_is_another_machine(ways, monkeypatch):
    tune.chosen("sum", (), WORK, ways[0])
    monkeypatch.setattr(tune.torch, "get_num_threads", lambda: 77)
    assert tune.summary() == {}


def test_a_way_that_is_new_is_timed_beside_the_others(fresh, ways):
    given, runs = ways
    assert tune.chosen("sum", (), WORK, given) == "fast"
    fresh()
    assert tune.chosen("sum", (), WORK, given | {"faster": lambda: None}) == "faster"
    fresh()
    before = dict(runs)
    assert tune.chosen("sum", (), WORK, given) in given  # and one that is gone is not taken
    assert runs != before


def test_a_long_process_takes_more_time_to_choose(ways, monkeypatch):
    monkeypatch.setattr(tune, "_budget", tune.BUDGET)
    monkeypatch.setattr(tune, "_spent", tune.BUDGET)
    assert tune.chosen("sum", (1,), WORK, ways[0]) == "slow"
    tune.for_long()
    assert tune.chosen("sum", (1,), WORK, ways[0]) == "fast"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', ""])
def test_a_damaged_file_is_made_anew(ways, tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / tune.FILE).write_text(content)
    assert tune.chosen("sum", (), WORK, ways[0]) == "fast"
    assert len(json.loads((tmp_path / "cache" / tune.FILE).read_text())) == 1


def test_a_folder_that_cannot_be_written_to_is_no_error(ways, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    assert tune.chosen("sum", (), WORK, ways[0]) == "fast"


def test_choices_belong_to_a_build_of_the_native_code(ways, monkeypatch):
    tune.machine.cache_clear()
    tune.chosen("sum", (), WORK, ways[0])
    tune.machine.cache_clear()
    monkeypatch.setattr(backend, "native_build", lambda: "another")
    assert tune.summary() == {}
    tune.machine.cache_clear()
