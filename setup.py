"""Build script: what is declarative is in pyproject.toml; here is the CUDA extension, built from csrc/ where nvcc is found.

EBR_BUILD_CUDA   auto (the default: build it if nvcc is there, go on without it if that fails), 1 (or fail), 0 (do not)
EBR_CUDA_ARCHS   compute capabilities to build for, as "80 90a"; by default those of ARCHS that the nvcc at hand knows
CUDA_HOME        where nvcc is, in bin/; else it is looked for on PATH
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ARCHS = ("80", "89", "90a", "100", "120")
BINDING = "csrc/binding.cpp"
KERNELS = [f"csrc/{op}.cu" for op in ("gated_residual_norm", "layer_norm_modulate", "qk_norm_rope", "quantize_fp8")]
HEADERS = ["csrc/ops.h", "csrc/rows.cuh"]
# A kernel that spills registers to memory is not built: ptxas warns of it, and its warnings are errors.
COMPILE = ["-std=c++17", "-O3", "-Xptxas=--warn-on-spills,--warning-as-error", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# The CUDA runtime lies within, unseen by the one that torch brings, so that nothing has to be there to import the module.
LINK = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL,--strip-all"]


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The CUDA compiler's path, or None."""
    home = environment.get("CUDA_HOME")
    at_home = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    return at_home or shutil.which("nvcc", path=environment.get("PATH", ""))


def known_archs(nvcc: str) -> set[str]:
    """The compute capabilities a compiler can build for, as 80."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"compute_(\d+)", listed))


def choose_archs(asked: str | None, known: Collection[str]) -> list[str]:
    """What to build for; `ValueError` if that is nothing or beyond the compiler."""
    wanted = re.split(r"[\s,;]+", asked.strip()) if asked and asked.strip() else None
    archs = [arch for arch in wanted or ARCHS if arch.rstrip("af") in known]
    if wanted and archs != wanted:
        refused = ", ".join(arch for arch in wanted if arch not in archs)
        raise ValueError(f"EBR_CUDA_ARCHS asks for {refused}; this nvcc knows {', '.join(sorted(known, key=int))}")
    if not archs:
        raise ValueError(f"this nvcc knows none of {', '.join(ARCHS)}: name others in EBR_CUDA_ARCHS")
    return archs


def arch_options(archs: list[str]) -> list[str]:
    """nvcc's options: machine code for each, and the oldest one's PTX, which a driver compiles for a GPU that none fits."""
    portable = [arch for arch in archs if arch.isdigit()]
    oldest = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted(portable, key=int)[:1]]
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs] + oldest


def one_unit(sources: list[str]) -> str:
    """A source that includes all: CUDA's headers take most of the time, once for each unit and architecture."""
    return "".join(f'#include "{Path(__file__).parent.resolve() / source}"\n' for source in sources)


def decide(environment: Mapping[str, str]) -> tuple[bool, bool, str]:
    """Whether to build the extension, whether the install has to fail without it, and why not; `ValueError` for neither."""
    asked = environment.get("EBR_BUILD_CUDA", "auto") or "auto"
    if asked not in ("auto", "0", "1"):
        raise ValueError(f"EBR_BUILD_CUDA is {asked!r}; it has to be auto, 0 or 1")
    if asked == "0":
        return False, False, "EBR_BUILD_CUDA=0"
    if find_nvcc(environment):
        return True, asked == "1", ""
    return False, asked == "1", "no nvcc in CUDA_HOME or on PATH"


class BuildCuda(build_ext):
    """Compiles with nvcc; what goes wrong is a CompileError, which an optional extension may have."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile(ext, find_nvcc(os.environ))
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{error.cmd[0]} ended with {error.returncode}; what it said is above") from error
        except (ImportError, OSError, ValueError) as error:
            raise CompileError(str(error)) from error

    def compile(self, ext: Extension, nvcc: str) -> None:
        archs = choose_archs(os.environ.get("EBR_CUDA_ARCHS"), known_archs(nvcc))
        import pybind11  # of the build's own environment

        print(f"{ext.name}: building for {', '.join(archs)} with {nvcc}", file=sys.stderr)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        target, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)

        unit, binding, kernels = folder / "kernels.cu", str(folder / "binding.o"), str(folder / "kernels.o")
        unit.write_text(one_unit(KERNELS))
        commands = [
            [nvcc, "-c", *COMPILE, *includes, BINDING, "-o", binding],
            [nvcc, "-c", *COMPILE, *arch_options(archs), "--threads=0", str(unit), "-o", kernels],
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, commands))
        run([nvcc, *LINK, binding, kernels, "-o", str(target)])


def run(command: list[str]) -> None:
    print(shlex.join(command), file=sys.stderr)
    subprocess.run(command, check=True)


def extension(environment: Mapping[str, str]) -> dict:
    """What `setup` is told of the extension; `SystemExit` if it is demanded and cannot be built."""
    try:
        build, demanded, reason = decide(environment)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if build:
        module = Extension("ebr_engine._csrc", [BINDING, *KERNELS], depends=HEADERS, optional=not demanded)
        return {"ext_modules": [module], "cmdclass": {"build_ext": BuildCuda}}
    if demanded:
        sys.exit(f"error: EBR_BUILD_CUDA=1, but there is {reason}")
    print(f"ebr_engine._csrc (CUDA kernels) is not built: {reason}", file=sys.stderr)
    return {}


if __name__ == "__main__":
    setup(**extension(os.environ))
