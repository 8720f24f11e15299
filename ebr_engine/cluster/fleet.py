"""A restorer whose work is done by a pool of workers: to `jobs` it is like a loaded one, though no model is loaded here."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ebr_engine.cluster.connect import Share
from ebr_engine.cluster.contents import prompts_named
from ebr_engine.cluster.pool import Pool
from ebr_engine.cluster.worker import Facts, FileUnit, Made, Planned, RestoreWorker
from ebr_engine.errors import EngineError
from ebr_engine.request import RestoreRequest
from ebr_engine.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from ebr_engine.jobs.clips import Shown
    from ebr_engine.jobs.files import Job
    from ebr_engine.jobs.recipe import Recipe
    from ebr_engine.media.chunking import Chunk

LIGHT = 1 << 30  # bytes up to which the first worker stays as it is, and need not be made anew to state them


class Fleet:
    """`requests`: all of a run; `jobs`: what of it is known, for sizes; `share`: what of the cluster each
    worker takes; `most`: so many at most.

    The first worker is asked how much memory it needs for the largest picture; that is what all state to Ray.
    """

    worker = RestoreWorker
    smaller = ""  # each file says it for itself

    def __init__(
        self,
        request: RestoreRequest,
        requests: Iterable[RestoreRequest],
        jobs: "Sequence[Job]",
        share: Share,
        most: int | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ):
        from ebr_engine.jobs.run import sizes_of

        sizes = {size for _, size in sizes_of(jobs)}
        prompts = prompts_named({request, *requests})
        pool = Pool(self.worker, (request, prompts, share.cores), share, most=1, tell=tell)
        self.pool, self.loaded = pool, request
        try:
            self.facts: Facts = self._ask("facts")
            if self.facts.version != __version__:
                raise EngineError(f"the cluster's nodes have ebr-engine {self.facts.version}, this machine {__version__}")
            self.memory = self._ask("need", list(sizes), any(job.is_clip for job in jobs))
            pool.grow(self.memory, restart=self.memory > LIGHT, most=most)
        except BaseException:
            pool.stop()
            raise

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.stop()

    @property
    def backbone(self) -> Any:
        """What is asked of it by name."""
        return SimpleNamespace(name=self.facts.backbone)

    @property
    def asks_per_frame(self) -> bool:
        """As `Restorer.asks_per_frame`."""
        return self.facts.asks_per_frame

    @property
    def released_size(self) -> tuple[int, int]:
        """As `Restorer.released_size`."""
        if self.facts.released_size is None:
            raise EngineError(f"{self.facts.backbone} has no released size; leave --size out")
        return self.facts.released_size

    @cached_property
    def codec(self) -> Any:
        """What of a codec cutting a clip asks for."""
        return SimpleNamespace(frames=lru_cache(None)(lambda count: self._ask("frames", count)))

    def begin(self) -> None:
        """Each worker begins its files itself."""

    def expect(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Nothing is compiled here."""

    def tile_size(self, tile: int | None, overlap: int | None) -> tuple[int, int]:
        """As `Restorer.tile_size`."""
        return self._ask("tile_size", tile, overlap)

    def plan(self, task: str | None = None, prompt: Any = None, **options: Any) -> Planned:
        """A plan by its name, when a worker has made it."""
        planned = Planned(task, tuple(prompt or ()), tuple(sorted(options.items())))
        self._ask("plan", planned)
        return planned

    def chunk_size(self, *asked: Any, **options: Any) -> tuple[int, int]:
        """As `Restorer.chunk_size`."""
        return self._ask("chunk_size", asked, options)

    def diagnose(self, pictures: Sequence[Any]) -> Any:
        """As `Restorer.diagnose`."""
        return self._ask("diagnose", list(pictures))

    def estimate(self, pictures: Iterable[tuple[tuple[int, int], Planned, dict[str, Any]]]) -> float | None:
        """As `Restorer.estimate`, side by side."""
        alone = self._ask("estimate", list(pictures))
        return alone and alone / max(1, self.pool.size)

    def file(self, job: "Job") -> "Future[Made]":
        """Have a picture or a sound restored whole; its file is read here and now."""
        compare = str(job.compare) if job.compare else None
        unit = FileUnit(str(job.source), str(job.target), compare, job.source.read_bytes(), job.request, job.named_task)
        return self.pool.submit("file", unit)

    def chunks(
        self, chunks: "Iterator[Chunk]", recipe: "Recipe", shown: "Shown", clips: int, smaller: Callable[[str], None]
    ) -> "Iterator[tuple[Chunk, np.ndarray]]":
        """Chunks with their restorations in order, many of them restored at once; `smaller` hears of want of memory.

        `clips` of them go on side by side, which together hold two chunks for each worker, and one each.
        """
        waiting: deque[tuple[Chunk, Future]] = deque()
        while True:
            while len(waiting) <= -(-2 * self.pool.size // clips) and (chunk := next(chunks, None)) is not None:
                waiting.append((chunk, self.pool.submit("chunk", chunk.pixels, chunk.start, recipe)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            pixels, seen = future.result()
            smaller(seen)
            shown(chunk)(1, 1)
            yield chunk, pixels
            del chunk, pixels, future

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self.pool.submit(name, *arguments, first=True).result()
