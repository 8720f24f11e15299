"""How the command's process begins and ends: fewer passes over what imports make, and no taking apart of what is freed anyway."""

import atexit
import gc
import os
import sys

OBJECTS = 50_000  # made since the last pass: torch's import makes ten times as many, which all stay


class Ending:
    """Ends the process at once when all else that was registered to be done at its end is done.

    Python would take every object of torch apart first, which takes as long as a small picture. Threads have ended by then, what
    is registered later is done earlier, and output is written.
    """

    def __init__(self) -> None:
        self.code = 1  # of a traceback
        atexit.register(self)

    def __call__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        os._exit(self.code)


def begin() -> Ending:
    """The process begins: before anything that is registered for its end."""
    gc.set_threshold(OBJECTS)
    return Ending()
