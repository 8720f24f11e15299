"""Ctrl-C while files are worked on: the first asks the run to stop where that leaves nothing half done, the second ends it."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

EXIT_CODE = 130


class Interrupted(KeyboardInterrupt):
    """A run that was stopped in good order; its message says what is finished and how to go on."""


class Interrupts(AbstractContextManager):
    """Takes Ctrl-C while it is entered; `check` raises at the next moment that suits, and `tell` says so at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._before = None
        self.asked = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # nobody else may take signals
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """KeyboardInterrupt if Ctrl-C has been pressed."""
        if self.asked:
            raise KeyboardInterrupt

    def _handle(self, *_: object) -> None:
        if self.asked:
            os._exit(EXIT_CODE)
        self.asked = True
        self._tell("stopping after this step; Ctrl-C again quits at once")
