"""Synthesised sounds, samples of them, and what learns from them: a prompt and a whole backbone of mini-audio's kind."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.mini_audio.codec import HOP, LEVEL, samples_of
from ebr_engine.backbones.mini_audio.model import load_mini_audio
from ebr_engine.backbones.registry import load_backbone
from ebr_engine.errors import EbrError
from ebr_engine.media.sound.degradations import TASKS
from ebr_engine.training import pretrain, synthesis
from ebr_engine.training.config import LearnConfig, resolve
from ebr_engine.training.latents import LatentSamples
from ebr_engine.training.learner import Learner
from ebr_engine.training.loop import learn
from ebr_engine.training.pretrain import PretrainConfig
from ebr_engine.training.pretrain_sound import COURSE, VOCABULARY
from ebr_engine.training.sounds import FULL, LEAD, SoundPool, SoundSamples, levelled
from tests.tiny import TINY, save_tiny_audio

QUICK = LearnConfig(
    "noise", backbone="mini-audio", tokens=4, frames=8, iterations=12, batch=4, warmup=1, t0=0.4, precision="fp32"
)


class Pool:
    """Eight seconds of harmonics in place of what espeak-ng speaks."""

    crops = SoundPool.crops

    def __init__(self):
        time = torch.arange(synthesis.LENGTH) / synthesis.RATE
        waves = [sum(torch.sin(2 * torch.pi * hertz * k * time) / k for k in range(1, 9)) for hertz in (110, 150, 230, 310)]
        self.samples = (torch.stack(waves) * 0.1 * FULL).to(torch.int16)
        self.words = torch.tensor([[0, 4], [0, 5], [1, -1], [2, -1]])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_audio(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_its_number_and_about_as_loud_as_restoring_makes_it(task):
    samples = SoundSamples(replace(QUICK, task=task), Pool())
    degraded, clean = samples.pixels(7)
    assert degraded.shape == clean.shape == (128, 8, 2, 1)
    assert torch.equal(degraded, samples.pixels(7)[0])
    assert not torch.equal(degraded, samples.pixels(8)[0])
    assert not torch.equal(degraded, clean)
    levels = [samples_of(samples.pixels(i)[0][None]).square().mean().sqrt() for i in range(40)]
    assert np.log10(np.array(levels)).mean() == pytest.approx(np.log10(LEVEL), abs=0.1)


def test_a_share_of_the_samples_is_intact():
    samples = SoundSamples(replace(QUICK, intact=0.5), Pool())
    equal = [torch.equal(*samples.pixels(i)) for i in range(40)]
    assert 8 < sum(equal) < 32


def test_quiet_crops_are_not_blown_up():
    sound = torch.full((1, 100), 1e-9)
    degraded, clean = levelled(sound, sound, torch.Generator().manual_seed(0))
    assert degraded.abs().max() < 1e-6
    assert torch.equal(degraded, clean)


def test_learning_a_prompt_lowers_the_loss_and_moves_nothing_else(weights):
    backbone = load_backbone("mini-audio", ModelSource(weights), torch.device("cpu"), "fp32")
    learner = Learner.start(replace(QUICK, learning_rate=0.3), backbone)
    before = {name: value.clone() for name, value in learner.backbone.trunk.state_dict().items()}
    with LatentSamples(learner.config, SoundSamples(learner.config, Pool()), learner.backbone) as latents:
        numbers = list(range(1000, 1016))
        degraded, clean = latents.batch(numbers)
        states = learner.states(numbers, degraded, clean)

        def loss():
            with torch.no_grad():
                return learner.loss(*states, degraded).item()

        first = loss()
        for _ in range(learner.config.iterations):
            learner.step(latents.batch)
        assert loss() < 0.99 * first
    assert all(torch.equal(before[name], value) for name, value in learner.backbone.trunk.state_dict().items())


def test_a_whole_run_writes_a_prompt_that_says_what_it_is(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("ebr_engine.training.loop.still_sounds", lambda count: nullcontext(Pool()))
    config = replace(QUICK, model=str(weights), iterations=2, task="reverb", on_policy=2)
    prompt = learn(config, tmp_path / "reverb.safetensors")
    assert (prompt.backbone, prompt.task, prompt.t0, prompt.steps) == ("mini-audio", "reverb", 0.4, 2)
    assert "Not validated" in (tmp_path / "reverb.run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "haze"}, "unknown task 'haze'; choose one of noise"),
        ({"task": "noise", "data": "pairs"}, "is learned from synthesised sound: leave data out"),
        ({"task": "noise", "unroll": 2, "detail": "input", "ssim_weight": 0.1}, "leave detail, ssim_weight out"),
        ({"task": "noise", "photos": "x", "validate_every": 5}, "leave photos, validate_every out"),
    ],
)
def test_what_sound_is_not_learned_from_is_refused(given, words):
    with pytest.raises(EbrError, match=words):
        resolve({"backbone": "mini-audio", **given})


def test_pre_training_writes_a_backbone_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    seconds = iter(range(0, 10**9, 60))  # every iteration takes a minute
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    course = replace(COURSE, pool=lambda config, run: nullcontext(Pool()))
    sizes = replace(TINY, in_channels=128, out_channels=128, text_dim=16)
    config = PretrainConfig(minutes=50, batch=4, sizes=(8,), size_odds=(1.0,), learning_rate=5e-3, save_every=1000, compile=False)
    out = tmp_path / "tiny.safetensors"
    pretrain.pretrain(out, replace(config, minutes=20), sizes=sizes, course=course)
    pretrain.pretrain(out, config, sizes=sizes, course=course)
    mini = load_mini_audio(out)
    assert mini.training["iterations"] == 50
    assert mini.text_encoder.vocabulary == VOCABULARY
    assert mini.codec.scale.shape == (HOP,)
    (record,) = map(json.loads, out.with_suffix(".log.jsonl").read_text().splitlines())
    assert 0 < record["loss8"] < float("inf")


def test_batches_say_in_words_what_was_done():
    text = SimpleNamespace(tokenize=lambda captions: captions)
    codec = COURSE.measured(COURSE.codec(TINY), Pool(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    latent, captions = COURSE.batch(Pool(), codec, text, PretrainConfig(batch=32, sizes=(16,)), 16, generator)
    assert latent.shape == (32, 128, 16, 2, 1)
    assert latent.isfinite().all()
    said = {caption[0] for caption in captions if caption}
    assert "clean" in said
    assert said <= {"clean", "light", "moderate", "heavy"}
    assert {word for caption in captions for word in caption} <= set(VOCABULARY)
    assert {caption[1] for caption in captions if caption and caption[0] != "clean"} == set(TASKS)
    assert LEAD * HOP < synthesis.LENGTH


@pytest.mark.parametrize("maker", ["_music", "_tones", "_effects"])
def test_what_is_made_here_is_the_same_for_a_seed(maker):
    first, second = (getattr(synthesis, maker)(np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (synthesis.LENGTH,)
    assert np.isfinite(first).all()
    assert np.abs(first).max() > 0
    assert np.array_equal(first, second)


@pytest.mark.skipif(not shutil.which(synthesis.PROGRAM), reason="needs espeak-ng")
def test_speech_is_spoken_and_levelled():
    sound = next(sound for sound in map(synthesis.render, range(20)) if sound.caption[0] == "speech")
    assert sound.caption[1] in synthesis.PITCHES
    assert np.square(sound.samples).mean() ** 0.5 == pytest.approx(LEVEL, rel=0.01)
    long, short = (synthesis.speak("one two three four five", "en-us", speed, 50) for speed in (120, 220))
    assert len(long) > 1.3 * len(short)


def test_without_espeak_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setattr(synthesis.shutil, "which", lambda name: None)
    with pytest.raises(EbrError, match="apt install espeak-ng"):
        SoundPool(1)
