"""What a worker of `ebr-engine restore --cluster` holds: a loaded restorer that whole files and chunks of clips are given to.

A worker sees nothing of the driver's disk. A picture or a sound comes as the bytes of its file and goes back as those of the
result, finished; a chunk comes and goes as pixels. Prompt files that were named come with it; a model is found here by its name.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.jobs.files import Job
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.progress import Progress
from ebr_engine.request import RestoreRequest
from ebr_engine.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from ebr_engine.jobs.recipe import Recipe


@dataclass(frozen=True)
class Planned:
    """A plan by what it was asked for: each worker makes its own."""

    task: str | None
    prompt: tuple[tuple[Any, float], ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Facts:
    """What a driver has to know of the model that its workers have loaded."""

    version: str
    backbone: str
    asks_per_frame: bool
    released_size: tuple[int, int] | None


@dataclass(frozen=True)
class FileUnit:
    """A picture or a sound to restore, whole."""

    source: str  # the driver's paths, for people
    target: str
    compare: str | None
    content: bytes
    request: RestoreRequest
    named_task: str | None


@dataclass(frozen=True)
class Made:
    """What became of a file: the contents of its outputs by the driver's paths, and what was said."""

    outcome: Outcome  # of the job as the worker saw it, its texts with the driver's paths
    contents: dict[str, bytes]
    said: tuple[tuple[str, str], ...]  # kind and text of lines for people


