"""Errors meant for people: what was wrong, with which file or value, and what to do."""

import warnings
from collections.abc import Sequence

LONGEST = 300  # characters of a warning: what compilers say fills pages


class EngineWarning(UserWarning):
    """Something was done in another way than asked for, at no harm to the result; told in one line."""


class EbrError(ValueError):
    """Bad input or an impossible request; its message is one clear line, shown without a traceback by the CLI."""


class PromptError(EbrError):
    """A prompt file that cannot be read, or that does not fit the backbone."""


class BackboneError(EbrError):
    """A backbone that is unknown, or whose configuration and weights do not fit each other."""


class EngineError(EbrError):
    """A request that the engine cannot meet."""


class DeviceLost(RuntimeError):
    """One of a run's devices, or its process, is gone; the run ends, whatever file it was at."""


def warn(line: str) -> None:
    """Tell of something in one line, as an `EngineWarning`."""
    words = " ".join(line.split())
    warnings.warn(words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…", EngineWarning, stacklevel=3)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """`EngineError` unless `value` is one of `choices`."""
    if value not in choices:
        raise EngineError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch (on any device) or Python ran out of memory; seen by name, so that torch need not be imported."""
    words = str(error)
    by_name = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in words or "bad_alloc" in words
    return isinstance(error, MemoryError) or by_name


def one_line(error: BaseException) -> str | None:
    """What to tell a person about an expected error; None for an error that is nobody's input, but a bug."""
    if isinstance(error, (EbrError, DeviceLost)):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OSError):
        return " ".join(str(error).split()) or type(error).__name__
    return "not enough memory; a smaller --tile needs less" if out_of_memory(error) else None
