"""`python -m benchmarks.gpu` (or `make gpu-check`): everything to know of a GPU that the engine has not met, in twelve minutes.

Checks every kernel against its formula in float64, runs and times the models at the real shapes (a step in bf16 and fp8, whole
captured runs, diffusers compiled beside them, a step of learning, codecs), then single operations, and pre-trains `mini` with
the time that is left. Weights are random: nothing is downloaded, nothing need be installed, and no git is needed. A section is
a process of its own with its own limit and file, so that one that fails or hangs costs only itself; what it measured until then
is kept, and where a kernel took the whole device context with it, the section goes on after that kernel in a new process. The
most telling sections come first; those for which no time is left are left out, and `--resume` does them later.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import ebr_engine
from benchmarks.gpu_report import markdown, problems, summary
from benchmarks.report import NO_TIME, RESULTS, ROOT, about, commit, describe, sources, write_json

MINUTES = 12
GRACE = 10  # seconds a section may run past its limit: it stops by itself, between two measurements
SHORTEST = 10  # seconds below which a section is not started
RESTARTS = 8  # of a section whose device context was lost
WORK = ROOT / "build" / "gpu-check"  # ignored by git


@dataclass(frozen=True)
class Section:
    """A part of the check: the function that does it, its arguments, how long it may take, which kernels it asks for."""

    title: str
    module: str
    function: str
    seconds: float  # of the twelve minutes, more if there are more; `inf`: all that are left
    arguments: tuple[str, ...] = ()
    kernels: str = "triton"
    gpus: int = 1  # left out, with a line, where there are fewer
    beside: bool = False  # computes nothing on the GPU: begins with the first section and runs beside


# In the order of their worth: what there is no time for is left out. Sections for several GPUs (`gpus=2`) go before the codecs.
SECTIONS = {
    "kernels": Section("Errors against float64, and those of plain torch", "gpu_kernels", "kernels", 70),
    "steps-wan": Section("A step of Wan 2.1 1.3B, 480 x 832, 33 frames", "gpu_models", "steps", 65, ("wan-1.3b",)),
    "steps-flux": Section("A step of FLUX.1-dev, 1024 x 1024", "gpu_models", "steps", 80, ("flux-dev",)),
    "graphs-wan": Section("Whole runs of Wan 2.1 1.3B, captured", "gpu_models", "graphs", 50, ("wan-1.3b",)),
    "graphs-flux": Section("Whole runs of FLUX.1-dev, captured", "gpu_models", "graphs", 60, ("flux-dev",)),
    "peers-wan": Section("Wan 2.1 1.3B beside diffusers, compiled too", "gpu_models", "peers", 45, ("wan-1.3b",)),
    "peers-flux": Section("FLUX.1-dev beside diffusers, compiled too", "gpu_models", "peers", 60, ("flux-dev",)),
    "train-wan": Section("Learning a prompt for Wan 2.1 1.3B", "gpu_models", "train", 20, ("wan-1.3b",)),
    "train-flux": Section("Learning a prompt for FLUX.1-dev", "gpu_models", "train", 30, ("flux-dev",)),
    "attention": Section("Self-attention in all its forms", "gpu_kernels", "forms_of_attention", 25),
    "parallel": Section("A step shared by several GPUs", "gpu_parallel", "parallel", 30, gpus=2),
    "vae-wan": Section("Wan 2.1's codec, 480 x 832, 33 frames", "gpu_codecs", "codec", 20, ("wan",)),
    "vae-flux": Section("FLUX.1's codec, 1024 x 1024", "gpu_codecs", "codec", 15, ("flux",)),
    "linears": Section("Linear layers: bf16, and e4m3 by its two backends", "gpu_kernels", "linears", 20),
    "ops": Section("Operations at the models' shapes", "gpu_kernels", "ops", 40),
    "build": Section("The CUDA extension", "gpu_kernels", "build", 120, beside=True),
    "cuda": Section("The CUDA extension's kernels", "gpu_kernels", "cuda", 25, kernels="cuda"),
    "tests": Section("Tests that need a GPU", "gpu_kernels", "tests", 20, kernels="cuda"),
    "pretrain": Section("Pre-training mini", "gpu_pretrain", "pretraining", float("inf"), kernels="torch"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections, which print as they go, write both files after each, and end with what matters."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the sections' own files, which --resume reads")
    parser.add_argument("--sections", help=f"some of {', '.join(SECTIONS)}, with commas; a beginning stands for all with it")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all; what does not fit is left out")
    parser.add_argument("--resume", action="store_true", help="keep the sections that are done")
    parser.add_argument("--commit", help="what is measured, where there is no git to say it")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: does the check itself run?")
    parser.add_argument("--rehearse", action="store_true", help="--tiny, from a bare copy of these folders, nothing installed")
    parser.add_argument("--worker", nargs=3, metavar=("SECTION", "FILE", "DEADLINE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    find_kernels()
    if options.worker:
        name, file, until = options.worker
        work(name, Path(file), float(until), options.tiny, options.out)
        return
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    wanted = options.sections.split(",") if options.sections else [""]
    if unknown := [part for part in wanted if not any(name.startswith(part) for name in SECTIONS)]:
        parser.error(f"--sections: there is no {unknown[0]!r}; there is: {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if name.startswith(tuple(wanted))]
    if options.rehearse:
        from benchmarks.gpu_rehearsal import rehearse

        good = rehearse(names, options.minutes, options.out.resolve())
    else:
        check = Check(options.out.resolve(), options.work.resolve(), options.tiny, options.commit or commit())
        good = check.run(names, options.minutes * 60, options.resume)
    if not good:
        raise SystemExit(1)


@dataclass
class Running:
    """A section at work in a process of its own, until `limit` seconds after `started`."""

    name: str
    started: float
    limit: float
    process: subprocess.Popen[bytes]


@dataclass
class Check:
    """A run of the command: where its files are, and what is measured."""

    out: Path
    work: Path
    tiny: bool
    commit: str

    def run(self, names: Sequence[str], seconds: float, resume: bool) -> bool:
        """Run sections within so many seconds; whether nothing failed."""
        deadline, generous = time.monotonic() + seconds, max(seconds / 60 / MINUTES, 1)
        machine = about() | {"commit": self.commit, "sources": sources(), "driver": driver()}
        count = len(machine["machine"]["cuda"])
        if not self.tiny and not count:
            raise SystemExit("error: torch sees no CUDA device here; --tiny runs the check itself on the CPU")
        title = f"gpu_{device_name(machine)}{'_tiny' if self.tiny else ''}"
        path, self.work = self.out / f"{title}.json", self.work / title
        self.work.mkdir(parents=True, exist_ok=True)
        sections = {name: found for name in SECTIONS if (found := self.kept(name))} if resume else {}
        print("\n".join(describe(machine)), f"driver {machine['driver']}", sep="\n", flush=True)
        for name in [name for name in names if SECTIONS[name].gpus > count and not self.tiny]:
            names = [one for one in names if one != name]
            print(f"\n{name}: left out, as it needs {SECTIONS[name].gpus} GPUs", flush=True)
        new = [name for name in names if sections.get(name, {}).get("status") != "done"]
        beside = {name: self.start(name, SECTIONS[name].seconds, deadline) for name in new if SECTIONS[name].beside}
        for name in names:
            if name not in new:
                print(f"\n{name}: kept from commit {sections[name]['commit']}", flush=True)
                continue
            print(f"\n{name}: {SECTIONS[name].title}", flush=True)
            running = beside[name] if name in beside else self.start(name, SECTIONS[name].seconds * generous, deadline)
            sections[name] = self.finish(name, running)
            print(f"  {sections[name]['status']} in {sections[name]['seconds']:.1f} s", flush=True)
            self.write(path, machine, sections)
        result = self.write(path, machine, sections)
        print("", *summary(result, titles()), path, path.with_suffix(".md"), sep="\n", flush=True)
        return not any(problems(sections[name]) for name in names)

    def write(self, path: Path, machine: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
        """Both files of the results; gives what is in them."""
        result = machine | {"tiny": self.tiny, "sections": {key: sections[key] for key in SECTIONS if key in sections}}
        write_json(path, result)
        path.with_suffix(".md").write_text(markdown(result, titles()))
        return result

    def kept(self, name: str) -> dict[str, Any] | None:
        """What an earlier run has of a section."""
        file = self.work / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def start(self, name: str, seconds: float, deadline: float) -> Running | None:
        """Begin a section anew; None where there is no time for it."""
        started = time.monotonic()
        limit = min(seconds, deadline - started - GRACE)
        if limit < SHORTEST:
            return None
        for suffix in (".json", ".rows", ".begun"):
            (self.work / f"{name}{suffix}").unlink(missing_ok=True)
        return Running(name, started, limit, self.launch(name, started + limit))

    def launch(self, name: str, until: float) -> subprocess.Popen[bytes]:
        """A section's process, which goes on where one before it ended."""
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", name, str(self.work / f"{name}.rows"), f"{until}"]
        command += ["--out", str(self.out), *(["--tiny"] if self.tiny else [])]
        # A wrong kernel is to be seen here, not to be replaced.
        environment = os.environ | {"EBR_KERNELS": SECTIONS[name].kernels, "EBR_VERIFY": "off"}
        return subprocess.Popen(command, cwd=ROOT, env=environment)

    def finish(self, name: str, running: Running | None) -> dict[str, Any]:
        """Wait for a section: its status and rows, whatever became of it; they are written to its own file too."""
        waited = time.monotonic()
        if running is None:
            return {"status": NO_TIME, "seconds": 0.0, "commit": self.commit, "rows": []}
        status, until = "done", running.started + running.limit
        for restarts in range(RESTARTS + 1):
            try:
                code = running.process.wait(max(until + GRACE - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
                status = f"stopped after {running.limit + GRACE:.0f} s"
                break
            if code != LOST or restarts == RESTARTS:
                status = "done" if code == 0 else f"failed: exit status {code}"
                break
            print("  the device context is lost; the section goes on in a new process", flush=True)
            running.process = self.launch(name, until)
        file = self.work / f"{name}.rows"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if status == "done" and any(row.get("error") == NO_TIME for row in rows):
            status = "out of time"
        found = {"status": status, "seconds": time.monotonic() - waited, "commit": self.commit, "rows": rows}
        write_json(self.work / f"{name}.json", found)
        return found


LOST = 75  # a section's exit status when only a new process can go on


def work(name: str, file: Path, deadline: float, tiny: bool, out: Path) -> None:
    """A section, in its own process (whose monotonic clock is its parent's): rows go to the file as they come."""
    import torch

    from benchmarks.clock import DeviceLost, Run

    section = SECTIONS[name]
    device = torch.device("cpu" if tiny else "cuda")
    if tiny:
        torch.set_num_threads(1)
    function = getattr(import_module(f"benchmarks.{section.module}"), section.function)
    marks = file.with_suffix(".begun")
    begun = set(marks.read_text().splitlines()) if marks.exists() else set()
    with file.open("a") as rows, marks.open("a") as lines:
        run = Run(device, tiny, deadline, rows, out, file.parent, begun, lines)
        try:
            with run.guarded(section=name):
                function(run, *section.arguments)
            if device.type == "cuda" and not section.beside:
                run.add(section=name, **{"peak GB": torch.cuda.max_memory_allocated(device) / 1e9})
        except DeviceLost:
            os._exit(LOST)  # at once: to take the context down in order can hang


def titles() -> dict[str, str]:
    """The sections' titles by name."""
    return {name: section.title for name, section in SECTIONS.items()}


def find_kernels() -> None:
    """Let `ebr_engine.kernels` be found where it lies in a checkout, in kernels/: not installed, or installed from elsewhere."""
    if Path(ebr_engine.__file__).parents[1] == ROOT and str(ROOT) not in ebr_engine.__path__:
        ebr_engine.__path__.append(str(ROOT))


def device_name(about: dict[str, Any]) -> str:
    """The first device as part of a file's name."""
    cuda = about["machine"]["cuda"]
    name = cuda[0]["description"].split(",")[0] if cuda else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_").removeprefix("nvidia_")


def driver() -> str:
    """The version of NVIDIA's driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    main()
