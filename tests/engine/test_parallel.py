"""Tokens over several processes give what one gives, in runs and in learning, compiled too; and send what the formula says."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.parallel_cost import sent
from benchmarks.roofline import Workload
from ebr_engine.backbones.wan.model import WanConfig
from tests.engine.parallel_checks import CONFIGS, LATENTS, WAN

ROOT = Path(__file__).parents[2]
ROUNDING = 1e-5  # float32
SIZES = (2, 4)


def found_by(file, processes, *checks):
    """What checks find in so many processes, by their name and the ranks that share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    words = [sys.executable, "-m", "tests.engine.parallel_checks", str(file), *checks]
    started = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [process.communicate(timeout=1800)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(errors)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by(tmp_path_factory.mktemp("parallel") / "found.json", 4, "trunks", "gradients", "sent")


@pytest.mark.parametrize("size", SIZES)
def test_shared_tokens_give_what_one_device_gives(found, size):
    errors = found[f"trunks, {size}"]
    assert len(errors) == 12
    assert max(errors.values()) < ROUNDING, errors


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_of_a_prompts_gradients_is_that_of_one_device(found, size):
    errors = found[f"gradients, {size}"]
    assert len(errors) == 6
    assert max(errors.values()) < ROUNDING, errors


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_formula(found, name, size):
    config = CONFIGS[name]
    work = Workload(name, "", config, (), tokens=15, text=0 if isinstance(config, WanConfig) else 7)
    batch = LATENTS[name][0] * (LATENTS[name][2] if name == "flux2" else 1)
    size_sent, messages = found[f"sent, {size}"][name]
    assert size_sent == sent(work, size, element=4, batch=batch)
    assert messages == 2 * config.blocks + 1


def test_a_trunk_alone_sends_nothing():
    work = Workload("wan", "", WAN, (), tokens=15, text=0)
    assert sent(work, 1, element=4) == 0


@pytest.mark.slow
def test_blocks_of_real_width(tmp_path):
    errors = found_by(tmp_path / "found.json", 2, "wide")["wide, 2"]
    assert max(errors.values()) < ROUNDING, errors


@pytest.mark.slow
def test_tiles_of_a_codec_over_several_processes(tmp_path):
    pytest.importorskip("diffusers")
    found = found_by(tmp_path / "found.json", 4, "codecs")
    for size in SIZES:
        assert max(found[f"codecs, {size}"].values()) < ROUNDING, found


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["compiled", "inductor"])
def test_a_compiler_takes_messages_into_its_graph(tmp_path, compiler):
    errors = found_by(tmp_path / "found.json", 2, compiler)[f"{compiler}, 2"]
    assert max(errors.values()) < ROUNDING, errors
