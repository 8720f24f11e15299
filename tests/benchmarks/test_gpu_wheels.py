"""What the GPU check needs beside torch is pinned, weighed and named; a bare copy of the folders holds all of ours."""

import subprocess
import sys

import pytest

from benchmarks import gpu_rehearsal, gpu_wheels


def test_packages_are_listed_in_the_versions_that_are_tested(capsys):
    gpu_wheels.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_wheels.WHEELS)
    assert all("==" in line and "# " in line for line in lines)
    assert not [line for line in lines if line.startswith(("torch", "triton", "numpy"))]


def test_what_would_not_travel_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"x" * 2_000_000)
    assert gpu_wheels.total(tmp_path) == f"1 wheels, 2.0 MB, in {tmp_path}"
    monkeypatch.setattr(gpu_wheels, "LIMIT", 1)
    with pytest.raises(SystemExit, match="more than 1 MB"):
        gpu_wheels.total(tmp_path)


def test_a_bare_copy_finds_its_own_kernels(tmp_path):
    bare = gpu_rehearsal.copied(tmp_path / "bare")
    assert not (bare / ".git").exists()
    code = "from benchmarks import gpu; gpu.find_kernels(); import ebr_engine.kernels as k; print(k.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=bare, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert found.strip() == str(bare / "kernels" / "__init__.py")
