"""The commands as a person runs them, with the bundled backbone: files in, files out."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from ebr_engine.evaluation import quality
from ebr_engine.media.images import read_image
from ebr_engine.prompts import catalogue

ORIENTATION = 0x0112


@pytest.fixture
def photos(tmp_path):
    """A folder with a JPEG that lies on its side and a 16-bit PNG with alpha, both pieces of a real photo."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    cat = data.chelsea()
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turn by 90° clockwise to see it upright
    exif[0x010F] = "Maker"
    Image.fromarray(cat[60:100, 150:214]).rotate(90, expand=True).save(folder / "cat.jpg", exif=exif, quality=95)
    pixels = cat[100:131, 120:171].astype(np.uint16) * 257
    pixels[..., 0] += 77  # no multiple of 257: eight bits could not hold it
    alpha = np.linspace(0, 65535, 31 * 51).reshape(31, 51, 1).astype(np.uint16)
    import pyvips

    pyvips.Image.new_from_array(np.concatenate((pixels, alpha), axis=2)).copy(interpretation="rgb16").pngsave(
        str(folder / "deep" / "cat.png")
    )
    return folder


def test_a_folder_of_photos_is_restored(photos, tmp_path):
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    command = [sys.executable, "-c", "from ebr_engine.cli import main; main()"]
    command += ["restore", str(photos), "-o", str(tmp_path / "out"), "--task", "haze", "--compare", "--steps", "1"]
    command += ["--device", "cpu", "--precision", "fp32"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL, env=os.environ)
    assert (result.returncode, result.stderr) == (0, "")
    assert "2 of 2 restored" in result.stdout
    out = tmp_path / "out"
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("[!.]*") if path.is_file())
    assert found == ["cat.jpg", "cat_compare.png", "deep/cat.png", "deep/cat_compare.png"]
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before

    upright = read_image(photos / "cat.jpg")
    assert (upright.height, upright.width) == (40, 64)
    cat = data.chelsea()[60:100, 150:214] / 255
    assert np.abs(upright.pixels - cat).mean() < 0.03  # not turned, not mirrored
    restored = read_image(out / "cat.jpg")
    assert (restored.height, restored.width, restored.bits, restored.format) == (40, 64, 8, ".jpg")
    with Image.open(out / "cat.jpg") as file:
        assert file.size == (64, 40)
        assert file.getexif()[ORIENTATION] == 1
        assert file.getexif()[0x010F] == "Maker"
    both = read_image(out / "cat_compare.png").pixels
    assert both.shape == (40, 128, 3)
    np.testing.assert_allclose(both[:, :64], upright.pixels, atol=0.6 / 255)
    assert np.abs(both[:, 64:] - restored.pixels).mean() < 0.02  # the right half has not been through JPEG
    assert np.abs(both[:, :64] - both[:, 64:]).max() > 0.01

    source, deep = read_image(photos / "deep" / "cat.png"), read_image(out / "deep" / "cat.png")
    assert (deep.height, deep.width, deep.bits) == (31, 51, 16)
    assert np.array_equal(deep.alpha, source.alpha)
    assert np.unique(np.rint(deep.pixels * 65535) % 257).size > 100  # sixteen bits of picture, not eight
    beside = read_image(out / "deep" / "cat_compare.png")
    assert (beside.bits, beside.pixels.shape) == (16, (31, 102, 3))
    assert np.array_equal(beside.pixels[:, :51], source.pixels)
    assert np.array_equal(beside.pixels[:, 51:], deep.pixels)
    assert np.array_equal(beside.alpha, np.concatenate((source.alpha, source.alpha), axis=1))


