"""`ebr-engine train` and `train-backbone`: learning from the command line, on the bundled backbone and a tiny pool."""

import re
from functools import partial

import pytest
import torch

from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.bridge.process import PROCESSES
from ebr_engine.cli import train
from ebr_engine.cli.learning_options import TRAIN
from ebr_engine.media.degradations import TASKS
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.training import loop, pretrain, scenes
from ebr_engine.training.config import LOSSES, SETTINGS, LearnConfig, read_toml, resolve
from ebr_engine.training.scenes import ScenePool

SMALL = ("--iterations", "2", "--batch", "2", "--size", "32", "--tokens", "3", "--device", "cpu", "--set", "validation_count=1")


@pytest.fixture(scope="module")
def pool():
    """Three small scenes, rendered in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(scenes, "_start", scenes._render_into)
        patch.setattr(scenes, "_run", lambda processes: None)
        return ScenePool(3, 64)


@pytest.fixture(autouse=True)
def small_pool(pool, monkeypatch):
    monkeypatch.setattr(loop, "still_pool", lambda capacity: pool)


def refused(result, *words):
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1, stderr
    for word in words:
        assert word in stderr


def test_a_prompt_is_learned_and_can_be_used_at_once(cli, tmp_path):
    code, stdout, stderr = cli("train", "--task", "haze", "-o", "new/haze.safetensors", *SMALL)
    assert code == 0, stderr
    for word in ("new/haze.safetensors", "haze, ebr", "2 iterations", "loss 0."):
        assert word in stdout
    lines = stderr.splitlines()
    assert [line.split(":")[0] for line in lines[:6]] == ["prompt", "model", "data", "objective", "optimisation", "running"]
    assert "tokens 3" in lines[0]
    assert lines[6] == "rendering scenes …"
    assert [line.split()[1] for line in lines[7:]] == ["1/2", "2/2"]
    prompt = load_prompt("new/haze.safetensors")
    assert (prompt.backbone, prompt.task, len(prompt.residual)) == ("mini", "haze", 3)
    assert (prompt.training["iterations"], prompt.training["batch"], prompt.training["loss"]) == (2, 2, "pixel")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["haze.run", "haze.safetensors"]
    assert "haze.run/report.md" in stdout
    assert resolve(read_toml(tmp_path / "new/haze.run/config.toml")).tokens == 3

    from ebr_engine import Restorer

    image = torch.rand(3, 16, 24)
    assert Restorer(device="cpu").restore(image, prompt="new/haze.safetensors", steps=1).isfinite().all()


@pytest.fixture
def runs(monkeypatch):
    """(configuration, out, resume) of runs that are not run."""
    seen = []
    monkeypatch.setattr(loop, "learn", lambda config, out, *, resume, **more: seen.append((config, str(out), resume)))
    return seen


def test_settings_reach_the_run(cli, runs):
    options = "--bridge naive --loss velocity --t0 0.2 --power 0.5 --tokens 4 --alpha 0.2 --iterations 7 --batch 3 --size 40"
    options += " --learning-rate 0.01 --seed 9 --device cpu --no-resume --model weights --set clip=0.5 --set per_block=true"
    assert cli("train", "--task", "snow", "-o", "snow.safetensors", *options.split())[0] == 0
    numbers = {"t0": 0.2, "power": 0.5, "tokens": 4, "alpha": 0.2, "iterations": 7, "batch": 3, "size": 40, "seed": 9}
    more = {"learning_rate": 0.01, "device": "cpu", "model": "weights", "clip": 0.5, "per_block": True}
    expected = LearnConfig("snow", bridge="naive", loss="velocity", **numbers, **more)
    assert runs == [(expected, "snow.safetensors", False)]


def test_defaults_are_the_configurations(cli, runs):
    assert cli("train", "--task", "rain", "-o", "rain.safetensors")[0] == 0
    assert runs == [(LearnConfig("rain"), "rain.safetensors", True)]


def test_the_command_line_comes_before_the_file(cli, runs, tmp_path):
    (tmp_path / "x.toml").write_text('task = "fog"\ndata = "."\nbatch = 5\nt0 = 0.3\nseed = 1\n')
    assert cli("train", "-c", "x.toml", "-o", "x.safetensors", "--set", "batch=6", "--set", "seed=2", "--seed", "3")[0] == 0
    assert runs[0][0] == LearnConfig("fog", data=".", batch=6, t0=0.3, seed=3)


def test_every_setting_is_printed_as_a_file_that_can_be_read(cli, tmp_path):
    code, stdout, _ = cli("train", "--settings")
    assert code == 0
    (tmp_path / "all.toml").write_text(stdout)
    assert resolve(read_toml(tmp_path / "all.toml")) == LearnConfig("haze")


def test_every_option_is_a_setting_with_its_help_default_and_choices(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = " ".join(cli("train", "--help")[1].split())
    assert set(TRAIN) == {name for name, one in SETTINGS.items() if "panel" in one.metadata}
    for name in TRAIN:
        about = SETTINGS[name].metadata
        assert f"--{name.replace('_', '-')} {about.get('short', '')}".strip() in text
        assert about["help"].replace("`", "") in text
        assert "|".join(about.get("choices", ())) in text
    assert set(PROCESSES) == set(SETTINGS["bridge"].metadata["choices"])
    assert "[default: (by backbone)]" in text
    assert "[default: (0.4)]" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "fog", "-o", "fog.safetensors"], ["'fog'", *TASKS]),
        (["--task", "haze", "-o", "haze.pt"], ["haze.pt", ".safetensors"]),
        (["--task", "haze", "-o", "haze.safetensors", "--backbone", "sdxl"], ["'sdxl'", "mini"]),
        (["--task", "haze", "-o", "haze.safetensors", "--bridge", "rope"], ["rope", *PROCESSES]),
        (["--task", "haze", "-o", "haze.safetensors", "--loss", "l1"], ["l1", *LOSSES]),
        (["--task", "haze", "-o", "haze.safetensors", "--t0", "2"], ["t0", "2"]),
        (["--task", "haze", "-o", "haze.safetensors", "--size", "20"], ["crop size", "20"]),
        (["--task", "haze", "-o", "haze.safetensors", "--iterations", "0"], ["iterations", "0"]),
        (["--task", "haze", "-o", "haze.safetensors", "--seed", "2000000000"], ["seed", "2000000000"]),
        (["--task", "haze", "-o", "haze.safetensors", "--device", "abacus"], ["abacus"]),
        (["-o", "haze.safetensors"], ["--task"]),
        (["--task", "haze"], ["--out"]),
        (["--task", "haze", "-o", "x.safetensors", "--set", "batch=x"], ["batch", "'x'"]),
        (["--task", "haze", "-o", "x.safetensors", "--set", "bach=3"], ["'bach'", "'batch'"]),
        (["--task", "fog", "-o", "x.safetensors", "--data", "nowhere", "--device", "cpu"], ["nowhere"]),
        (["-c", "nowhere.toml", "-o", "x.safetensors"], ["nowhere.toml"]),
    ],
)
def test_what_cannot_be_learned_is_told_in_one_line(cli, tmp_path, arguments, words):
    refused(cli("train", *arguments), *words)
    assert not list(tmp_path.iterdir())


def test_missing_weights_are_named(cli, tmp_path):
    code, stdout, stderr = cli("train", "--task", "haze", "-o", "haze.safetensors", "--model", "nowhere.safetensors", *SMALL)
    assert (code, stdout) == (2, "")
    assert stderr.count("error: ") == 1
    assert "nowhere.safetensors" in stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_goes_on(cli, tmp_path, monkeypatch):
    step = train.LossProgress.step

    def interrupted(self, iteration, iterations, loss):
        step(self, iteration, iterations, loss)
        if iteration == 1:
            raise KeyboardInterrupt

    command = ("train", "--task", "haze", "-o", "haze.safetensors", *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(train.LossProgress, "step", interrupted)
        code, _, stderr = cli(*command)
    assert "going on" not in stderr
    assert (code, stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert [file.name for file in tmp_path.rglob("*.ckpt")] == ["00000001.ckpt"]
    assert not (tmp_path / "haze.safetensors").exists()
    code, _, stderr = cli(*command)
    assert code == 0
    assert "going on after iteration 1 of 2, from haze.run/00000001.ckpt; --no-resume starts anew" in stderr.splitlines()
    assert "iteration 1/2" not in stderr
    assert "iteration 2/2" in stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["haze.run", "haze.safetensors"]
    refused(cli(*command), "haze.safetensors exists", "--overwrite")


def test_a_backbone_is_trained(cli, tmp_path, monkeypatch, pool):
    tiny = WanConfig(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=48,
        out_channels=48,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    )
    quick = partial(pretrain.PretrainConfig, sizes=(64, 64, 64))
    monkeypatch.setattr(pretrain, "ScenePool", lambda *arguments, **settings: pool)
    monkeypatch.setattr(pretrain, "PretrainConfig", quick)
    monkeypatch.setattr(pretrain, "pretrain", partial(pretrain.pretrain, sizes=tiny))
    options = "-o tiny.safetensors --minutes 0.01 --no-compile --seed 3 --batch 2 --size-odds 1,2,1"
    code, stdout, stderr = cli("train-backbone", "mini", *options.split())
    assert code == 0, stderr
    assert stdout == "tiny.safetensors\n"
    first, *_, last = stderr.splitlines()
    assert first == "pre-training mini for 0.01 minutes; see tiny.log.jsonl"
    assert re.fullmatch(r"step \d+, [\d.]+ minutes, 0.0 left, [\d.e+]+ crops a second, loss [\d.]+ at 64", last)
    mini = load_mini(tmp_path / "tiny.safetensors")
    assert mini.trunk.config == tiny
    assert (mini.training["seed"], mini.training["compile"]) == (3, False)
    assert (mini.training["batch"], mini.training["size_odds"]) == (2, [1.0, 2.0, 1.0])
    assert mini.training["iterations"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["giant", "-o", "x.safetensors"], ["giant", "mini"]),
        (["mini", "-o", "x.ckpt"], ["x.ckpt", ".safetensors"]),
        (["mini", "-o", "x.safetensors", "--minutes", "0"], ["--minutes", "0"]),
        (["mini", "-o", "x.safetensors", "--size-odds", "1,2"], ["--size-odds", "1,2"]),
        (["mini", "-o", "x.safetensors", "--size-odds", "1,nan,2"], ["--size-odds", "1,nan,2"]),
        (["mini", "-o", "x.safetensors", "--size-odds", "0,0,0"], ["--size-odds", "0,0,0"]),
        (["mini"], ["--out"]),
        (["mini", "-o", "x.safetensors", "--device", "cuda"], ["no CUDA device", "--device"]),
    ],
)
def test_a_backbone_that_cannot_be_trained_is_told_in_one_line(cli, tmp_path, arguments, words):
    refused(cli("train-backbone", *arguments), *words)
    assert not list(tmp_path.iterdir())
