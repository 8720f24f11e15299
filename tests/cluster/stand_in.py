"""What a worker of the tests holds: it waits, fails or dies as it is told, and writes down that it was called."""

import os
import time
from pathlib import Path

from ebr_engine.errors import EbrError


class StandIn:
    def __init__(self, folder):
        self.folder = Path(folder)

    def _count(self, name):
        path = self.folder / name
        with path.open("a") as file:
            file.write("x")
        return path.stat().st_size

    def who(self):
        return os.getpid()

    def double(self, value, seconds=0.0):
        time.sleep(seconds)
        return 2 * value

    def refuse(self, why):
        self._count("refused")
        raise EbrError(why)

    def die(self, name, times):
        """End the process, the first `times` calls."""
        if self._count(name) <= times:
            os._exit(1)
        return self._count(name)

    def slow_once(self, seconds):
        """Take long in the first call only."""
        if self._count("slow") == 1:
            time.sleep(seconds)
            return "first"
        return "second"


def unable(folder):
    raise EbrError("this model is not here")
