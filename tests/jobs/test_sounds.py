"""Restoring sound files: at any rate and length, without seams, and with an answer for what is none."""

import json

import numpy as np
import pytest
import soundfile
import soxr
from typer.testing import CliRunner

from ebr_engine.backbones.mini_audio.codec import HOP, RATE, SoundCodec
from ebr_engine.cli import app
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import EbrError
from ebr_engine.jobs.sounds import added, check_options, framed, level_of, resampled
from ebr_engine.request import RestoreRequest
from tests.tiny import TINY, make_prompt, save_tiny_audio

SHORT = {"steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone whose tokens do not see each other, so that a chunk knows what the whole does, and a prompt for it."""
    folder = tmp_path_factory.mktemp("backbone")
    save_tiny_audio(folder / "tiny.safetensors", per_token=True)
    make_prompt(backbone="mini-audio", width=TINY.width, blocks=TINY.num_layers).save(folder / "noise.safetensors")
    return folder


@pytest.fixture
def restorer(folder, monkeypatch):
    monkeypatch.setattr(SoundCodec, "noise", 0.0)  # which is drawn for a chunk's length
    return Restorer("mini-audio", model=folder / "tiny.safetensors", device="cpu", precision="fp32")


def tune(seconds, rate=RATE, channels=1):
    time = np.arange(round(seconds * rate)) / rate
    waves = [0.3 * np.sin(2 * np.pi * 220 * (c + 1) * time) * (0.3 + np.sin(2 * np.pi * 2 * time) ** 2) for c in range(channels)]
    return np.stack(waves, 1)


def write(path, samples, rate=RATE, subtype="FLOAT"):
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def run(restorer, folder, source, target, **options):
    outcome = restorer.restore_file(source, target, prompt=folder / "noise.safetensors", overwrite=True, **SHORT, **options)
    return soundfile.read(target, always_2d=True)[0], outcome


def ratio(sound, error):
    return 10 * np.log10(np.square(sound).sum() / max(np.square(error).sum(), 1e-20))


@pytest.mark.parametrize("frames", [96, 97])
def test_chunks_are_the_whole_in_their_interior_and_show_no_seam(tmp_path, folder, restorer, frames):
    samples = tune(frames * HOP / RATE)
    source, length, shared = write(tmp_path / "in.wav", samples), 32, 8
    whole, _ = run(restorer, folder, source, tmp_path / "whole.wav", chunk_frames=frames)
    cut, _ = run(restorer, folder, source, tmp_path / "cut.wav", chunk_frames=length, chunk_overlap=shared)
    change, error = whole - samples, cut - whole
    assert ratio(samples, change) < 40, "nothing was changed: the test would not see a seam"
    assert np.abs(error[HOP : (length - shared - 1) * HOP]).max() < 1e-5  # before the first overlap
    assert ratio(change, error) > 25  # a chunk's outermost half frame is coded without its neighbour, and nearly faded out
    jumps, around = np.abs(np.diff(error[:, 0])), np.abs(np.diff(change[:, 0])).max()
    assert jumps.max() < 0.25 * around


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(RATE, 1, 0.3), (44100, 2, 0.5), (8000, 1, 0.4), (48000, 3, 0.01)])
def test_rate_channels_and_length_are_the_inputs(tmp_path, folder, restorer, rate, channels, seconds):
    source = write(tmp_path / "in.wav", tune(seconds, rate, channels), rate, "PCM_24")
    restored, outcome = run(restorer, folder, source, tmp_path / "out.flac")
    info = soundfile.info(tmp_path / "out.flac")
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (rate, channels, round(seconds * rate), "PCM_24")
    assert (outcome.rate, outcome.channels, outcome.length, outcome.bits) == (rate, channels, info.frames, 24)
    assert np.isfinite(restored).all()


def test_what_lies_above_the_models_band_stays(tmp_path, folder, restorer):
    rate = 48000
    low, high = tune(0.5, rate), 0.1 * np.sin(2 * np.pi * 15000 * np.arange(rate // 2) / rate)[:, None]
    restored, _ = run(restorer, folder, write(tmp_path / "in.wav", low + high, rate), tmp_path / "out.wav")
    spectrum = np.abs(np.fft.rfft((restored - low - high)[:, 0] * np.hanning(len(low))))
    hertz = np.fft.rfftfreq(len(low), 1 / rate)
    assert spectrum[hertz > 8500].max() < 1e-3 * spectrum[hertz < 7000].max()


def test_a_file_twice_as_loud_is_restored_alike(tmp_path, folder, restorer):
    quiet, _ = run(restorer, folder, write(tmp_path / "a.wav", tune(0.3)), tmp_path / "a_out.wav")
    loud, _ = run(restorer, folder, write(tmp_path / "b.wav", 8 * tune(0.3)), tmp_path / "b_out.wav")
    np.testing.assert_allclose(loud, 8 * quiet, atol=1e-4)


def test_channels_do_not_know_each_other(tmp_path, folder, restorer):
    both = tune(0.3, channels=2)
    stereo, _ = run(restorer, folder, write(tmp_path / "in.wav", both), tmp_path / "out.wav")
    swapped, _ = run(restorer, folder, write(tmp_path / "in.wav", both[:, ::-1]), tmp_path / "out.wav")
    np.testing.assert_allclose(stereo, swapped[:, ::-1], atol=1e-5)


def test_silence_stays_silence(tmp_path, folder, restorer):
    restored, outcome = run(restorer, folder, write(tmp_path / "in.wav", np.zeros((500, 1))), tmp_path / "out.wav")
    assert not restored.any()
    assert "silent" in outcome.note


def test_the_level_leaves_pauses_out():
    speech = np.concatenate((tune(1.0), np.zeros((3 * RATE, 1))))
    assert level_of([speech[:10000], speech[10000:]]) == pytest.approx(level_of([tune(1.0)]), rel=0.1)


def test_resampling_in_blocks_is_aligned_and_as_long_as_the_sound():
    samples = tune(0.5, 44100, 2)
    blocks = [samples[i : i + 5000] for i in range(0, len(samples), 5000)]
    there = np.concatenate(list(resampled(blocks, 44100, RATE, 2)))
    assert abs(len(there) - RATE // 2) <= 1
    back = np.concatenate(list(resampled([there], RATE, 44100, 2)))[: len(samples)]
    assert ratio(samples[500 : len(back) - 500], back[500:-500] - samples[500 : len(back) - 500]) > 50
    np.testing.assert_allclose(there, soxr.resample(samples.astype(np.float32), 44100, RATE), atol=1e-4)


def test_frames_and_sums_know_no_blocks():
    samples = np.arange(1000.0).reshape(-1, 1).astype(np.float32)
    frames = [piece.pixels for piece in framed([samples[:300], samples[300:301], samples[301:]], HOP, 1)]
    assert len(frames) == 4
    assert np.array_equal(np.concatenate(frames, 1)[0, :1000], samples[:, 0])
    assert not np.concatenate(frames, 1)[0, 1000:].any()
    changes = [samples[:10], samples[10:900], np.zeros((0, 1)), samples[900:]]
    total = np.concatenate(list(added(iter([samples[:400], samples[400:]]), iter(changes))))
    assert np.array_equal(total, 2 * samples)
    short = np.concatenate(list(added(iter([samples]), iter([samples[:10]]))))
    assert np.array_equal(short[10:], samples[10:])


def command(*arguments):
    return CliRunner().invoke(app, ["restore", *map(str, arguments)], catch_exceptions=True)


def test_the_command_restores_a_folder_goes_on_and_tells(tmp_path, folder):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write(tmp_path / "in" / "a.wav", tune(0.1), subtype="PCM_16")
    write(tmp_path / "in" / "sub" / "b.flac", tune(0.1), subtype="PCM_16")
    (tmp_path / "in" / "notes.txt").write_text("none of ours")
    (tmp_path / "in" / "broken.wav").write_bytes(b"RIFF1234WAVEnothing")
    model = ("--backbone", "mini-audio", "--model", folder / "tiny.safetensors", "--prompt", folder / "noise.safetensors")
    first = command(tmp_path / "in", "-o", tmp_path / "out", *model, "--steps", 2, "--json")
    told = [json.loads(line) for line in first.stdout.splitlines()]
    assert first.exit_code == 1
    done = {one["input"].rpartition("/")[2]: one for one in told if "input" in one}
    assert (done["a.wav"]["rate"], done["a.wav"]["channels"], done["a.wav"]["samples"], done["a.wav"]["bits"]) == (
        RATE,
        1,
        1600,
        16,
    )
    assert "cannot be read as sound" in done["broken.wav"]["error"]
    assert soundfile.info(tmp_path / "out" / "sub" / "b.flac").frames == 1600
    (tmp_path / "in" / "broken.wav").unlink()
    again = command(tmp_path / "in", "-o", tmp_path / "out", *model, "--steps", 2, "--json")
    assert json.loads(again.stdout.splitlines()[-1])["summary"]["skipped"] == 2
    assert again.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("in.wav", "-o", "out.wav", "--task", "haze"), "is sound, which is restored with --backbone mini-audio"),
        (("in.wav", "-o", "out.png", "-b", "mini-audio", "--task", "noise"), "cannot write .png, only .wav .flac"),
        (
            ("in.png", "-o", "out.wav", "-b", "mini-audio", "--task", "noise"),
            "is no WAV or FLAC, and mini-audio restores nothing else",
        ),
        ((".", "-o", "out/", "-b", "mini-audio", "--task", "auto"), "task auto looks at pictures"),
        (("in.wav", "-o", "out.wav", "-b", "mini-audio", "--task", "noise", "--crf", "20"), "--crf is for pictures and clips"),
        (
            ("in.wav", "-o", "out.wav", "-b", "mini-audio", "--task", "noise", "--compare"),
            "--compare-as is for pictures and clips",
        ),
        (("in.wav", "-o", "out.wav", "-b", "mini-audio", "--task", "rain"), "mini-audio has no prompt for it"),
        (("empty", "-o", "out/", "-b", "mini-audio", "--task", "noise"), r"no sounds in this folder (looked for .wav .flac)"),
    ],
)
def test_the_command_says_what_cannot_be(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.wav", tune(0.05))
    (tmp_path / "in.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))
    (tmp_path / "empty").mkdir()
    result = command(*arguments)
    assert result.exit_code == 2
    assert words in str(result.exception or "") + result.output
    assert not list(tmp_path.glob("out*"))


def test_options_of_sound_are_taken():
    check_options(RestoreRequest(task="noise", chunk_frames=64, chunk_overlap=8, strict=True, steps=3, seed=1))
    with pytest.raises(EbrError, match="--tile is for pictures"):
        check_options(RestoreRequest(task="noise", tile=128))
