"""What a small file costs: a picture or clip by the command, from the start of the process to its end, beside another commit's.

Time is the processor's, of all threads, so that busy neighbours count little; both commands run in turns. `--beside` names the
folder of another commit (`git worktree add ../before COMMIT`). Modules are compiled before the clock starts.
"""

import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, columns, spread

# A folder's own package, kernels too, which an installation in place would give this checkout's.
COMMAND = """
import sys
root = sys.argv.pop(1)
sys.path.insert(0, root)
import ebr_engine
ebr_engine.__path__.append(root)
from ebr_engine.cli import main
main()
"""


def options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"), help="of the picture in pixels"
    )
    parser.add_argument("--frames", type=int, default=1, help="of a square clip in place of the picture")
    parser.add_argument("--task", default="haze")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another commit's folder")


def measure(options: Namespace) -> dict[str, Any]:
    """Processor time of restoring one small picture or clip, process start to end, beside another commit's."""
    if options.rounds < 1 or min(options.size) < 8 or options.frames < 1:
        options.error("--rounds and --frames must be at least 1, --size at least 8 8")
    if options.frames > 1 and len(set(options.size)) > 1:
        options.error("a clip is square: give --size one side twice")
    if options.beside and not (options.beside / "ebr_engine").is_dir():
        options.error(f"{options.beside}: there is no ebr_engine in it")
    from benchmarks.speed import write_source

    folders = {"here": ROOT} | ({"beside": options.beside.resolve()} if options.beside else {})
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as folder:
        kind = "png" if options.frames == 1 else "mp4"
        source, target = Path(folder, f"in.{kind}"), Path(folder, f"out.{kind}")
        write_source(source, max(options.size), options.frames)
        if options.frames == 1:
            cut(source, *options.size)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        rest = ["restore", str(source), "-o", str(target), "--overwrite", "--quiet", "--task", options.task]
        rest += ["--precision", options.precision]
        for i in range(options.rounds + (options.frames == 1)):  # the first compiles, which a clip hardly notices
            for name, where in folders.items():
                found = used([sys.executable, "-c", COMMAND, str(where), *rest], where, environment)
                taken[name] += [found] if i or options.frames > 1 else []
    asked = {"task": options.task, "precision": options.precision, "rounds": options.rounds}
    return {
        **{"size": list(options.size), "frames": options.frames, **asked},
        "seconds": {name: spread([seconds for seconds, _ in values]) for name, values in taken.items()},
        "peak_bytes": {name: max(peak for _, peak in values) for name, values in taken.items()},
    }


def cut(path: Path, height: int, width: int) -> None:
    from ebr_engine.media.images import read_image, write_image

    write_image(path, read_image(path).pixels[:height, :width])


def used(command: list[str], where: Path, environment: dict[str, str]) -> tuple[float, int]:
    """Processor seconds of a command, all of its threads, and the most bytes that were resident; for Linux."""
    started = subprocess.Popen(command, cwd=where, env=environment, stdout=subprocess.DEVNULL)
    _, status, found = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, command)
    return found.ru_utime + found.ru_stime, found.ru_maxrss * 1024


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    seconds = {name: values["median"] for name, values in result["seconds"].items()}
    rows = [
        [name, *(f"{x:.2f}" for x in (values["median"], *values["quartiles"])), f"{result['peak_bytes'][name] / 1e6:.0f}"]
        for name, values in result["seconds"].items()
    ]
    height, width = result["size"]
    frames = result.get("frames", 1)
    clip = f"{frames} frames of " if frames > 1 else ""
    title = f"mini, {result['task']}, {clip}{height} x {width}, precision {result['precision']}"
    lines = [f"{title}, processor seconds of {result['rounds']} runs in turns", ""]
    lines += [columns(["commit", "median", "from", "to", "peak MB"], rows)]
    if frames > 1:
        rates = ", ".join(f"{frames / taken:.2f} ({name})" for name, taken in seconds.items())
        lines += ["", f"frames a second of one core: {rates}"]
    return "\n".join([*lines, *([f"x{seconds['beside'] / seconds['here']:.2f}"] if "beside" in seconds else [])])
