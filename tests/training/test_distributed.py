"""Two processes that share a batch learn what one learns, and only one of them writes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from ebr_engine.cli import main
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.training.distributed import World, joined

COMMAND = "from ebr_engine.cli import main\n\nmain()\n"


@pytest.fixture
def command(weights, pairs):
    """`command(out)`: the arguments of a small run on pairs."""
    settings = {"tokens": 4, "iterations": 4, "batch": 4, "size": 32, "precision": "fp32", "clip": 0.05, "ema": 0.5, "warmup": 1}
    words = ["train", "-t", "fog", "-d", str(pairs(count=3)), "-m", str(weights), "--device", "cpu"]
    words += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return lambda out: [*words, "-o", str(out)]


def run(arguments, monkeypatch):
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["ebr-engine", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)


def same(folder):
    """The prompts `one` and `two` are one, and so are the logs of their runs, to rounding."""
    one, two = (load_prompt(folder / f"{name}.safetensors") for name in ("one", "two"))
    start = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) * 0.02
    assert (one.residual - two.residual).norm() < 1e-3 * (one.residual - start).norm()
    assert torch.allclose(one.alpha, two.alpha, atol=1e-5)
    logs = [(folder / f"{name}.run" / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for mine, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert mine["iteration"] == other["iteration"]
        assert abs(mine["loss"] / other["loss"] - 1) < 1e-4
        assert abs(mine["gradient"] / other["gradient"] - 1) < 1e-3


@pytest.mark.parametrize("shared", [(), ("--set", "sequence_parallel=true")], ids=["samples", "tokens"])
def test_two_processes_are_one_with_the_summed_batch(command, tmp_path, monkeypatch, capsys, shared):
    run(command(tmp_path / "one.safetensors"), monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    words = [sys.executable, "-c", COMMAND, *command(tmp_path / "two.safetensors"), *shared]
    other = os.environ | place | {"RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=other, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        run([*command(tmp_path / "two.safetensors"), *shared], monkeypatch)
        stdout, stderr = second.communicate(timeout=120)
    assert (second.returncode, stdout) == (0, ""), stderr
    assert "two.safetensors" in capsys.readouterr().out
    same(tmp_path)


@pytest.mark.slow
def test_torchrun_starts_them(command, tmp_path, monkeypatch):
    run(command(tmp_path / "one.safetensors"), monkeypatch)
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words = [*launcher, *command(tmp_path / "two.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    same(tmp_path)


def test_a_process_alone_needs_no_group():
    tensors = [torch.ones(2), torch.zeros(3)]
    with joined("cpu") as (world, device):
        assert (world, device) == (World(0, 1), "cpu")
        world.mean(tensors)
        world.wait()
    assert tensors[0].tolist() == [1, 1]
    assert not torch.distributed.is_initialized()
