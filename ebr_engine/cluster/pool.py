"""Workers that are kept busy: units of work go to whoever is free, and what a dead or slow worker had goes to another.

One thread owns all that is known of workers and units; it is told of everything by events, so nothing is locked. A unit has
one result, the first that comes: a second copy of it, started because the first takes long, changes nothing but time.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ebr_engine.cluster.connect import Share, needed_ray
from ebr_engine.errors import EbrError

ATTEMPTS = 3  # workers that may die over one unit before it has failed
DEATHS = 3  # of workers in a row before they have loaded
SLOW = 3.0  # times the median that a unit may take before a second copy is started
SLOW_AFTER = 3  # units of its kind that tell the median
TICK = 0.5  # seconds between two looks at slow units and at the cluster's size
PATIENCE = 20.0  # seconds without any worker after which that is told


class Stopped(KeyboardInterrupt):
    """The pool was stopped before a unit was done."""


@dataclass(eq=False)
class _Unit:
    name: str
    arguments: tuple
    future: Future
    deaths: int = 0
    started: float = 0.0
    on: "set[_Hand]" = field(default_factory=set)


@dataclass(eq=False)
class _Hand:
    """A worker as the pool sees it."""

    actor: Any
    ready: bool = False
    units: set[_Unit] = field(default_factory=set)


class _Host:
    """What runs in a worker's process: an object that is made there, and calls of its methods."""

    def load(self, make: Callable[..., Any], arguments: tuple) -> None:
        self.held = make(*arguments)

    def call(self, name: str, arguments: tuple) -> Any:
        return getattr(self.held, name)(*arguments)


