"""Functions of tensors recorded once as a graph and replayed: CUDA graphs, and what keeps and feeds them.

A graph reads its inputs from fixed places, into which a replay's are copied first; it rewrites one result. All graphs take
their intermediates from one memory pool and share the weights they read. Nothing here waits for the device.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

KEPT = 8  # graphs; a shape that comes back later is recorded again


class GraphError(RuntimeError):
    """A function that could not be recorded; the cause is what it failed with."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A recorded function: where its inputs lie, what it leaves its result in, and what else it reads."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    result: Tensor
    reads: object  # kept alive with the graph


class Recorder(Protocol):
    """Records `function()`; `warm()` meets every kernel of it first. Gives the replay and the tensor that it writes."""

    def __call__(self, function: Callable[[], Tensor], warm: Callable[[], object]) -> tuple[Callable[[], None], Tensor]: ...


class Graphs:
    """Recorded functions by key; those of at most `most` keys are kept, and the least recently used go first."""

    def __init__(self, record: Recorder, most: int = KEPT):
        self.record, self.most = record, most
        self._kept: OrderedDict[Hashable, dict[Hashable, Graph]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def run(
        self,
        key: Hashable,
        inputs: Sequence[Tensor],
        function: Callable[..., Tensor],
        warm: Callable[..., object],
        reads: object = None,
        part: Hashable = None,
    ) -> Tensor:
        """`function(*inputs)`, recorded when key and part are new: together they mean one function and one shape for ever.

        The parts of a key are kept and dropped together. `warm(*inputs)` runs the same kernels, if fewer of them; `reads` is
        kept as long as the graph. The result is a tensor of the caller's own. Raises `GraphError` when recording fails.
        """
        graph = self._kept.get(key, {}).get(part)
        if graph is None:
            graph = self._recorded(inputs, function, warm, reads, key, part)
        else:
            self._kept.move_to_end(key)
            for place, value in zip(graph.inputs, inputs):
                place.copy_(value)
        graph.replay()
        return graph.result.clone()

    def _recorded(
        self,
        inputs: Sequence[Tensor],
        function: Callable[..., Tensor],
        warm: Callable[..., object],
        reads: object,
        key: Hashable,
        part: Hashable,
    ) -> Graph:
        while key not in self._kept and len(self._kept) >= self.most:  # before the new one needs the memory
            self._kept.popitem(last=False)
        places = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in inputs)
        try:
            replay, result = self.record(lambda: function(*places), lambda: warm(*places))
        except Exception as error:  # a capture can fail in as many ways as there are kernels
            raise GraphError(str(error)) from error
        graph = Graph(places, replay, result, reads)
        self._kept.setdefault(key, {})[part] = graph
        self._kept.move_to_end(key)
        return graph


class CudaRecorder:
    """Records on a CUDA device; all graphs of a recorder allocate from one pool, and must not run at the same time.

    The pool may be shared although graphs are replayed in any order: inputs lie outside of it, results are kept by their
    graphs, and what is between is written anew by each replay.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = None

    def __call__(self, function: Callable[[], Tensor], warm: Callable[[], object]) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):  # kernels are compiled, libraries set up: what no capture may hold
                warm()
            current.wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = function()
        return graph.replay, result
