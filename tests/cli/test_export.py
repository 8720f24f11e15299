"""From a backbone to another runtime's file and back to pictures: what torch gives, and every wrong request in one line."""

import shutil
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ebr_engine import Restorer
from ebr_engine.cli import app
from ebr_engine.engine.fallback import Fitting
from ebr_engine.engine.run import Engine
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from tests.real_layout import FLUX, WAN, write_flux, write_released_prompt, write_wan
from tests.tiny import make_prompt, save_tiny

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

CLOSE = 1e-3
HEIGHT, WIDTH = 16, 24  # of the graph of one size


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny model of mini's kind, two prompts of different lengths, and a graph of one size."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "tiny.safetensors", num_layers=1)
    for rows in (4, 5):
        make_prompt(rows, rows, blocks=1).save(folder / f"{rows}.safetensors")
    arguments = ["export", "-o", folder / "haze.onnx", "--size", f"{HEIGHT}x{WIDTH}", *model_of(folder)]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "keep beside it: haze.onnx.tables" in result.stdout
    return folder


def model_of(folder):
    return ["--model", folder / "tiny.safetensors", "--prompt", folder / "4.safetensors"]


def picture(path, height, width):
    """A smooth 16-bit picture, so that rounding does not count."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pixels = np.stack([0.5 + 0.3 * np.sin(x / 9 + c) * np.cos(y / 7) for c in range(3)], axis=2).astype(np.float32)
    write_image(path, Picture(pixels, bits=16))
    return read_image(path).pixels


@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (13, 21), (37, 53)])
def test_a_graph_of_one_size_restores_pictures_of_that_size_and_larger_ones_in_tiles(cli, tiny, height, width):
    pixels = picture("in.png", height, width)
    code, _, stderr = cli("restore", "in.png", "-o", "out.png", "--engine", tiny / "haze.onnx", "--device", "cpu")
    assert (code, stderr) == (0, "")
    restorer = Restorer(model=tiny / "tiny.safetensors", device="cpu", precision="fp32")
    restorer.backbone.fixed = (1, HEIGHT, WIDTH)  # torch's trunk, with the graph's tiles
    expected = restorer.restore(pixels, prompt=tiny / "4.safetensors")
    assert np.abs(expected - pixels).max() > 0.01
    np.testing.assert_allclose(read_image("out.png").pixels, expected, atol=CLOSE)


def test_several_pictures_run_one_by_one(tiny):
    restorer = Restorer.from_engine(tiny / "haze.onnx", device="cpu")
    images = torch.rand(3, 3, HEIGHT, WIDTH)
    together = restorer.restore(images)
    for image, restored in zip(images, together):
        torch.testing.assert_close(restorer.restore(image), restored, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "more", "words"),
    [
        ((8, 24), [], ["made for 1 frame(s) of 16 x 24 pixels", "8 x 24", "--dynamic"]),
        ((40, 24), ["--tile", "16"], ["16 x 24", "tile"]),
        ((16, 24), ["--offload", "blocks"], ["blocks", "codec"]),
    ],
)
def test_what_a_graph_of_one_size_cannot_do_is_told(cli, tiny, size, more, words):
    picture("in.png", *size)
    code, _, stderr = cli("restore", "in.png", "-o", "out.png", "--engine", tiny / "haze.onnx", "--device", "cpu", *more)
    assert code != 0
    assert len(stderr.splitlines()) == 1
    assert all(word in stderr for word in words), stderr


def test_graph_and_tables_have_to_belong_together(cli, tiny, tmp_path):
    picture("in.png", HEIGHT, WIDTH)
    shutil.copy(tiny / "haze.onnx", tmp_path)

    def error(engine):
        code, _, stderr = cli("restore", "in.png", "-o", "out.png", "--engine", engine, "--device", "cpu")
        assert code == 2
        assert len(stderr.splitlines()) == 1
        return stderr

    assert "no such engine file: haze.onnx.tables" in error("haze.onnx")
    other = ["--model", tiny / "tiny.safetensors", "--prompt", tiny / "5.safetensors"]
    assert cli("build", "-o", "other.ebr", "--device", "cpu", "--precision", "fp32", *other)[0] == 0
    (tmp_path / "other.ebr").rename("haze.onnx.tables")
    assert "not the tables of haze.onnx" in error("haze.onnx")
    shutil.copy(tiny / "haze.onnx.tables", tmp_path)
    assert "haze.onnx" in error("haze.onnx.tables")
    (tmp_path / "haze.onnx").write_bytes(b"no graph")
    assert "onnxruntime cannot run haze.onnx" in error("haze.onnx")


def test_tables_of_another_shape_are_refused(tiny):
    from ebr_engine.errors import EngineError
    from ebr_engine.export.engine_file import load_engine
    from ebr_engine.export.graph import check_tables

    step = load_engine(tiny / "haze.onnx", torch.device("cpu")).tables[0][0]
    shapes = {name: list(table.shape) for name, table in step._asdict().items()}
    check_tables(shapes, step, tiny / "haze.onnx")
    with pytest.raises(EngineError, match=r"prompt_key is \[1, 1, 2, 4, 12\], the graph takes \[1, 1, 2, 5, 12\]"):
        check_tables(shapes | {"prompt_key": [1, 1, 2, 5, 12]}, step, tiny / "haze.onnx")


def test_an_exported_trunk_cannot_be_built_again(tiny, tmp_path):
    restorer = Restorer.from_engine(tiny / "haze.onnx", device="cpu")
    with pytest.raises(ValueError, match="exported"):
        restorer.build(tmp_path / "x.ebr", restorer.plan())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "x.bin"], ["x.bin", ".onnx, .plan, .pt2"]),
        (["-o", "x.onnx", "--format", "aoti"], ["x.onnx", "aoti", ".pt2"]),
        (["-o", "x.onnx", "--size", "32"], ["--size 32", "HxW"]),
        (["-o", "x.onnx", "--size", "32x33"], ["multiples of 8", "32x33", "32x40"]),
        (["-o", "x.onnx", "--size", "32x32", "--frames", "5"], ["one frame at a time", "5"]),
        (["-o", "x.onnx", "--device", "cuda"], ["--device", "aoti"]),
        (["-o", "x.onnx", "--opset", "9"], ["opset", "9"]),
        (["-o", "x.pt2", "--precision", "fp8"], ["fp8", "bf16 or fp16"]),
        (["-o", "there.onnx"], ["there.onnx exists", "--overwrite"]),
    ],
)
def test_a_wrong_request_is_told_in_one_line_and_writes_nothing(cli, tiny, tmp_path, arguments, words):
    (tmp_path / "there.onnx").touch()
    code, stdout, stderr = cli("export", *arguments, *model_of(tiny))
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1
    assert all(word in stderr for word in words), stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("onnx", ["export", "-o", "x.onnx"], "onnx"),
        ("tensorrt", ["export", "-o", "x.plan"], "tensorrt"),
        ("onnxruntime", ["restore", "in.png", "-o", "out.png", "--device", "cpu"], "onnx"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(cli, tiny, monkeypatch, package, arguments, extra):
    monkeypatch.setitem(sys.modules, package, None)
    picture("in.png", HEIGHT, WIDTH)
    model = model_of(tiny) if arguments[0] == "export" else ["--engine", tiny / "haze.onnx"]
    code, stdout, stderr = cli(*arguments, *model)
    assert (code, stdout) == (2, "")
    assert f"pip install 'ebr-engine[{extra}]'" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [None, (1, 32, 32)], ids=["any size", "one size"])
def test_mini_itself(cli, fixed):
    pixels = picture("in.png", 32, 32)
    assert cli("export", "-o", "haze.onnx", "--task", "haze", *(["--size", "32x32"] if fixed else []))[0] == 0
    assert cli("restore", "in.png", "-o", "out.png", "--engine", "haze.onnx", "--device", "cpu")[0] == 0
    restorer = Restorer(device="cpu", precision="fp32")
    backbone = replace(restorer.backbone, fixed=fixed)  # one size leaves the grid of tokens no room to move
    expected = Restorer.from_backbone(Engine(backbone, backbone.device, "none", "off", Fitting())).restore(pixels, "haze")
    np.testing.assert_allclose(read_image("out.png").pixels, expected, atol=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "sizes"), [("wan", WAN), ("flux", FLUX)])
@pytest.mark.parametrize("how", [[], ["--size", "32x48"]])
def test_real_layouts_give_what_torch_gives(cli, tmp_path, monkeypatch, backbone, sizes, how):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    (write_wan if backbone == "wan" else write_flux)(tmp_path / "model")
    blocks = sizes["num_layers"] + sizes.get("num_single_layers", 0)
    write_released_prompt(tmp_path / "rain.pt", backbone, 226 if backbone == "wan" else 40, 24, blocks)
    model = ["--backbone", backbone, "--model", "model", "--prompt", "rain.pt", "--schedule", "released", "--steps", "3"]
    frames = ["--frames", "5"] if how and backbone == "wan" else []
    code, _, stderr = cli("export", "-o", "rain.onnx", *model, *how, *frames)
    assert (code, stderr) == (0, "")
    sources, height, width = {"in.png": "out.png"}, *((32, 48) if how else (37, 53))
    picture("in.png", height, width)
    if backbone == "wan":
        sources["in.mkv"] = "out.mkv"
        clip("in.mkv", 5, 32, 48)
    store = ["--codec", "ffv1", "--pix-fmt", "gbrp16le", "--device", "cpu"]
    for source, target in sources.items():
        code, _, stderr = cli("restore", source, "-o", f"graph_{target}", "--engine", "rain.onnx", *store)
        assert (code, stderr) == (0, "")
        assert cli("restore", source, "-o", f"torch_{target}", *model, "--precision", "fp32", *store)[0] == 0
        # A picture in a graph of five frames is five equal frames, which is another input than one frame.
        if not (frames and source == "in.png"):
            np.testing.assert_allclose(pixels_of(f"graph_{target}"), pixels_of(f"torch_{target}"), atol=CLOSE)


def clip(path, frames, height, width):
    from ebr_engine.media.video import VideoInfo, write_video

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    info = VideoInfo(width, height, fps=Fraction(25), time_base=Fraction(1, 25), bits=16, pix_fmt="gbrp16le")
    with write_video(path, info, codec="ffv1", pix_fmt="gbrp16le") as writer:
        for i in range(frames):
            writer.write(np.repeat((0.5 + 0.3 * np.sin(x / 9 + y / 7 + i / 3))[..., None], 3, 2).astype(np.float32))


def pixels_of(path):
    from ebr_engine.media.video import open_video

    if path.endswith(".png"):
        return read_image(path).pixels
    with open_video(path) as reader:
        return np.stack([frame.pixels for frame in reader])