class RestoreWorker:
    """`request`: the model and how it runs; `prompts`: contents of prompt files by the driver's path; computes with `threads`."""

    def __init__(self, request: RestoreRequest, prompts: Mapping[str, bytes], threads: int):
        from ebr_engine import settings

        settings.wait_asleep()
        import torch

        from ebr_engine.engine.restorer import Restorer
        from ebr_engine.jobs.recipe import Recipes

        torch.set_num_threads(threads)
        self._folder = tempfile.TemporaryDirectory(prefix="ebr-worker-")
        self._prompts = {}
        for index, (path, content) in enumerate(prompts.items()):
            self._prompts[path] = Path(self._folder.name, f"prompt-{index}-{Path(path).name}")
            self._prompts[path].write_bytes(content)
        self.restorer = Restorer.from_request(request)
        self._recipes = Recipes(self.restorer)
        self._plans: dict[Planned, Any] = {}
        self._compute = ThreadPoolExecutor(1, "compute")  # one file is read or written while another is computed

    def facts(self) -> Facts:
        """What the driver has to know."""
        from ebr_engine.backbones.base import Spec

        spec: Spec = self.restorer.backbone.spec
        return Facts(__version__, self.restorer.backbone.name, self.restorer.asks_per_frame, spec.released_size)

    def expect(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Sizes of all pictures of the run, so that the same are compiled for as in one process."""
        self.restorer.expect(sizes)

    def need(self, sizes: Sequence[tuple[int, int]], clips: bool) -> int:
        """Bytes of main memory for pictures of these sizes and, where there are clips, for a chunk of the usual size.

        What the process holds after loading, and on a CPU what the memory model adds for the largest run.
        """
        from ebr_engine.engine.memory import choose, peak

        engine, spec = self.restorer.engine, self.restorer.backbone.spec
        held = _resident()
        if engine.costs.cuda:
            return held
        most = 0
        shapes = [(1, 1, *size) for size in set(sizes)] + ([(1, spec.chunk[0], *spec.native_size)] if clips or not sizes else [])
        for batch, frames, height, width in shapes:
            ways, work = engine.fallbacks((batch, spec.colours, frames, height, width), None, None, "latent")
            most = max(most, peak(engine.costs, ways[choose(ways, engine.costs, work, engine.fitting.limit)], work))
        return held + max(0, most - engine.costs.trunk - engine.costs.codec)

    def plan(self, planned: Planned) -> None:
        """Make a plan; `EbrError` for what the backbone cannot meet."""
        self._plan(planned)

    def tile_size(self, tile: int | None, overlap: int | None) -> tuple[int, int]:
        """As `Restorer.tile_size`."""
        return self.restorer.tile_size(tile, overlap)

    def chunk_size(self, asked: tuple, options: dict[str, Any]) -> tuple[int, int]:
        """As `Restorer.chunk_size`, its plan a `Planned`."""
        own = [self._plan(each) if isinstance(each, Planned) else each for each in asked]
        return self.restorer.chunk_size(*own, **options)

    def frames(self, count: int) -> int:
        """Frames that the model takes, not less than `count`."""
        return self.restorer.codec.frames(count)

    def diagnose(self, pictures: Sequence[Any]) -> Any:
        """As `Restorer.diagnose`."""
        return self.restorer.diagnose(pictures)

    def estimate(self, expected: Sequence[tuple[tuple[int, int], Planned, dict[str, Any]]]) -> float | None:
        """As `Restorer.estimate`, for this worker alone."""
        return self._run(self.restorer.estimate, [(size, self._plan(planned), how) for size, planned, how in expected])

    def chunk(self, pixels: "np.ndarray", start: int, recipe: "Recipe") -> "tuple[np.ndarray, str]":
        """A clip's frames [F, H, W, 3] restored, `start` the first one's number; how they had to be run in smaller pieces."""
        from ebr_engine.jobs.clips import restore_chunk

        def restored() -> "np.ndarray":
            self.restorer.begin()
            mine = replace(recipe, plan=self._plan(recipe.plan))
            return restore_chunk(self.restorer, pixels.copy(), start, mine, lambda index, steps: None)  # pixels: read only

        return self._run(restored), self.restorer.smaller

    def file(self, unit: FileUnit) -> Made:
        """Restore a file; one that cannot be is told in the outcome."""
        from ebr_engine.jobs.interrupts import Interrupts
        from ebr_engine.jobs.overlap import Behind
        from ebr_engine.jobs.run import Run
        from ebr_engine.jobs.work import Work

        with tempfile.TemporaryDirectory(prefix="ebr-unit-") as folder:
            places = {
                unit.source: Path(folder, "in", Path(unit.source).name),
                unit.target: Path(folder, "out", Path(unit.target).name),
            }
            if unit.compare:
                places[unit.compare] = Path(folder, "out", Path(unit.compare).name)
            places[unit.source].parent.mkdir()
            places[unit.source].write_bytes(unit.content)
            compare = places[unit.compare] if unit.compare else None
            job = Job(places[unit.source], places[unit.target], compare, self._here(unit.request), unit.named_task)
            heard = _Heard()
            run = Run(self.restorer, Work([job], {}), self._recipes, heard)
            run.interrupts = Interrupts(lambda text: None)
            with Behind() as run.writer:
                for each, source in run.read():
                    self._run(run.restore, each, source)
            contents = {name: place.read_bytes() for name, place in places.items() if name != unit.source and place.exists()}
            named = {str(place): name for name, place in places.items()}
        said = tuple((kind, _with(named, text)) for kind, text in heard.said)
        note, error, skipped = (
            text and _with(named, text) for text in (heard.outcome.note, heard.outcome.error, heard.outcome.skipped)
        )
        return Made(replace(heard.outcome, note=note, error=error, skipped=skipped), contents, said)

    def _run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return self._compute.submit(call, *arguments).result()

    def _here(self, request: RestoreRequest) -> RestoreRequest:
        return request.with_(prompt=self._found(request.prompt)) if request.prompt else request

    def _found(self, prompt: Sequence[tuple[Any, float]]) -> tuple[tuple[Any, float], ...]:
        return tuple((self._prompts.get(str(path), path), weight) for path, weight in prompt)

    def _plan(self, planned: Planned) -> Any:
        if planned not in self._plans:
            prompt = list(self._found(planned.prompt)) or None
            self._plans[planned] = self.restorer.plan(planned.task, prompt, **dict(planned.options))
        return self._plans[planned]


class _Heard(Progress):
    """Keeps what is said of a file, and its outcome."""

    outcome: Outcome

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def line(self, text: str) -> None:
        self.said.append(("line", text))

    def error(self, text: str, kind: str = "error") -> None:
        self.said.append((kind, text))


def _with(names: Mapping[str, str], text: str) -> str:
    for here, there in names.items():
        text = text.replace(here, there)
    return text


def _resident() -> int:
    """Bytes of main memory that this process has had at most."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