def test_the_command_and_the_library_agree(cli, photos):
    from ebr_engine import Restorer

    options = "-o out.png --task rain --seed 5 --precision fp32"
    code, _, stderr = cli("restore", photos / "deep" / "cat.png", *options.split())
    assert (code, stderr) == (0, "")
    pixels = read_image(photos / "deep" / "cat.png").pixels
    expected = Restorer(precision="fp32").restore(pixels, task="rain", seed=5)
    np.testing.assert_allclose(read_image("out.png").pixels, expected, atol=0.6 / 65535)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "fog"], ["'fog'", "haze"]),
        (["--task", "haze", "--device", "abacus"], ["abacus"]),
        (["--task", "haze", "--backbone", "sdxl"], ["'sdxl'", "mini"]),
        (["--task", "haze", "--tile", "20"], ["tile", "20"]),
        (["--task", "haze", "--model", "nowhere"], ["nowhere"]),
        (["--task", "haze", "--schedule", "released", "--steps", "1"], ["released", "1 steps"]),
    ],
)
def test_what_the_engine_refuses_is_one_line_and_leaves_nothing(cli, photos, arguments, words):
    code, stdout, stderr = cli("restore", photos / "cat.jpg", "-o", "out.jpg", *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    for word in words:
        assert word in stderr
    assert not Path("out.jpg").exists()


def test_eval_measures_and_writes_every_score(cli, monkeypatch):
    monkeypatch.setattr(quality, "measure", partial(quality.measure, photos=("chelsea",)))
    options = "--task haze --size 64 --device cpu --precision fp32 -o scores.json"
    code, stdout, stderr = cli("eval", *options.split())
    assert code == 0
    assert len(stderr.splitlines()) == len(quality.ROWS)
    assert all("haze" in line and "chelsea" in line and "dB" in line for line in stderr.splitlines())
    assert "photos 64 x 64" in stdout
    assert "| task | input | empty prompt | naive prompt | EBR prompt | gain |" in stdout
    record = json.loads(Path("scores.json").read_text())
    assert (record["size"], record["strength"], record["device"], record["dtype"]) == ("64", 0.75, "cpu", "torch.float32")
    assert [score["row"] for score in record["scores"]] == list(quality.ROWS)
    assert quality.markdown(record["scores"]) in stdout
    assert quality.markdown(record["scores"], "ssim", 3) in stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "fog"], ["fog", "haze"]),
        (["--size", "63"], ["--size", "63"]),
        (["--size", "huge"], ["--size", "huge"]),
        (["--precision", "int4"], ["int4", "bf16"]),
        (["--prompts", "nowhere", "--task", "haze", "--size", "64"], ["nowhere", "haze.safetensors"]),
    ],
)
def test_eval_refuses_in_one_line(cli, monkeypatch, arguments, words):
    monkeypatch.setattr(quality, "measure", partial(quality.measure, rows=("EBR prompt",)))
    code, stdout, stderr = cli("eval", *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    for word in words:
        assert word in stderr


def test_a_picture_is_seen_finer_unless_that_is_left_out(cli):
    Image.fromarray(data.chelsea()[100:140, 120:184]).save("wet.png")
    for name, options in {"auto": [], "1": ["--supersample", "1"], "2": ["--supersample", "2"]}.items():
        assert cli("restore", "wet.png", "-o", f"{name}.png", "--task", "rain", *options)[0] == 0
    auto, plain, fine = (read_image(f"{name}.png").pixels for name in ("auto", "1", "2"))
    assert np.array_equal(auto, fine)
    assert np.abs(plain - fine).mean() > 1 / 255
    code, _, stderr = cli("restore", "wet.png", "-o", "no.png", "--task", "rain", "--supersample", "3")
    assert code == 2
    assert "--supersample" in stderr


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """The demo's photos, small; the bundled prompts."""
    assets = tmp_path / "assets"
    (assets / "demo").mkdir(parents=True)
    (assets / "mini").symlink_to(catalogue.ASSETS / "mini")
    for task in ("haze", "rain", "lowlight"):
        Image.fromarray(data.chelsea()[100:132, 120:168]).save(assets / "demo" / f"{task}.jpg")
    monkeypatch.setattr(catalogue, "ASSETS", assets)
    return assets / "demo"


def test_the_demo_writes_every_photo_beside_its_input(cli, small_demo):
    for _ in range(2):  # a second run replaces the first one's
        code, stdout, stderr = cli("demo", "-o", "shown")
        assert (code, stderr) == (0, "")
        assert "Input beside output: shown/*_compare.png" in stdout
        names = sorted(path.name for path in Path("shown").iterdir())
        assert names == sorted(f"{task}{end}" for task in ("haze", "rain", "lowlight") for end in (".jpg", "_compare.png"))
    assert read_image("shown/rain_compare.png").pixels.shape == (32, 96, 3)


def test_the_demo_tells_when_it_failed(cli, small_demo):
    (small_demo / "lowlight.jpg").write_bytes((small_demo / "lowlight.jpg").read_bytes()[:300])
    code, stdout, stderr = cli("demo", "-o", "shown")
    assert code == 1
    assert stderr.count("error: ") == 1
    assert "lowlight.jpg" in stderr
    assert "Input beside output" not in stdout


def test_the_demos_photos_are_bundled():
    photos = sorted((catalogue.ASSETS / "demo").glob("*.jpg"))
    assert {photo.stem for photo in photos} == {"haze", "rain", "lowlight"}
    for photo in photos:
        assert read_image(photo).format == ".jpg"
