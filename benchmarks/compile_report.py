"""`python -m benchmarks.compile_report`: what the compilers make of every kernel, found without a GPU.

The operations' own launchers are run on tensors without memory, at the shapes of the real models, against a stand-in for the
driver: every launch is compiled for the asked architecture with exactly the tiles, warps and specialisations that it would have
there, and the machine code is read with the disassembler of Triton's package. The CUDA sources are compiled with the options of
`setup.py`, if nvcc is there. STACK and LOCAL are bytes of slow memory a thread: both should be 0. Blocks: how many of a kernel's
a multiprocessor keeps at once; occupancy: the share of its warps that they are; in flight: their shared memory, which is what
asynchronous copies fill.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks import report
from benchmarks.compile_shapes import OPERATIONS, Shapes
from benchmarks.gpu_sizes import MODELS as CHECKED
from benchmarks.report import ROOT, Benchmark, columns
from ebr_engine.kernels import backend

MODELS = (*CHECKED, "flux2-klein-4b", "flux2-dev")
ARCHS = (80, 89, 90, 100, 120)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may ask for
SHARED = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}  # bytes that a multiprocessor's blocks share
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # that a multiprocessor keeps
REGISTERS, BLOCKS = 65536, 32  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that the system keeps of every block, from 8.0 on
MATRIX = re.compile(r"(?<![\w.])([A-Z]+MMA)\b")  # HMMA, QMMA; HGMMA, QGMMA (Hopper); UTCHMMA, UTCQMMA (tcgen05)
PROCESSES = 2
WORKER = "import sys; from benchmarks.compile_report import worker; worker(sys.argv[1])"


def tools() -> dict[str, str]:
    """The disassembler's programs in Triton's package by name; RuntimeError says which is missing."""
    found = find_spec("triton")
    if found is None:
        raise RuntimeError("triton is not installed: pip install triton")
    folder = Path(found.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    for name in ("cuobjdump", "nvdisasm"):
        if not (folder / name).exists():
            raise RuntimeError(f"{folder} has no {name}: this Triton was built without NVIDIA's tools")
    return {name: str(folder / name) for name in ("cuobjdump", "nvdisasm")}


def inspect(cubin: bytes, matrices: bool = True) -> dict[str, dict[str, Any]]:
    """Registers, bytes of shared, stack and local memory, and matrix instructions of every kernel in a binary, by its name.

    Without `matrices` the instructions, which take the longest to find, are known to have none.
    """
    found = tools()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run([found["cuobjdump"], "--dump-resource-usage", str(path)])
        code = run([found["nvdisasm"], "-c", str(path)]) if matrices else ""
    kernels = {}
    for name, text in re.findall(r"Function (\S+):\n(.*)", usage):
        numbers = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", text)}
        kernels[name] = {
            "registers": numbers["REG"],
            "shared": numbers["SHARED"],
            "stack": numbers["STACK"],
            "local": numbers["LOCAL"],
            "instructions": {},
        }
    for name, body in re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", code, re.MULTILINE | re.DOTALL):
        if name in kernels:
            kernels[name]["instructions"] = dict(sorted(Counter(MATRIX.findall(body)).items()))
    return kernels


def residence(arch: int, warps: int, registers: int, shared: int) -> dict[str, float]:
    """Blocks of a kernel that a multiprocessor keeps at once, its warps' share of all it could, and bytes of their shared memory.

    Where operands come by asynchronous copies, those bytes are what can be in flight.
    """
    of_warp = -(-registers * 32 // 256) * 256
    blocks = min(BLOCKS, WARPS[arch] // warps, REGISTERS // (of_warp * warps), SHARED[arch] // (shared + RESERVED))
    return {"blocks": blocks, "occupancy": blocks * warps / WARPS[arch], "in_flight": blocks * shared}


def run(command: Sequence[str]) -> str:
    """The output of a command; RuntimeError with what it complained of."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Launches compile for `arch` instead of running, and are listed as (kernel's name, compiled kernel)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    # What Triton's launch path asks of a driver; kernels are kept by device, so the architecture stands in for that too.
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: arch,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
    )
    launched, launch = [], JITFunction.run

    def compiled(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, kernel))
        return kernel

    with ExitStack() as patches:
        patches.enter_context(patch.object(JITFunction, "run", compiled))
        # Tiles are chosen by a tensor's device, and these have none.
        patches.enter_context(patch.object(backend, "capability", lambda x: arch // 10))
        yield launched


def triton_rows(arch: int, operations: Sequence[str], models: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every launch of the operations at the models' shapes; launches that share a kernel share its row."""
    rows: dict[str, dict[str, Any]] = {}
    for operation in operations:
        for model in models:
            with compiling(arch) as launched:
                OPERATIONS[operation](Shapes(model, arch))
            for name, kernel in launched:
                if kernel.hash not in rows:
                    about = {"operation": operation, "kernel": name, "arch": f"sm_{arch}", "models": [], "compiler": "triton"}
                    options = {"warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages}
                    (measured,) = inspect(kernel.asm["cubin"], "mma" in kernel.asm["ptx"]).values()
                    rows[kernel.hash] = about | options | measured | {"shared": kernel.metadata.shared}
                    found = options["warps"], measured["registers"], kernel.metadata.shared
                    rows[kernel.hash] |= residence(arch, *found)
                    rows[kernel.hash]["specialized"] = "ttg.warp_specialize" in kernel.asm["ttgir"]
                if model not in rows[kernel.hash]["models"]:
                    rows[kernel.hash]["models"].append(model)
    return list(rows.values())


def setup_options() -> dict[str, Any]:
    """What `setup.py` builds the extension with, by its names there."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="options")


def cuda_archs() -> list[str]:
    """What `setup.py` would build for here, as 90a; nothing without nvcc."""
    options = setup_options()
    nvcc = options["find_nvcc"](os.environ)
    return options["choose_archs"](None, options["known_archs"](nvcc)) if nvcc else []


def cuda_rows(arch: str, operations: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every kernel of csrc/ that is one of the operations, compiled by nvcc for `arch` (as 90a)."""
    options = setup_options()
    sources = [source for source in options["KERNELS"] if Path(source).stem in operations]
    if not sources:
        return []
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(options["one_unit"](sources))
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        run([options["find_nvcc"](os.environ), "-cubin", *options["COMPILE"], target, str(source), "-o", str(cubin)])
        found = inspect(cubin.read_bytes())
    return [
        {
            "operation": readable(name).partition("_kernel")[0],
            "kernel": readable(name),
            "arch": f"sm_{arch}",
            "models": [],
            "compiler": "nvcc",
        }
        | measured
        for name, measured in found.items()
    ]


def collect(
    archs: Sequence[int], operations: Sequence[str] = tuple(OPERATIONS), models: Sequence[str] = MODELS, cuda: bool = True
) -> list[dict[str, Any]]:
    """All rows, from fresh processes with an empty cache: nothing compiled before, and no interpreter, is in the way."""
    tools()
    jobs = [("triton_rows", arch, list(operations), list(models)) for arch in archs] if models else []
    jobs += [("cuda_rows", arch, list(operations)) for arch in cuda_archs() if int(arch.rstrip("af")) in archs] if cuda else []

    def run_job(job: tuple) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as cache:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment |= {"EBR_KERNELS": "triton", "TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-c", WORKER, json.dumps(job)]
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling failed: {job}")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(PROCESSES) as pool:
        return [row for rows in pool.map(run_job, jobs) for row in rows]


def worker(job: str) -> None:
    """Print the rows of one job, in a process of its own."""
    name, *arguments = json.loads(job)
    print(json.dumps({"triton_rows": triton_rows, "cuda_rows": cuda_rows}[name](*arguments)))


def readable(name: str) -> str:
    """A C++ kernel's name with its types, without what its compiler added; a Triton kernel's name as it is."""
    if not name.startswith("_ZN"):
        return name
    rest = name[3:]
    while length := re.match(r"\d+", rest):  # namespaces, then the kernel: each a length and as many letters
        size, start = int(length[0]), length.end()
        kernel, rest = rest[start : start + size], rest[start + size :]
    types = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "float32", "h": "fp8"}
    named = [types[found] for found in re.findall("|".join(types), re.split("E+v", rest)[0])]
    return f"{kernel}<{', '.join(named)}>"


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    header = ["kernel", "arch", "warps", "registers", "shared", "stack", "local", "blocks", "occupancy", "in flight"]
    header += ["matrix instructions", "models"]
    lines = []
    for row in result["kernels"]:
        counts = ", ".join(f"{count} {name}" for name, count in row["instructions"].items()) or "-"
        numbers = [str(row.get(name, "-")) for name in ("warps", "registers", "shared", "stack", "local", "blocks")]
        kept = [f"{row['occupancy']:.0%}", f"{row['in_flight'] // 1024} KiB"] if "blocks" in row else ["-", "-"]
        name = row["kernel"] + (" (specialized)" if row.get("specialized") else "")
        lines.append([name, row["arch"], *numbers, *kept, counts, " ".join(row["models"]) or "any"])
    return columns(header, lines)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="compute capabilities, as 80,90 (default: all)")
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))


def measure(options: Namespace) -> dict[str, Any]:
    """What the compilers make of every kernel, found without a GPU."""
    try:
        archs = [int(arch) for arch in options.archs.split(",")]
    except ValueError:
        options.error(f"--archs takes numbers with commas between, as 80,90; got {options.archs!r}")
    if unknown := [arch for arch in archs if arch not in SHARED_LIMIT]:
        options.error(f"--archs: {unknown[0]} is not one of {', '.join(map(str, SHARED_LIMIT))}")
    return {"kernels": collect(archs, options.ops, options.models)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, and print the table."""
    report.main("compile_report", __doc__, Benchmark(options, measure, table), arguments)


if __name__ == "__main__":
    main()
