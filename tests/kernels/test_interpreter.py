"""Every Triton kernel against its formula on a CPU: its operation's tests again, in Triton's interpreter.

Whether a function is interpreted is decided when it is defined, so it takes a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebr_engine.kernels import backend

TESTS = Path(__file__).parent
KERNELS = TESTS.parents[1] / "kernels"
PARTS = {"tiles", "rotary", "qk_norm_rope_gradient"}  # of several kernels or of one, and tested with them
UNGATED = {"TRITON_INTERPRET": "1", "EBR_KERNELS": "triton", "EBR_VERIFY": "off"}  # a wrong kernel is to be seen, not replaced


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(backend.INTERPRETED, reason="already interpreted")
def test_kernels_are_their_formulas_in_the_interpreter():
    operations = [
        path.stem for path in sorted(KERNELS.glob("*.py")) if "@triton.jit" in path.read_text() and path.stem not in PARTS
    ]
    files = [TESTS / f"test_{operation}.py" for operation in (*operations, "gate")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        cwd=KERNELS.parent,
        env=os.environ | UNGATED,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["wan", "flux"])  # FLUX has 512 text tokens: a quarter of an hour
@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(backend.INTERPRETED, reason="already interpreted")
def test_the_released_velocities_hold_through_the_kernels(backbone):
    file = TESTS.parent / "backbones" / f"test_{backbone}_golden.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "released_velocity", str(file)],
        cwd=KERNELS.parent,
        env=os.environ | UNGATED,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
