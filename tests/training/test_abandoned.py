"""Processes that render end with the one that they render for, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import time
from ebr_engine.training.scenes import ScenePool

if __name__ == "__main__":
    pool = ScenePool(2, 32, rate=1.0, workers=1)
    print(*(process.pid for process in pool._renewers), flush=True)
    time.sleep(600)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks /proc about processes")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_renderers_end_when_their_parent_is_killed(tmp_path, how):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(how)
        parent.wait()
        deadline = time.monotonic() + 20
        while alive(child) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(child)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
