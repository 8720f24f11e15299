"""Build script: what is declarative is in pyproject.toml; here are the extensions, built from csrc/ where a compiler is found.

EBR_BUILD_CPU    native code for CPUs: auto (the default: go on without it if that fails), 1 (or fail), 0 (do not)
CXX              the C++ compiler of that, GCC from 11 or Clang from 14 on; else c++ on PATH
EBR_BUILD_CUDA   CUDA kernels: auto (the default: build them if nvcc is there, go on if that fails), 1 (or fail), 0 (do not)
EBR_CUDA_ARCHS   compute capabilities to build for, as "80 90a"; by default those of ARCHS that the nvcc at hand knows
CUDA_HOME        where nvcc is, in bin/; else it is looked for on PATH
"""

import os
import platform
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

# Native code for CPUs: the same templates once for each level of instructions, which is chosen when the module runs. A file and
# its options for a level, in place of a function and its target attribute: GCC does not carry an attribute into the lambdas
# and templates of a function, and a file says at once what every function in it may use.
CPU_BINDING = "csrc/cpu/binding.cpp"
CPU_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": (avx512 := ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]),
    "avx512_bf16": [*avx512, "-mavx512bf16"],
    "amx": [*avx512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
CPU_SOURCES = {"csrc/cpu/levels.cpp": [], "csrc/cpu/pool.cpp": []} | {
    f"csrc/cpu/level_{level}.cpp": options for level, options in CPU_LEVELS.items()
}
CPU_PORTABLE = ["csrc/cpu/levels.cpp", "csrc/cpu/pool.cpp", "csrc/cpu/level_baseline.cpp"]
CPU_MODULE, X86 = "ebr_engine._cpu", ("x86_64", "AMD64")
CPU_HEADERS = [
    f"csrc/cpu/{name}.h"
    for name in (
        *("amx", "amx_float", "amx_gradient", "attention", "attention_gradient", "channels", "convolution", "levels", "ops"),
        *("row_gradients", "rows", "vec", "weight_gradient"),
    )
]
CPU_COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-uninitialized"]


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


def find_compiler(environment: Mapping[str, str]) -> list[str] | None:
    """The C++ compiler's command, or None."""
    command = shlex.split(environment.get("CXX") or "c++")
    return command if shutil.which(command[0], path=environment.get("PATH", "")) else None


def decide(environment: Mapping[str, str], variable: str, missing: str | None) -> tuple[bool, bool, str]:
    """Whether to build an extension, whether the install has to fail without it, and why not; `ValueError` for neither.

    `missing`: what is not there to build it with.
    """
    asked = environment.get(variable, "auto") or "auto"
    if asked not in ("auto", "0", "1"):
        raise ValueError(f"{variable} is {asked!r}; it has to be auto, 0 or 1")
    if asked == "0":
        return False, False, f"{variable}=0"
    return missing is None, asked == "1", missing or ""


class Build(build_ext):
    """Compiles with nvcc or a C++ compiler; what goes wrong is a CompileError, which an optional extension may have."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_cpu(ext) if ext.name == CPU_MODULE else self.compile(ext, find_nvcc(os.environ))
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
        run_all(commands)
        run([nvcc, *LINK, binding, kernels, "-o", str(target)])

    def compile_cpu(self, ext: Extension) -> None:
        import pybind11  # of the build's own environment

        compiler = find_compiler(os.environ)
        print(f"{ext.name}: building with {shlex.join(compiler)}", file=sys.stderr)
        target, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        run_all(commands := cpu_commands(compiler, folder, pybind11.get_include()))
        run([*compiler, "-shared", *(command[-1] for command in commands), "-ldl", "-o", str(target)])


def cpu_commands(compiler: list[str], folder: Path, pybind11: str, root: Path = Path()) -> list[list[str]]:
    """A command for each source of the native code that compiles it into `folder`, the object's path last."""
    includes = [f"-I{pybind11}", f"-I{sysconfig.get_path('include')}"]
    levels = CPU_SOURCES if platform.machine() in X86 else {source: [] for source in CPU_PORTABLE}
    return [
        [*compiler, *CPU_COMPILE, *options, "-c", str(root / source), "-o", str(folder / f"cpu_{Path(source).stem}.o")]
        for source, options in {CPU_BINDING: includes, **levels}.items()
    ]


def run_all(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


def run(command: list[str]) -> None:
    print(shlex.join(command), file=sys.stderr)
    subprocess.run(command, check=True)


def extension(environment: Mapping[str, str]) -> dict:
    """What `setup` is told of the extensions; `SystemExit` if one is demanded and cannot be built."""
    nvcc = None if find_nvcc(environment) else "no nvcc in CUDA_HOME or on PATH"
    compiler = "no C++ compiler (CXX, or c++ on PATH)" if find_compiler(environment) is None else None
    if sys.platform == "win32":
        compiler = "no build for Windows"
    asked = [
        ("ebr_engine._csrc", "CUDA kernels", "EBR_BUILD_CUDA", nvcc, [BINDING, *KERNELS], HEADERS),
        (CPU_MODULE, "native code for CPUs", "EBR_BUILD_CPU", compiler, [CPU_BINDING, *CPU_SOURCES], CPU_HEADERS),
    ]
    modules = []
    for name, title, variable, missing, sources, headers in asked:
        try:
            build, demanded, reason = decide(environment, variable, missing)
        except ValueError as error:
            sys.exit(f"error: {error}")
        if build:
            modules.append(Extension(name, sources, depends=headers, optional=not demanded))
        elif demanded:
            sys.exit(f"error: {variable}=1, but there is {reason}")
        else:
            print(f"{name} ({title}) is not built: {reason}", file=sys.stderr)
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}} if modules else {}


if __name__ == "__main__":
    setup(**extension(os.environ))
