"""How the command begins and ends: little is imported, what is registered for the end is done, exit codes stay."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ebr_engine.media.images import write_image
from ebr_engine.media.picture import Picture

MOST = 220  # modules before torch: the standard library's, typer's with its pydantic, and ours
HEAVY = ("torch", "numpy", "av", "pyvips", "rich", "scipy", "fastapi", "diffusers", "transformers")
NEEDLESS = ("torch._dynamo", "torch._inductor", "sympy", "rich", "diffusers", "transformers", "av", "scipy", "onnx", "fastapi")


def printed(code: str, **given: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **given})


def test_asking_for_a_command_imports_no_torch_and_few_modules():
    done = printed("import sys, ebr_engine.cli.restore; print(len(sys.modules)); print(*sys.modules)")
    count, names = done.stdout.splitlines()
    assert int(count) <= MOST
    assert not {name for name in names.split() if name.split(".")[0] in HEAVY}


def test_restoring_a_picture_imports_nothing_that_it_does_not_need(tmp_path, weights):
    from tests.tiny import make_prompt

    prompt = tmp_path / "p.safetensors"
    make_prompt().save(prompt)
    write_image(tmp_path / "in.png", Picture(np.full((16, 24, 3), 0.5, np.float32)))
    words = ["restore", tmp_path / "in.png", "-o", tmp_path / "out.png", "-p", prompt, "-m", weights, "--device", "cpu"]
    ended = "except SystemExit as left:\n    print(left.code, *sys.modules)"
    done = printed(f"import sys\nfrom ebr_engine.cli import app\ntry:\n    app({list(map(str, words))})\n{ended}")
    result, *names = done.stdout.splitlines()[-1].split()
    assert result == "0", done.stderr
    assert not {name for name in names if any(name == heavy or name.startswith(f"{heavy}.") for heavy in NEEDLESS)}


ENDING = """
import atexit, sys, threading, time
import ebr_engine.cli as cli
def app(prog_name):
    atexit.register(print, "registered")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("written", end=" ")
    {end}
cli.app = app
cli.main()
"""


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit('words')", 1), ("raise ValueError('a bug')", 1)]
)
def test_the_end_waits_for_threads_does_what_is_registered_and_keeps_the_code(end, code):
    done = printed(ENDING.format(end=end))
    assert done.stdout.split() == ["written", "thread", "registered"]
    assert done.returncode == code
    assert ("a bug" in done.stderr) == ("bug" in end)
    assert ("words" in done.stderr) == ("words" in end)
