"""Reading and writing beside computing: one thread that is an item ahead, one that is an item behind."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items in the same order, the next one made in another thread while one is used: two are held at a time.

    An error of the iterable is raised in its place. Closing the generator waits for the item that is being made.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, "ahead") as thread:
        following = thread.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, iterator, _END)
            yield item
            del item


class Behind(AbstractContextManager):
    """Calls functions in another thread, in order; `call` waits until the one before is done, and raises its error."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "behind")
        self._last: Future | None = None

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        self.wait()
        self._last = self._thread.submit(function, *arguments)

    def wait(self) -> None:
        """Until all is done; raises the error of the last call."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()
