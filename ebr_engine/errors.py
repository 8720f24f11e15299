"""Errors meant for people: what was wrong, with which file or value, and what to do."""


class EbrError(ValueError):
    """Bad input or an impossible request; its message is one clear line, shown without a traceback by the CLI."""


class PromptError(EbrError):
    """A prompt file that cannot be read, or that does not fit the backbone."""


class BackboneError(EbrError):
    """A backbone that is unknown, or whose configuration and weights do not fit each other."""


class EngineError(EbrError):
    """A request that the engine cannot meet."""
