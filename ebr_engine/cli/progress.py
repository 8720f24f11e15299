"""What a person sees while files are worked on: a bar with time left on a terminal, plain lines anywhere else."""

import sys
from contextlib import AbstractContextManager

import typer

from ebr_engine.cli.group import tell


class Progress(AbstractContextManager):
    """A bar over files and their steps on stderr, when that is a terminal; one line a file on stdout.

    Every file counts the same; a file's share grows with its steps.
    """

    def __init__(self, files: int, quiet: bool = False):
        self.files = files
        self.quiet = quiet
        self.done = 0
        self._bar = None if quiet or not sys.stderr.isatty() else _bar()
        self._task = self._bar.add_task("loading", total=files, step="") if self._bar else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, name: str) -> None:
        """The next file begins."""
        if self._bar:
            number = f"{self.done + 1}/{self.files} " if self.files > 1 else ""
            self._bar.update(self._task, description=number + name, step="", refresh=True)

    def step(self, index: int, total: int) -> None:
        """`index` of `total` steps of the current file are done."""
        self.share(index / total if total else 0, f"step {index}/{total}")

    def share(self, part: float, text: str) -> None:
        """`part` of the current file, 0 to 1, is done; `text` says where it is."""
        if self._bar:
            self._bar.update(self._task, completed=self.done + min(part, 1), step=text)

    def finish(self, line: str | None) -> None:
        """The current file is finished; `line` tells its result on stdout."""
        self.done += 1
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        if line:
            self.line(line)

    def line(self, text: str) -> None:
        """A line on stdout, above the bar where both are on the same terminal."""
        if self.quiet:
            return
        if self._bar and sys.stdout.isatty():
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(text)

    def error(self, text: str, kind: str = "error") -> None:
        """An error or warning line on stderr, quiet or not."""
        if self._bar:
            from rich.text import Text

            self._bar.console.print(Text.assemble((f"{kind}: ", "red"), text), soft_wrap=True)
        else:
            tell(text, kind)


def _bar():
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=2)),
        progress.BarColumn(bar_width=None, table_column=Column(ratio=2)),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[step]}", table_column=Column(no_wrap=True)),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=Console(stderr=True),
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
        expand=True,
    )