class Pool:
    """Workers on a connected cluster, each with an object that `make(*arguments)` gave, whose methods are called.

    `share`: what of the cluster each takes, so many as have room and not more than `most`; those that nodes bring which come
    later are added. `memory`: bytes that each states to Ray. `tell(text)` hears what a person should know.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        arguments: tuple,
        share: Share,
        *,
        most: int | None = None,
        memory: int = 0,
        tell: Callable[[str], None] = lambda text: None,
        slow: float = SLOW,
    ) -> None:
        self._ray = needed_ray()
        self._host = self._ray.remote(_Host)
        self._make, self._arguments, self._share, self._most, self.memory = make, arguments, share, most, memory
        self._tell, self._slow = tell, slow
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: deque[_Unit] = deque()
        self._hands: list[_Hand] = []
        self._took: dict[str, list[float]] = {}
        self._deaths = 0
        self._stopped = False
        self._since, self._told = time.monotonic(), False
        self.size = self.ready = 0  # workers that there is room for, and that have loaded
        self._count()
        if not self.size:
            raise EbrError(f"the cluster has no node with {share.cores} core(s) for a worker; see --cluster-cores")
        self._thread = threading.Thread(target=self._work, name="pool", daemon=True)
        self._thread.start()

    def submit(self, name: str, *arguments: Any, first: bool = False) -> Future:
        """Call a method of the object in some worker, before all that waits where `first` says so; its result to come.

        What the method raises is raised by the result, `EbrError` where workers died over it, `Stopped` after `stop`.
        """
        unit = _Unit(name, arguments, Future())
        if self._stopped:
            unit.future.set_exception(Stopped())
        else:
            self._events.put((self._added, unit, first))
        return unit.future

    def grow(self, memory: int, restart: bool, most: int | None = None) -> None:
        """From now on so many workers (None: all that there is room for), each stating so much memory.

        `restart`: those that are there too, so that they state it; for before work is given out.
        """
        self._events.put((self._grown, memory, restart, most))

    def stop(self) -> None:
        """End all workers; what is not done is `Stopped`."""
        self._events.put((self._end,))
        self._thread.join()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # All below runs in the pool's thread.

    def _work(self) -> None:
        looked = 0.0
        while not self._stopped:
            try:
                handle, *arguments = self._events.get(timeout=TICK)
                handle(*arguments)
                if self._events.empty():
                    self._assign()
                if time.monotonic() - looked > TICK:
                    looked = time.monotonic()
                    self._look()
            except queue.Empty:
                self._guarded(self._look)
            except Exception as error:  # Ray itself: nobody else would hear of it
                self._fail(error)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._fail(error)

    def _added(self, unit: _Unit, first: bool) -> None:
        (self._waiting.appendleft if first else self._waiting.append)(unit)

    def _count(self) -> None:
        self.size = self._share.fit(self._ray.nodes())
        if self._most is not None:
            self.size = min(self.size, self._most)

    def _look(self) -> None:
        """The cluster may have grown or shrunk, and units may take too long."""
        self._count()
        while len(self._hands) < self.size:
            self._start()
        if any(hand.ready for hand in self._hands):
            self._since, self._told = time.monotonic(), False
        elif not self._told and time.monotonic() - self._since > PATIENCE:
            self._told = True
            memory = f" and {self.memory / 2**30:.1f} GB of memory" if self.memory else ""
            what = f"{self._share.gpus} GPU" if self._share.gpus else f"{self._share.cores} core(s)"
            self._tell(f"still waiting for a worker, which needs {what}{memory}")
        self._assign()

    def _start(self) -> None:
        options = self._share.options() | ({"memory": self.memory} if self.memory else {})
        actor = self._host.options(max_concurrency=2, **options).remote()
        hand = _Hand(actor)
        self._hands.append(hand)
        self._heard(actor.load.remote(self._make, self._arguments), self._loaded, hand)

    def _heard(self, reference: Any, handle: Callable[..., None], *arguments: Any) -> None:
        reference.future().add_done_callback(lambda future: self._events.put((handle, *arguments, future)))

    def _loaded(self, hand: _Hand, future: Future) -> None:
        if hand not in self._hands:
            return
        error = future.exception()
        if error is None:
            hand.ready, self._deaths = True, 0
            return
        self._dismiss(hand)
        self._deaths += 1
        own = _own(self._ray, error)
        if own is not None and not any(hand.ready for hand in self._hands):
            self._fail(own)
        elif self._deaths >= DEATHS:
            self._fail(EbrError(f"workers end while they load the model: {_line(error)}"))

    def _assign(self) -> None:
        ready = [hand for hand in self._hands if hand.ready]
        self.ready = len(ready)
        for hand in ready:
            if self._waiting and not hand.units:
                self._give(hand, self._waiting.popleft())
        for hand in ready:  # a second one is read while the first is computed, but where others would have nothing left
            if len(self._waiting) > len(ready) and len(hand.units) == 1:
                self._give(hand, self._waiting.popleft())
        if not self._waiting:
            for hand in ready:
                if not hand.units and (unit := self._slowest()) is not None:
                    self._give(hand, unit)

    def _slowest(self) -> _Unit | None:
        """The unit that has run longest of those that run alone and take too long."""
        now, found = time.monotonic(), []
        for unit in {unit for hand in self._hands for unit in hand.units if len(unit.on) == 1 and not unit.future.done()}:
            took = self._took.get(unit.name, [])
            if len(took) >= SLOW_AFTER and now - unit.started > max(TICK, self._slow * median(took)):
                found.append(unit)
        return min(found, key=lambda unit: unit.started, default=None)

    def _give(self, hand: _Hand, unit: _Unit) -> None:
        if not unit.on:
            unit.started = time.monotonic()
        unit.on.add(hand)
        hand.units.add(unit)
        self._heard(hand.actor.call.remote(unit.name, unit.arguments), self._ended, hand, unit, time.monotonic())

    def _ended(self, hand: _Hand, unit: _Unit, begun: float, future: Future) -> None:
        unit.on.discard(hand)
        hand.units.discard(unit)
        error = future.exception()
        if error is None:
            self._took.setdefault(unit.name, []).append(time.monotonic() - begun)
            if not unit.future.done():
                unit.future.set_result(future.result())
            return
        if (own := _own(self._ray, error)) is not None:
            if not unit.future.done():
                unit.future.set_exception(own)
            return
        if hand in self._hands:
            self._dismiss(hand)
        if unit.future.done() or unit.on or unit in self._waiting:
            return
        unit.deaths += 1
        if unit.deaths >= ATTEMPTS:
            unit.future.set_exception(EbrError(f"{unit.deaths} workers died over it: {_line(error)}"))
        else:
            self._waiting.appendleft(unit)

    def _dismiss(self, hand: _Hand) -> None:
        """A worker is gone; its other unit ends by itself with the same error."""
        self._hands.remove(hand)
        self._since = time.monotonic()
        self._ray.kill(hand.actor)

    def _grown(self, memory: int, restart: bool, most: int | None) -> None:
        self.memory, self._most = memory, most
        for hand in list(self._hands) if restart else ():
            self._dismiss(hand)
        self._look()

    def _fail(self, error: BaseException) -> None:
        """Nothing can be done any more: all that is waited for has this error."""
        running = {unit for hand in self._hands for unit in hand.units}
        for unit in (*self._waiting, *running):
            if not unit.future.done():
                unit.future.set_exception(error)
        self._waiting.clear()

    def _end(self) -> None:
        self._stopped = True
        self._fail(Stopped())
        while not self._events.empty():  # units that came meanwhile
            handle, *arguments = self._events.get()
            if handle == self._added:
                arguments[0].future.set_exception(Stopped())
        for hand in list(self._hands):
            self._ray.kill(hand.actor)
        self._hands.clear()


def _own(ray: Any, error: BaseException) -> BaseException | None:
    """What a method raised; None where it is the worker that ended, or its node."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return getattr(error, "cause", None) or error
    return None if isinstance(error, ray.exceptions.RayError) else error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
