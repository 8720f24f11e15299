"""Whole runs: interrupted ones go on to the bit, files are whole or absent, and what was done is told."""

import hashlib
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from ebr_engine.engine.restorer import Restorer
from ebr_engine.engine.run import Engine
from ebr_engine.errors import EbrError
from ebr_engine.evaluation.collecting import collected
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.media.degradations import seeds
from ebr_engine.media.images import read_image
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.training.config import LearnConfig, read_toml, resolve
from ebr_engine.training.learner import shareable
from ebr_engine.training.loop import learn
from ebr_engine.training.validation import InPlace
from tests.tiny import TINY

pytestmark = pytest.mark.usefixtures("small_pool")


@pytest.fixture
def quick(weights):
    settings = {
        "tokens": 4,
        "iterations": 6,
        "batch": 2,
        "size": 32,
        "warmup": 1,
        "scenes": 4,
        "precision": "fp32",
        "validation_count": 1,
    }
    return LearnConfig("haze", model=str(weights), device="cpu", **settings)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C."""


def interrupt(iteration, iterations, loss, at=3):
    if iteration == at:
        raise Interrupted


def heard(config, out, **how):
    """The iterations that a run tells, and their losses."""
    told = []
    learn(config, out, callback=lambda *progress: told.append(progress), **how)
    return told


@pytest.mark.parametrize("form", ["scenes", "pairs"])
def test_a_resumed_run_is_the_same_run(quick, pairs, tmp_path, form):
    config = replace(quick, ema=0.9, clip=0.1, accumulate=2, save_last_n=2)
    if form == "pairs":
        config = replace(config, data=str(pairs(count=3)), optimizer="adamw", per_block=True)
    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    expected = heard(config, whole)
    assert [step[:2] for step in expected] == [(i, 6) for i in range(1, 7)]
    with pytest.raises(Interrupted):
        learn(config, halves, callback=interrupt)
    assert [path.name for path in (tmp_path / "halves.run").glob("*.ckpt")] == ["00000003.ckpt"]
    assert not halves.exists()
    assert heard(config, halves) == expected[3:]  # the losses too, to the last bit
    first, second = load_prompt(whole), load_prompt(halves)
    assert torch.equal(first.residual, second.residual)
    assert torch.equal(first.alpha, second.alpha)
    log = [json.loads(line) for line in (tmp_path / "halves.run" / "log.jsonl").read_text().splitlines()]
    assert [(row["iteration"], 6, row["loss"]) for row in log] == expected
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_two_hundred_steps_are_a_hundred_and_a_hundred(quick, tmp_path):
    config = replace(quick, iterations=200)
    learn(config, tmp_path / "whole.safetensors")
    with pytest.raises(Interrupted):
        learn(config, tmp_path / "halves.safetensors", callback=lambda *step: interrupt(*step, at=100))
    learn(config, tmp_path / "halves.safetensors")
    first, second = (load_prompt(tmp_path / f"{name}.safetensors") for name in ("whole", "halves"))
    assert torch.equal(first.residual, second.residual)
    assert torch.equal(first.alpha, second.alpha)


def test_a_crash_loses_what_came_after_the_last_checkpoint_only(quick, tmp_path):
    def crash(iteration, iterations, loss):
        if iteration == 5:
            raise ZeroDivisionError

    out, other = tmp_path / "prompt.safetensors", tmp_path / "other.safetensors"
    config = replace(quick, save_every=1, save_last_n=2)
    with pytest.raises(ZeroDivisionError):
        learn(config, out, callback=crash)
    kept = sorted(path.name for path in (tmp_path / "prompt.run").glob("*.ckpt"))
    assert kept == ["00000003.ckpt", "00000004.ckpt"]
    assert [step[0] for step in heard(config, out)] == [5, 6]
    assert torch.equal(load_prompt(out).residual, learn(config, other).residual)


def test_the_file_holds_the_prompt_and_how_it_was_learned(quick, tmp_path):
    out = tmp_path / "new" / "folder" / "prompt.safetensors"
    config = replace(quick, task="rain", t0=0.3, iterations=1)
    prompt, saved = learn(config, out), load_prompt(out)
    assert torch.equal(saved.residual, prompt.residual)
    assert torch.equal(saved.alpha, prompt.alpha)
    assert not saved.residual.requires_grad
    assert (saved.backbone, saved.task, saved.t0, saved.t_min, saved.steps) == ("mini", "rain", 0.3, config.t_min, 5)
    assert saved.training.items() >= json.loads(json.dumps(shareable(asdict(config)))).items()
    assert 0 < saved.training["final_loss"] < 10
    assert saved.training["seconds"] >= 0
    saved.check("mini", TINY.width, TINY.num_layers)
    assert resolve(read_toml(out.with_suffix(".run") / "config.toml")) == config


def test_a_checkpoint_of_another_run_is_refused_and_kept(quick, tmp_path):
    out = tmp_path / "prompt.safetensors"
    with pytest.raises(Interrupted):
        learn(quick, out, callback=interrupt)
    for change, names in (({"task": "rain"}, "task"), ({"t0": 0.3, "batch": 4}, "t0, batch"), ({"size": (32, 64)}, "size")):
        with pytest.raises(EbrError, match=rf"other settings \({names}\).*--no-resume"):
            learn(replace(quick, **change), out)
    assert list((tmp_path / "prompt.run").glob("*.ckpt"))
    assert [step[0] for step in heard(replace(quick, iterations=8, save_every=7), out)] == [4, 5, 6, 7, 8]


def test_a_run_can_start_anew_beside_a_damaged_checkpoint(quick, tmp_path):
    out = tmp_path / "prompt.safetensors"
    (tmp_path / "prompt.run").mkdir()
    (tmp_path / "prompt.run" / "00000003.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(EbrError, match=r"00000003\.ckpt.*--no-resume"):
        learn(quick, out)
    assert [step[0] for step in heard(quick, out, resume=False)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_prompt_is_replaced_only_if_asked(quick, tmp_path):
    out = tmp_path / "prompt.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(EbrError, match=r"prompt\.safetensors exists.*--overwrite"):
        learn(quick, out)
    assert out.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]
    learn(replace(quick, iterations=1), out, overwrite=True)
    assert load_prompt(out).task == "haze"


def test_a_loss_that_is_not_finite_ends_the_run(quick, tmp_path):
    out = tmp_path / "prompt.safetensors"
    with pytest.raises(EbrError, match="loss is nan at iteration 1"):
        learn(replace(quick, alpha=float("nan")), out)
    assert not out.exists()


def test_no_seed_of_the_test_split_is_used(quick, pool, tmp_path, monkeypatch):
    used = []
    original = torch.Generator.manual_seed

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            used.append(seed)
            return original(self, seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    learn(replace(quick, iterations=1, seed=11), tmp_path / "prompt.safetensors")
    assert 11 in used
    assert len(set(used)) > 4
    assert sorted(pool.numbers) == [0, 1, 2, 3]
    assert all(number in seeds("train") or number in seeds("validation") for number in used)
    assert all(number in seeds("train") for number in pool.numbers)


def test_validation_scores_and_shows_and_the_report_tells(quick, pairs, tmp_path):
    out = tmp_path / "fog.safetensors"
    held = pairs("held", count=3)
    config = replace(quick, task="fog", data=str(pairs()), validation=str(held), validate_every=3, validation_count=2)
    prompt = learn(config, out)
    folder = tmp_path / "fog.run"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    sheets = {f"samples/0000000{i}_{pair}.png" for i in (3, 6) for pair in (0, 1)} | {"worst/1.png", "worst/2.png"}
    plots = {f"{name}.{form}" for name in ("curves", "gain") for form in ("png", "svg")}
    assert names == {"config.toml", "log.jsonl", "report.md", "summary.json"} | sheets | plots
    assert all(read_image(folder / sheet).width >= 3 * 256 for sheet in sheets)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "psnr" in row] == [3, 6]
    assert 0 < rows[-1]["psnr"] < 60
    assert -1 < rows[-1]["ssim"] < 1
    assert prompt.training["psnr"] == rows[-1]["psnr"]
    report = (folder / "report.md").read_text()
    for words in (
        "# fog",
        "6 iterations",
        f"{rows[-1]['psnr']:.2f} dB",
        "s a step (median)",
        "restored − empty prompt",
        "95 % intervals",
        "![Curves](curves.png)",
        "00000006_1.png",
        "| batch | 2 |",
        f"| 6 | {rows[-1]['loss']:.5g}",
    ):
        assert words in report
    assert (prompt.training["pairs"], prompt.training["skipped"]) == (4, 0)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ways"]["restored"]["psnr"] == pytest.approx(rows[-1]["psnr"])
    assert list(summary["ways"]) == ["input", "empty prompt", "restored"]
    assert (summary["learned_from"]["pairs"], summary["config"]["batch"], summary["iterations"]) == (4, 2, 6)
    assert summary["restoration"]["prompts"][0]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert summary["seconds_a_step"] > 0
    assert collected([folder]).rows[0][:2] == ("fog.run", "PSNR in dB")


def test_pairs_of_one_target_are_validated_each(quick, pairs, tmp_path):
    root = pairs(count=3)
    records = [{"lq": f"input/0{i}.png", "gt": "target/00.png"} for i in range(3)]
    (root / "list.json").write_text(json.dumps(records))
    config = replace(quick, task="fog", data=str(root), validation=str(root / "list.json"), validation_count=3, iterations=1)
    learn(config, tmp_path / "fog.safetensors")
    assert len(json.loads((tmp_path / "fog.run" / "summary.json").read_text())["rows"]) == 3


def test_pairs_without_validation_are_told_not_to_be_validated(quick, pairs, tmp_path):
    learn(replace(quick, task="fog", data=str(pairs()), iterations=1), tmp_path / "fog.safetensors")
    assert "Not validated" in (tmp_path / "fog.run" / "report.md").read_text()
    assert json.loads((tmp_path / "fog.run" / "summary.json").read_text())["ways"] == {}


@pytest.mark.parametrize("on_policy", [0, 3])
def test_validation_is_what_restoring_does(quick, pairs, tmp_path, on_policy):
    out, held = tmp_path / "fog.safetensors", pairs("held", count=1)
    config = replace(quick, task="fog", data=str(pairs()), validation=str(held), validate_every=6, on_policy=on_policy)
    told = learn(config, out).training
    assert told.items() >= json.loads(json.dumps(shareable(asdict(config)))).items()  # no score in a setting's place
    restorer = Restorer(model=config.model, device="cpu", precision="fp32", compile="off")
    degraded, clean = (read_image(held / side / "00.png").pixels[8:40, 12:44] for side in ("input", "target"))
    restored = restorer.restore(degraded, prompt=out, steps=on_policy or None)
    images = [torch.from_numpy(x.copy()).permute(2, 0, 1)[None] for x in ((restored * 255).round() / 255, clean)]
    assert told["psnr"] == pytest.approx(psnr(*images), abs=1e-3)
    assert told["ssim"] == pytest.approx(ssim(*images), abs=1e-4)


def test_unseen_scenes_validate_where_there_are_no_pairs(quick, tmp_path, monkeypatch):
    from ebr_engine.training import validation

    rendered = []
    original = validation.render
    monkeypatch.setattr(validation, "render", lambda seed, size: (rendered.append(seed), original(seed, size))[1])
    learn(replace(quick, iterations=1, validate_every=1, validation_count=2), tmp_path / "x.safetensors")
    assert len(rendered) == 2
    summary = json.loads((tmp_path / "x.run" / "summary.json").read_text())
    assert [(row["height"], row["width"]) for row in summary["rows"]] == [(256, 256)] * 2
    assert summary["learned_from"] == {"scenes": 4, "seed": 0}
    assert all(seed in seeds("validation") for seed in rendered)


class Board:
    """Stands for TensorBoard's writer."""

    def __init__(self, folder):
        self.scalars, self.images = [], []
        Board.last = self

    def add_scalar(self, *row):
        self.scalars.append(row)

    def add_image(self, name, image, step, dataformats):
        assert (image.ndim, dataformats) == (3, "HWC")
        self.images.append((name, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_numbers_and_pictures(quick, tmp_path, monkeypatch):
    import sys
    import types

    for name, module in (("tensorboard", {}), ("torch.utils.tensorboard", {"SummaryWriter": Board})):
        fake = types.ModuleType(name)
        fake.__dict__.update(module)
        fake.__spec__ = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, fake)
    learn(replace(quick, iterations=2, validate_every=2, validation_count=1, tensorboard=True), tmp_path / "x.safetensors")
    steps = {(name, step) for name, _, step in Board.last.scalars}
    assert {("train/loss", 1), ("train/loss", 2), ("train/learning_rate", 1), ("validation/psnr", 2)} <= steps
    assert Board.last.images == [("validation/0", 2)]
    assert Board.last.closed


@pytest.mark.parametrize("tracker", [{"tensorboard": True}, {"wandb": "project"}])
def test_a_tracker_that_is_missing_is_told_before_anything_is_done(quick, tmp_path, monkeypatch, tracker):
    from ebr_engine.training import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(EbrError, match="pip install"):
        learn(replace(quick, **tracker), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_validation_does_not_move_what_is_being_learned(monkeypatch):
    ways = [SimpleNamespace(offload="none"), SimpleNamespace(offload="blocks")]
    monkeypatch.setattr(Engine, "fallbacks", lambda self, *how: (ways, "work"))
    assert object.__new__(InPlace).fallbacks((1, 3, 1, 64, 64), None, None, "latent") == (ways[:1], "work")
