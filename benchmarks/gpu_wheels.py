"""`make gpu-wheels`: fetch what the GPU check needs beside torch, triton and numpy, for a machine that fetches nothing.

For Python 3.12 on Linux (x86-64), as the images of such machines have it, in the versions of `constraints.txt`. There:

    python3 -m pip install --no-index --no-deps --target site gpu-wheels/*.whl && PYTHONPATH=site python3 -m benchmarks.gpu

`--list` prints them with what they are for, and fetches nothing.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import ROOT

PYTHON, LIMIT = "3.12", 60  # megabytes
GLIBC = (17, 24, 27, 28)  # manylinux_2_N that pip takes; it looks for each by its name
WHEELS = {  # package: what it is for
    "safetensors": "the engine",
    "scipy": "scenes to pre-train on",
    **dict.fromkeys(("diffusers", "huggingface_hub", "importlib_metadata", "zipp", "regex", "requests", "pillow"), "diffusers"),
    **dict.fromkeys(
        ("click", "httpx2", "httpcore2", "h11", "anyio", "idna", "truststore", "PyYAML", "tqdm", "packaging"), "diffusers"
    ),
    **dict.fromkeys(("certifi", "charset-normalizer", "urllib3"), "diffusers"),  # torch brings filelock and fsspec
    **dict.fromkeys(("pytest", "pluggy", "iniconfig", "Pygments"), "the tests that need a GPU"),
    "pybind11": "the CUDA extension's binding",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """List or fetch."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_wheels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-wheels", help="folder for them")
    parser.add_argument("--list", action="store_true", help="print them only")
    options = parser.parse_args(arguments)
    if options.list:
        print(*(f"{name}  # {reason}" for name, reason in zip(requirements(), WHEELS.values())), sep="\n")
        return
    fetch(options.out)
    print(total(options.out))


def requirements() -> list[str]:
    """The packages, pinned where `constraints.txt` pins them."""
    pins = dict(re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonical(name): version for name, version in pins.items()}
    return [f"{name}=={pins[canonical(name)]}" if canonical(name) in pins else name for name in WHEELS]


def canonical(name: str) -> str:
    """A package's name as all spellings of it become."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fetch(folder: Path) -> None:
    """Have pip put the wheels into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):  # two versions of one would stop the install
        wheel.unlink()
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["--platform=manylinux2014_x86_64"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        f"--python-version={PYTHON}",
    ]
    subprocess.run([*command, "--implementation=cp", *platforms, "-d", str(folder), *requirements()], check=True)


def total(folder: Path) -> str:
    """How many wheels lie in a folder and their size; SystemExit where it is more than such machines take."""
    sizes = {wheel.name: wheel.stat().st_size / 1e6 for wheel in sorted(folder.glob("*.whl"))}
    words = f"{len(sizes)} wheels, {sum(sizes.values()):.1f} MB, in {folder}"
    if sum(sizes.values()) > LIMIT:
        raise SystemExit(f"error: {words}: more than {LIMIT} MB")
    return words


if __name__ == "__main__":
    main()
