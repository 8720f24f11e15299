"""How every command is found, and how every error is told: one line on stderr and an exit code.

Exit codes: 0 done; 1 a file or the machine failed (OSError, memory; `restore` also for each picture it could not do);
2 the request cannot be met (bad usage, and every EbrError); 130 interrupted.
"""

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from ebr_engine import settings
from ebr_engine.cli.telling import tell
from ebr_engine.errors import EbrError, one_line

# The extra that a missing module comes with, where whole commands need it.
EXTRAS = {"scipy": "train", "skimage": "train", **dict.fromkeys(("fastapi", "prometheus_client", "uvicorn"), "serve")}

# name: (module:attribute, panel of the help page); the attribute is a function, or a typer.Typer with its own commands.
COMMANDS = {
    "restore": ("restore:restore", "Restore"),
    "watch": ("watch:watch", "Restore"),
    "inspect": ("inspect:inspect", "Restore"),
    "sheet": ("sheet:sheet", "Restore"),
    "build": ("build:build", "Restore"),
    "export": ("export:export", "Restore"),
    "demo": ("demo:demo", "Restore"),
    "prompts": ("prompts:app", "Restore"),
    "cache-text": ("cache_text:cache_text", "Restore"),
    "info": ("info:info", "Restore"),
    "bench": ("bench:bench", "Restore"),
    "warm": ("warm:warm", "Restore"),
    "serve": ("serve:serve", "Restore"),
    "train": ("train:train", "Learn and measure"),
    "cache-latents": ("cache_latents:cache_latents", "Learn and measure"),
    "train-backbone": ("train_backbone:train_backbone", "Learn and measure"),
    "train-classifier": ("train_classifier:train_classifier", "Learn and measure"),
    "eval": ("eval:evaluate", "Learn and measure"),
}

# click's own classes, whether this typer carries click inside or imports it.
_UsageError = typer.BadParameter.__base__
_ClickException = _UsageError.__base__


class _LazyCommands(Mapping):
    """Name → click command; the module behind a name is imported when the command is asked for."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            where, panel = COMMANDS[name]
            module, attribute = where.split(":")
            self._built[name] = _click_command(name, getattr(import_module(f"ebr_engine.cli.{module}"), attribute))
            self._built[name].rich_help_panel = panel
        return self._built[name]


class EbrGroup(TyperGroup):
    """The top of the command tree: commands imported lazily, expected errors told in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands = _LazyCommands()

    def get_params(self, ctx: typer.Context) -> list[Any]:
        return without_values(super().get_params(ctx))

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if "--debug" in args:  # taken anywhere: it is added to the end of a line that has just failed
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:
        debug = ctx.params["debug"] or settings.debug()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            tell(str(error) or "interrupted")
            raise typer.Exit(130) from None
        except ModuleNotFoundError as error:
            if debug or error.name not in EXTRAS:
                raise
            tell(f"{error.name} is not installed: pip install 'ebr-engine[{EXTRAS[error.name]}]'")
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # the reader of our output has gone, as in `ebr-engine info | head -1`: click leaves quietly
        except (EbrError, OSError, MemoryError, RuntimeError) as error:
            if debug or not (line := one_line(error)):
                raise
            tell(line)
            raise typer.Exit(2 if isinstance(error, EbrError) else 1) from None

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a file name need not be encodable
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except typer.Abort:
            sys.exit(130)
        except _ClickException as error:
            message = " ".join(error.format_message().split())
            where = getattr(getattr(error, "ctx", None), "command_path", "ebr-engine")
            if message:  # empty: no_args_is_help has printed the help
                tell(f"{message.rstrip('.')} (see {where} --help)")
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


def _click_command(name: str, target: Any) -> Any:
    if not isinstance(target, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(name, context_settings={"help_option_names": ["-h", "--help"]})(target)
        target = single
    command = typer.main.get_command(target)
    command.name = name
    for one in [command, *getattr(command, "commands", {}).values()]:
        without_values(one.get_params(one.context_class(one, **one.context_settings)))
    return command


def without_values(parameters: list[Any]) -> list[Any]:
    """The same parameters, the flags among them shown without a value: newer typers would show <bool>."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters
