"""`ebr-engine restore`: what is written, what is refused, what a person is told."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ebr_engine.backbones.registry import spec
from ebr_engine.errors import EbrError
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture


def picture(path, value=0.25, size=(6, 10), **more):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.float32)
    pixels[0, 0] = 1
    write_image(path, Picture(pixels, **more))
    return pixels


def failed(result, code, *words):
    """The run ended with `code` and one error line holding `words`; returns the other output."""
    exit_code, stdout, stderr = result
    assert exit_code == code, (stdout, stderr)
    assert stderr.count("error: ") == 1
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr, stderr
    return stdout


def test_one_picture_to_a_file(cli, engine):
    pixels = picture("in.png")
    code, stdout, stderr = cli("restore", "in.png", "-o", "new/out.png", "--task", "haze")
    assert (code, stderr) == (0, "")
    np.testing.assert_allclose(read_image("new/out.png").pixels, 1 - pixels, atol=0.6 / 255)
    assert "in.png -> new/out.png" in stdout
    assert "10 x 6" in stdout
    assert os.listdir("new") == ["out.png"]


def test_depth_alpha_and_grey_survive(cli, engine):
    alpha = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)
    picture("in/deep.png", bits=16, alpha=alpha)
    picture("in/grey.tif", grey=True)
    assert cli("restore", "in", "-o", "out", "--task", "haze")[0] == 0
    deep, grey = read_image("out/deep.png"), read_image("out/grey.tif")
    assert (deep.bits, grey.bits, deep.grey, grey.grey) == (16, 8, False, True)
    np.testing.assert_allclose(deep.alpha, alpha, atol=1 / 65535)
    np.testing.assert_allclose(deep.pixels[1, 1], 0.75, atol=1 / 65535)


def test_folders_are_mirrored_with_formats_kept(cli, engine):
    for name in ("a.png", "sub/b.jpg", "sub/deeper/c.webp"):
        picture(Path("in", name))
    Path("in/readme.txt").write_text("nothing to restore")
    code, stdout, _ = cli("restore", "in", "-o", "out", "-t", "haze")
    assert code == 0
    found = sorted(p.relative_to("out").as_posix() for p in Path("out").rglob("[!.]*") if p.is_file())
    assert found == ["a.png", "sub/b.jpg", "sub/deeper/c.webp"]
    assert "3 of 3 restored" in stdout


def test_settings_reach_the_engine(cli, engine):
    picture("in.png")
    options = "--steps 7 --schedule released --order 2 --t0 0.3 --seed 5 --tile 64 --tile-overlap 8 --mix velocity --strength 0.5"
    options += " --supersample 2 --detail input --deconvolve off --backbone mini --device cpu --model weights"
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze", "--fp8", *options.split())[0] == 0
    (made,) = engine.made
    expected = {"backbone": "mini", "model": "weights", "device": "cpu", "precision": "fp8", "offload": "none", "offline": False}
    assert made | expected == made
    (call,) = engine.calls
    assert call == {
        "task": "haze",
        "prompt": None,
        "size": (6, 10),
        "steps": 7,
        "schedule": "released",
        "order": 2,
        "t0": 0.3,
        "seed": 5,
        "tile": 64,
        "tile_overlap": 8,
        "tile_blend": "latent",
        "detail": "input",
        "deconvolve": "off",
        "supersample": 2,
        "temporal_window": None,
        "mix": "velocity",
        "strength": 0.5,
    }


def test_defaults_leave_choices_to_the_engine(cli, engine):
    picture("in.png")
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze")[0] == 0
    (call,) = engine.calls
    assert call["schedule"] == "fast"
    assert call["seed"] == 42
    assert all(call[name] is None for name in ("steps", "order", "t0", "tile", "tile_overlap"))
    assert engine.made[0]["precision"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", "rain.safetensors"], [("rain.safetensors", 1.0)]),
        (["--prompt", "rain.safetensors:0.7"], [("rain.safetensors", 0.7)]),
        (["-p", "rain.safetensors:0.7", "-p", "old.pt"], [("rain.safetensors", 0.7), ("old.pt", 1.0)]),
        (["--prompt", "rain.safetensors:0.7", "old.pt:3e-1"], [("rain.safetensors", 0.7), ("old.pt", 0.3)]),
        (["--prompt", "a:2.safetensors:0.5"], [("a:2.safetensors", 0.5)]),
        (["--prompt", "odd.pt:7"], [("odd.pt:7", 1.0)]),
        (["--prompt", "no-suffix:-1"], [("no-suffix", -1.0)]),
    ],
)
def test_prompts_and_weights(cli, engine, arguments, expected):
    picture("in.png")
    for name in ("rain.safetensors", "old.pt", "a:2.safetensors", "odd.pt:7", "no-suffix"):
        Path(name).write_bytes(b"x")
    assert cli("restore", "in.png", *arguments, "-o", "out.png")[0] == 0
    assert engine.calls[0]["prompt"] == [(Path(name), weight) for name, weight in expected]
    assert engine.calls[0]["task"] is None


def test_a_windows_drive_is_no_weight():
    from ebr_engine.jobs.texts import _split

    assert _split(r"C:\rain.safetensors") == (r"C:\rain.safetensors", 1.0)
    assert _split(r"C:\rain.safetensors:0.5") == (r"C:\rain.safetensors", 0.5)


def test_compare_puts_input_beside_output(cli, engine):
    pixels = picture("in.jpg")
    assert cli("restore", "in.jpg", "-o", "out.jpg", "--task", "haze", "--compare")[0] == 0
    both = read_image("out_compare.png").pixels
    assert both.shape == (6, 20, 3)
    np.testing.assert_allclose(both[2:, 4:10], pixels[2:, 4:], atol=0.05)
    np.testing.assert_allclose(both[2:, 14:], 1 - pixels[2:, 4:], atol=0.05)


def test_a_corrupt_picture_does_not_stop_the_others(cli, engine):
    picture("in/a.png")
    picture("in/c.png")
    Path("in/b.png").write_bytes(Path("in/a.png").read_bytes()[:60])
    stdout = failed(cli("restore", "in", "-o", "out", "--task", "haze"), 1, "b.png", "damaged")
    assert sorted(os.listdir("out")) == [".ebr-journal.jsonl", "a.png", "c.png"]
    assert "2 of 3 restored, 1 failed" in stdout


def test_running_out_of_memory_on_one_picture_does_not_stop_the_others(cli, engine, monkeypatch):
    class OutOfMemoryError(RuntimeError):
        """As torch.OutOfMemoryError is."""

    restore = engine.restore

    def hungry(self, image, **settings):
        if image.shape[0] > 50:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nlong advice")
        return restore(self, image, **settings)

    monkeypatch.setattr(engine, "restore", hungry)
    picture("in/a.png")
    picture("in/big.png", size=(60, 60))
    picture("in/c.png")
    failed(cli("restore", "in", "-o", "out", "--task", "haze"), 1, "big.png", "memory", "--tile")
    assert sorted(os.listdir("out")) == [".ebr-journal.jsonl", "a.png", "c.png"]


def test_quiet_prints_errors_only(cli, engine):
    picture("in.png")
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze", "-q") == (0, "", "")
    Path("bad.png").write_bytes(b"bad")
    assert failed(cli("restore", "bad.png", "-o", "out2.png", "--task", "haze", "-q"), 1, "bad.png") == ""


def test_bad_requests_are_refused_before_any_work(cli, engine):
    picture("in.png")
    Path("p.safetensors").write_bytes(b"x")
    base = ["restore", "in.png", "-o", "out.png"]
    failed(cli(*base), 2, "neither --task nor --prompt")
    failed(cli(*base, "--task", "haze", "--prompt", "p.safetensors"), 2, "both --task and --prompt")
    failed(cli(*base, "--prompt", "nope.safetensors"), 2, "nope.safetensors", "no such prompt")
    failed(cli(*base, "--prompt", "p.safetensors:nan"), 2, "finite")
    failed(cli(*base, "--task", "haze", "--fp8", "--precision", "bf16"), 2, "contradict")
    failed(cli(*base, "--task", "haze", "--t0", "1.5"), 2, "--t0", "1.5")
    failed(cli(*base, "--task", "haze", "--order", "3"), 2, "--order")
    failed(cli(*base, "--task", "haze", "--strength", "3"), 2, "--strength")
    failed(cli(*base, "--task", "haze+nosuch"), 2, "'nosuch'")
    failed(cli(*base, "--task", "haze:x+rain"), 2, "haze:x", "number")
    failed(cli(*base, "--task", "haze", "--schedule", "slow"), 2, "--schedule", "released")
    failed(cli(*base, "--tsk", "haze"), 2, "--tsk", "--task", "see ebr-engine restore --help")
    failed(cli("restore", "in.png", "--task", "haze"), 2, "--out")
    failed(cli("restore", "p.safetensors", "-o", "out.png"), 2, "nothing to restore")
    failed(cli("restore", "nope.png", "-o", "out.png", "--task", "haze"), 2, "nope.png", "no such file")
    failed(cli("restore", "in.png", "-o", "in.png", "--task", "haze", "--overwrite"), 2, "is an input")
    failed(cli("restore", "in.png", "-o", "p.safetensors/x/", "--task", "haze"), 2, "cannot write")
    assert engine.made == []
    assert sorted(os.listdir()) == ["in.png", "p.safetensors"]


def test_what_the_engine_refuses_is_one_line_and_ends_the_run(cli, engine):
    picture("a.png")
    picture("b.png")
    failed(cli("restore", "a.png", "b.png", "-o", "out", "--task", "fog"), 2, "unknown task 'fog'", "haze")
    failed(cli("restore", "a.png", "-o", "out", "--task", "haze", "--device", "cuda:9"), 2, "cuda:9")
    assert not Path("out").exists()


def test_one_picture_the_engine_refuses_does_not_stop_the_others(cli, engine, monkeypatch):
    restore = engine.restore

    def picky(self, image, **settings):
        if image.shape[0] < 3:
            raise EbrError("2 x 2 is too small")
        return restore(self, image, **settings)

    monkeypatch.setattr(engine, "restore", picky)
    picture("in/a.png")
    picture("in/b.png", size=(2, 2))
    picture("in/c.png")
    stdout = failed(cli("restore", "in", "-o", "out", "--task", "haze"), 1, "b.png: 2 x 2 is too small")
    assert "2 of 3 restored, 1 failed" in stdout
    assert sorted(os.listdir("out")) == [".ebr-journal.jsonl", "a.png", "c.png"]


def test_existing_outputs_are_kept_without_overwrite(cli, engine):
    picture("in.png")
    Path("out.png").write_text("mine")
    failed(cli("restore", "in.png", "-o", "out.png", "--task", "haze"), 2, "out.png", "--overwrite")
    assert Path("out.png").read_text() == "mine"
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze", "--overwrite")[0] == 0
    assert read_image("out.png").width == 10


def test_transparency_is_never_lost_silently(cli, engine):
    picture("in.png", alpha=np.zeros((6, 10), np.float32))
    failed(cli("restore", "in.png", "-o", "out.jpg", "--task", "haze"), 1, "transparency")
    assert engine.calls == []


def test_an_interrupted_run_leaves_nothing_half_written(cli, engine, monkeypatch):
    picture("in/a.png")
    picture("in/b.png")
    replaced = []

    def replace(source, target, original=os.replace):
        replaced.append(target)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    failed(cli("restore", "in", "-o", "out", "--task", "haze"), 130, "interrupted")
    assert sorted(os.listdir("out")) == [".ebr-journal.jsonl", "a.png"]


def test_names_that_cannot_be_printed_do_not_stop_it(cli, engine):
    if sys.platform in ("win32", "darwin"):
        pytest.skip("such names exist on Linux only")
    picture("in.png")
    odd = os.fsdecode(b"odd-\xff.png")
    os.rename("in.png", odd)
    code, stdout, stderr = cli("restore", odd, "-o", "out", "--task", "haze")
    assert (code, stderr) == (0, "")
    assert r"odd-\udcff.png" in stdout
    assert os.path.exists(Path("out", odd))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(8.0, None), (44.4, "about 44 seconds"), (432.0, "about 7.2 minutes"), (60000.0, "about 17 hours"), (None, None)],
)
def test_a_long_run_says_how_long_before_it_begins(cli, engine, seconds, said):
    picture("in.png")
    engine.seconds = seconds
    code, stdout, stderr = cli("restore", "in.png", "-o", "out.png", "--task", "haze")
    assert code == 0
    assert "about" not in stdout
    assert stderr == (f"note: {said} for this file\n" if said else "")


def test_quiet_runs_are_not_estimated(cli, engine):
    picture("in.png")
    engine.estimate = None  # cannot be called
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze", "--quiet") == (0, "", "")


def test_the_progress_bar_shows_on_a_terminal(cli, engine, monkeypatch):
    import pty
    import subprocess

    picture("in/a.png")
    picture("in/b.png")
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += "import conftest, types, time\n"
    script += "fake = types.ModuleType('ebr_engine.engine.restorer'); fake.Restorer = conftest.FakeRestorer\n"
    script += "sys.modules['ebr_engine.engine.restorer'] = fake\n"
    script += "conftest.app(['restore', 'in', '-o', 'out', '--task', 'haze'])\n"
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    running = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=follower, env=environment, text=True
    )
    os.close(follower)
    shown = b""
    while True:  # a terminal holds few kilobytes: it is read while the command writes
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux's end of file
            break
        if not data:
            break
        shown += data
    stdout, _ = running.communicate()
    os.close(leader)
    assert running.returncode == 0
    assert "2 of 2 restored" in stdout
    assert b"\x1b" not in stdout.encode()
    text = shown.decode()
    assert "1/2 a.png" in text
    assert "2/2 b.png" in text
    assert "left" in text


def test_a_missing_prompt_is_told_before_any_model_is_asked_for(cli, engine, monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    picture("in.png")
    failed(cli("restore", "in.png", "-o", "out.png", "--task", "rain", "--backbone", "wan"), 2, "'rain'", "prompts add")
    failed(cli("build", "-o", "rain.ebr", "--task", "rain", "--backbone", "flux"), 2, "'rain'", "prompts add")
    assert engine.made == []


def test_the_released_size_is_the_backbones(cli, engine, monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    (tmp_path / "prompts" / "wan").mkdir(parents=True)
    (tmp_path / "prompts" / "wan" / "haze.safetensors").touch()
    picture("in.png", alpha=np.ones((6, 10), np.float32), bits=16)
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze", "--backbone", "wan", "--size", "released")[0] == 0
    assert engine.calls[0]["size"] == (4, 6)
    written = read_image("out.png")
    assert (written.pixels.shape, written.alpha.shape, written.bits) == ((4, 6, 3), (4, 6), 16)


def test_an_engine_file_needs_no_task_and_takes_none(cli, engine, monkeypatch):
    def opened(path, **settings):
        engine.made.append({"engine": path, **settings})
        return object.__new__(engine)

    monkeypatch.setattr(engine, "from_engine", staticmethod(opened), raising=False)
    monkeypatch.setattr(engine, "backbone", SimpleNamespace(name="mini", spec=spec("mini")), raising=False)
    picture("in.png")
    failed(cli("restore", "in.png", "-o", "out.png", "--engine", "x.ebr", "--task", "haze"), 2, "its own prompt")
    assert cli("restore", "in.png", "-o", "out.png", "--engine", "x.ebr", "--device", "cpu")[0] == 0
    placed = {"device": "cpu", "offload": "none", "compile": "auto", "max_memory": None, "low_memory": False, "devices": None}
    assert engine.made == [{"engine": Path("x.ebr"), "vae": None, **placed}]


def test_the_sizes_that_are_expected_are_those_in_which_pictures_will_be_seen(cli, engine, monkeypatch):
    picture("in.png")
    stages = [SimpleNamespace(supersample=times) for times in (1, 2)]
    planned = type(engine("mini").plan("haze"))
    monkeypatch.setattr(planned, "stages_for", lambda self, height, width: stages if (height, width) == (6, 10) else [])
    engine.expected.clear()
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze")[0] == 0
    assert engine.expected == [[(12, 20)]]
