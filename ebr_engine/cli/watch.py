"""`ebr-engine watch`: a folder that restores what is put into it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli import options
from ebr_engine.cli.options import named, takes
from ebr_engine.request import FIELDS, RestoreRequest

_ASKED = tuple(name for name in FIELDS if name not in ("as_clip", "fps"))  # files come one by one, never as frames


@takes(*_ASKED)
def watch(
    folder: Annotated[Path, typer.Argument(metavar="IN", help="The folder to watch, with all folders in it.")],
    *,
    out: Annotated[Path, named("Files", "--out -o OUT", "A folder (made if missing) that mirrors it.")],
    settle: Annotated[
        float, named("Files", "--settle SECONDS", "A file is whole when it has not changed for so long.", min=0.1)
    ] = 2.0,
    poll: Annotated[
        float | None,
        named(
            "Files",
            "--poll SECONDS",
            "Look so often, and rely on no events. Default: 2 on a network mount, else when the system tells of a change.",
            min=0.1,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    quiet: Annotated[bool, named("Files", "--quiet -q", "Print errors only.")] = False,
    json: Annotated[
        bool, named("Files", "--json", "Print a JSON object a file, and one for the whole, in place of lines.")
    ] = False,
    request: RestoreRequest,
) -> None:
    """Restore what comes into a folder, each file once it is whole, in order, until Ctrl-C or SIGTERM.

    A file that changes is restored again; one that is renamed is a new file; results of files that are deleted stay.
    What is finished is remembered in OUT: after a stop or a kill the same command goes on, in the middle of a clip too.

    [bold]ebr-engine watch incoming/ -o restored/ --task auto[/]
    """
    from ebr_engine.jobs.watch import Watch, check_folders

    folder, out = folder.expanduser(), out.expanduser()
    check_folders(folder, out)

    from ebr_engine.cli.progress import Display
    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.jobs.wakeups import Wakeups

    class OneByOne(Display):
        """Each file is a whole: nobody knows how many will come."""

        def start(self, name: str) -> None:
            self._begun, self._told = 0, time.monotonic()
            super().start(name)

    with OneByOne(1, quiet, json) as progress:
        watching = Watch(Restorer.from_request(request), folder, out, request, progress, settle=settle, overwrite=overwrite)
        wakeups = Wakeups(folder, poll)
        why = f", looking from time to time ({wakeups.why_polling})" if wakeups.why_polling else ""
        progress.line(f"watching {folder}{why}; Ctrl-C ends")
        watching.run(wakeups)
