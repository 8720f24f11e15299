"""Recorded functions are fed, kept and dropped as they should be; tested on graphs that replay by calling again."""

import pytest
import torch

from ebr_engine.engine.execute import GraphError, Graphs


class CallAgain:
    """Records on any device: a replay calls the function and rewrites the result, as a CUDA graph would."""

    def __init__(self):
        self.warmed = self.recorded = self.replayed = 0

    def __call__(self, function, warm):
        warm()
        self.warmed += 1
        result = torch.empty_like(function())
        self.recorded += 1

        def replay():
            self.replayed += 1
            result.copy_(function())

        return replay, result


@pytest.fixture
def recorder():
    return CallAgain()


def double(x):
    return 2 * x


def test_a_function_is_recorded_once_and_fed_with_every_call(recorder):
    graphs = Graphs(recorder)
    inputs = [torch.randn(3) for _ in range(4)]
    results = [graphs.run("double", (x,), double, double) for x in inputs]
    for x, result in zip(inputs, results):  # results are the callers' own: later replays do not change them
        assert torch.equal(result, 2 * x)
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (1, 1, 4)


def test_inputs_of_any_strides_are_taken_and_left_alone(recorder):
    graphs = Graphs(recorder)
    wide = torch.randn(1, 3).expand(4, 3)
    for x in (wide, torch.randn(3, 4).t(), torch.randn(4, 3)):
        before = x.clone()
        assert torch.equal(graphs.run("double", (x,), double, double), 2 * x)
        assert torch.equal(x, before)
    assert recorder.recorded == 1


def test_the_least_recently_used_key_goes_first(recorder):
    graphs = Graphs(recorder, most=2)
    for key in "abaca":  # b goes when c comes
        graphs.run(key, (torch.ones(1),), double, double)
    assert recorder.recorded == 3
    graphs.run("b", (torch.ones(1),), double, double)
    assert recorder.recorded == 4
    graphs.run("a", (torch.ones(1),), double, double)
    assert (recorder.recorded, len(graphs)) == (4, 2)


def test_parts_of_a_key_stay_and_go_together(recorder):
    graphs = Graphs(recorder, most=1)
    for _ in range(2):
        for part in range(5):
            assert graphs.run("a", (torch.ones(1),), lambda x, n=part: x + n, double, part=part) == 1 + part
    assert (recorder.recorded, len(graphs)) == (5, 5)
    graphs.run("b", (torch.ones(1),), double, double)
    assert len(graphs) == 1


def test_what_a_graph_reads_lives_as_long_as_it(recorder):
    import gc
    import weakref

    class Tables:
        pass

    graphs, tables = Graphs(recorder, most=1), Tables()
    seen = weakref.ref(tables)
    graphs.run("a", (torch.ones(1),), double, double, reads=tables)
    del tables
    gc.collect()
    assert seen() is not None
    graphs.run("b", (torch.ones(1),), double, double)
    gc.collect()
    assert seen() is None


def test_a_function_that_cannot_be_recorded_says_so_and_leaves_nothing(recorder):
    graphs = Graphs(recorder)

    def broken(x):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(GraphError, match="not permitted"):
        graphs.run("a", (torch.ones(1),), broken, double)
    assert len(graphs) == 0
    assert graphs.run("a", (torch.ones(1),), double, double) == 2
