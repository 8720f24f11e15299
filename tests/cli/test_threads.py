"""Threads by affinity and by a control group's quota, and how they wait; the user's own settings stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebr_engine.cli.threads import affinity, cpu_quota
from ebr_engine.settings import WAITING


def groups(root: Path, listed: str, files: dict[str, str]) -> Path:
    """A machine's folders with these control groups."""
    for name, text in {"proc/self/cgroup": listed, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("listed", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),  # a limit above counts
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000\n"}, 3.0),  # a container that is told the host's path
        ("3:cpu,cpuacct:/\n0::/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4.0),
        ("1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("3:cpuset:/\n2:cpuacct:/\n", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_quota_is_read_in_both_versions_of_control_groups(tmp_path, listed, files, expected):
    assert cpu_quota(groups(tmp_path, listed, files)) == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None


def settings_of(command: str, **given: str) -> list[str]:
    """What a process prints after the command line has made its settings in an environment with `given`."""
    kept = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    code = f"import sys, os; from ebr_engine.cli import threads; {command}"
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, check=True, capture_output=True, text=True)
    return done.stdout.split()


SHOWN = "threads.use_cores(); print(*(os.environ.get(n, '-') for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OMP_NUM_THREADS')))"


def test_threads_fall_asleep_unless_the_user_says_how_they_wait():
    policy, spins, _ = settings_of(SHOWN)
    assert policy == "-"
    assert int(spins) <= 1000
    assert settings_of(SHOWN, OMP_WAIT_POLICY="active")[:2] == ["active", "-"]
    assert settings_of(SHOWN, GOMP_SPINCOUNT="7")[:2] == ["-", "7"]
    assert settings_of(SHOWN, KMP_BLOCKTIME="200")[:2] == ["-", "-"]


@pytest.mark.parametrize(("quota", "count"), [("0.5", "1"), ("1", "1"), ("1.25", "2"), ("8", "-"), ("None", "-")])
def test_there_are_no_more_threads_than_a_quota_feeds(quota, count):
    limited = f"threads.affinity = lambda: 8; threads.cpu_quota = lambda: {quota}; {SHOWN}"
    assert settings_of(limited)[2] == count
    assert settings_of(limited, OMP_NUM_THREADS="3")[2] == "3"


def test_affinity_counts_the_cores_that_the_process_may_use():
    assert 1 <= affinity() <= (os.cpu_count() or 1)


def test_every_command_makes_the_settings_before_torch_is_imported():
    made = "print('torch' in sys.modules, 'GOMP_SPINCOUNT' in os.environ)"
    code = f"import os, sys, ebr_engine.cli as cli; cli.app = lambda **_: sys.exit({made}); cli.main()"
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=kept, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
