"""Runs over several processes from the outside: the restorer and the command give what one process gives, and end in order."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ebr_engine import Restorer
from ebr_engine.engine.ranks import devices_of
from ebr_engine.errors import DeviceLost, EngineError, EngineWarning
from tests.tiny import make_prompt, picture, save_tiny

OPTIONS = {"precision": "fp32", "compile": "off"}


@pytest.fixture(scope="module")
def weights4(tmp_path_factory):
    """A tiny backbone of four heads."""
    return save_tiny(tmp_path_factory.mktemp("four") / "tiny.safetensors", num_attention_heads=4)


@pytest.fixture(scope="module")
def alone(weights4):
    return Restorer(model=weights4, device="cpu", **OPTIONS)


@pytest.fixture(scope="module")
def both(weights4):
    """Over three devices, of which two can share four heads."""
    with pytest.warns(match="4 heads cannot be shared evenly by 3 devices: 2 compute, 1 stay idle"):
        one = Restorer(model=weights4, devices="cpu,cpu,cpu", **OPTIONS)
    yield one
    one.close()


def prompts(count=1):
    return [make_prompt(seed, width=48) for seed in range(count)]


@pytest.mark.parametrize("how", [{}, {"tile": 32, "tile_overlap": 16}, {"mix": "velocity"}, {"detail": "input"}], ids=str)
def test_a_picture_is_that_of_one_process(alone, both, how):
    pixels, asked = picture(40, 56, batch=2), {"prompt": prompts(2 if "mix" in how else 1), **how}
    assert both.engine.ranks.size == 2
    for seed in (1, 2):  # the second time with tables that are there
        one, two = (restorer.restore(pixels, seed=seed, **asked) for restorer in (alone, both))
        assert (one - two).abs().max() < 1e-5


def test_a_run_that_is_stopped_stops_everywhere_and_another_can_follow(alone, both):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    pixels, plan = picture(), both.plan(prompt=prompts())
    with pytest.raises(KeyboardInterrupt):
        both.restore(pixels, plan=plan, callback=stop)
    assert (both.restore(pixels, plan=plan) - alone.restore(pixels, prompt=prompts())).abs().max() < 1e-5


@pytest.mark.slow
def test_heads_that_no_two_can_share_leave_one_device_at_work(tmp_path):
    path = save_tiny(tmp_path / "three.safetensors", num_attention_heads=3)
    with pytest.warns(EngineWarning, match="3 heads cannot be shared evenly by 2 devices: 1 compute, 1 stay idle"):
        one = Restorer(model=path, devices="cpu,cpu", **OPTIONS)
    assert one.engine.ranks is None
    assert one.restore(picture(), prompt=make_prompt(width=36)).isfinite().all()


@pytest.mark.slow
def test_an_engine_file_runs_over_two_devices(weights4, alone, tmp_path):
    alone.build(tmp_path / "x.ebr", alone.plan(prompt=prompts()))
    with closing(Restorer.from_engine(tmp_path / "x.ebr", devices="cpu,cpu", compile="off")) as two:
        assert (two.restore(picture()) - alone.restore(picture(), prompt=prompts())).abs().max() < 1e-5


@pytest.mark.slow
def test_a_model_that_a_rank_cannot_load_is_told_in_one_line(weights4, monkeypatch):
    monkeypatch.setenv("EBR_CPU_LEVEL", "nothing")  # read by the other process alone: this one has read it
    with pytest.raises(DeviceLost, match=r"rank 1 on cpu has ended \(exit status 1\): unknown EBR_CPU_LEVEL"):
        Restorer(model=weights4, devices="cpu,cpu", **OPTIONS)


def test_there_is_one_group_at_a_time(both, weights4):
    with pytest.raises(EngineError, match="group of processes already"):
        Restorer(model=weights4, devices="cpu,cpu", **OPTIONS)


@pytest.mark.parametrize(
    ("devices", "device", "words"),
    [("cpu,cuda:0", "auto", "no device"), ("cpu,cpu", "cpu", "leave device out"), ("cpu,tpu", "auto", "unknown device")],
)
def test_impossible_devices_are_refused(devices, device, words):
    if torch.cuda.is_available():
        words = words.replace("no device", "all are cpu")
    with pytest.raises(EngineError, match=words):
        devices_of(devices, device)


def test_one_device_needs_no_other_process(weights4):
    one = Restorer(model=weights4, devices="cpu", **OPTIONS)
    assert one.engine.ranks is None


def test_a_rank_that_dies_ends_the_run_in_one_line(weights4, both, alone):
    """Last in this module: nothing can be run after it."""
    victim = both.engine.ranks.others[0]

    def kill(done, total):
        if done == 1:
            os.kill(victim._process.pid, signal.SIGKILL)

    with pytest.raises(DeviceLost, match=r"rank 1 on cpu has ended \(killed by signal 9\)"):
        both.restore(picture(), prompt=prompts(), callback=kill)
    with pytest.raises(DeviceLost, match="rank 1"):
        both.restore(picture(), prompt=prompts())
    both.close()
    assert (alone.restore(picture(), prompt=prompts())).isfinite().all()


@pytest.mark.slow
def test_what_overflows_is_made_again_in_another_precision_on_all_devices(weights4, tmp_path, alone):
    tensors = load_file(weights4)
    with safe_open(weights4, "pt") as file:
        metadata = file.metadata()
    weight = tensors["transformer.blocks.0.attn2.to_q.weight"]  # made too large for fp16; a norm follows
    tensors["transformer.blocks.0.attn2.to_q.weight"] = weight * (3e4 / weight.abs().max())
    save_file(tensors, tmp_path / "large.safetensors", metadata)
    one = Restorer(model=tmp_path / "large.safetensors", device="cpu", precision="fp32", compile="off")
    with closing(Restorer(model=tmp_path / "large.safetensors", devices="cpu,cpu", precision="fp16", compile="off")) as two:
        for _ in range(2):
            with pytest.warns(EngineWarning, match="not finite in fp16; it was made again in fp32"):
                result = two.restore(picture(), prompt=prompts())
    expected = one.restore(picture(), prompt=prompts())
    assert (result - expected).norm() / expected.norm() < 1e-2  # the weights stay what fp16 made of them


@pytest.fixture
def command(tmp_path, weights4):
    """`command(name, *words)`: the words of a run over a folder of three pictures."""
    prompts()[0].save(tmp_path / "p.safetensors")
    (tmp_path / "in").mkdir()
    for number in range(3):
        pixels = picture(40, 56, seed=number)[0].permute(1, 2, 0) * 255
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / "in" / f"{number}.png")

    def words(name, *more):
        asked = ["restore", str(tmp_path / "in"), "-o", f"{tmp_path / name}/", "--prompt", str(tmp_path / "p.safetensors")]
        return [*asked, "--model", str(weights4), "--precision", "fp32", "--compile", "off", *more]

    return words


def pictures(folder):
    return [
        torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).int() for path in sorted(folder.glob("*.png"))
    ]


def started(words, launcher=("-m", "ebr_engine")):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_command_over_two_devices_writes_what_one_writes(command, tmp_path):
    for name, device in (("one", "--device=cpu"), ("two", "--devices=cpu,cpu")):
        process = started(command(name, device))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = (pictures(tmp_path / name) for name in ("one", "two"))
    assert len(two) == 3
    assert max((x - y).abs().max() for x, y in zip(one, two)) <= 1  # a level, where a number lies between two


@pytest.mark.slow
def test_torchrun_starts_them_and_lets_them_go_where_there_is_nothing_to_do(command, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ebr_engine")
    for again in range(2):
        process = started(command("two"), launcher)
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert output.count(" -> ") == (0 if again else 3)
    assert len(pictures(tmp_path / "two")) == 3


@pytest.mark.slow
def test_a_killed_rank_leaves_a_whole_journal_and_the_same_command_goes_on(command, tmp_path):
    words = command("two", "--devices=cpu,cpu", "--steps", "100", "--quiet")
    process = started(words)
    journal, until = tmp_path / "two" / ".ebr-journal.jsonl", time.monotonic() + 120
    while not list(tmp_path.glob("two/0.png")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(children) as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("\n")) == (1, 1), errors
    assert "rank 1 on cpu has ended (killed by signal 9); the run ends with it" in errors
    finished = [json.loads(line) for line in journal.read_text().splitlines()]
    assert finished
    again = started(words)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert len(pictures(tmp_path / "two")) == 3
    assert json.loads(journal.read_text().splitlines()[0]) == finished[0]


@pytest.mark.slow
def test_ctrl_c_ends_all_of_them(command, tmp_path):
    process = started(command("two", "--devices=cpu,cpu", "--steps", "100"))
    until = time.monotonic() + 120
    while not list(tmp_path.glob("two/0.png")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        others = [int(word) for word in file.read().split()]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    for other in others:
        with pytest.raises(ProcessLookupError):
            os.kill(other, 0)
