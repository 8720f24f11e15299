"""`Restorer`: any kind of picture in and the same kind out; what is no picture and what cannot be loaded is told in one line."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from ebr_engine import Restorer
from ebr_engine.bridge.sampler import make_table
from ebr_engine.errors import BackboneError, EbrError
from ebr_engine.prompts.catalogue import TASKS
from tests.tiny import picture

EPS = torch.finfo(torch.float32).eps
SIZES = [(37, 53), (8, 8), (1, 1), (5, 64)]


@pytest.mark.parametrize(("dtype", "size"), [*product((np.uint8, np.uint16, np.float16, np.float32, np.float64), SIZES)])
def test_an_array_comes_back_as_it_came(restorer, prompt, dtype, size):
    pixels = picture(*size)[0].permute(1, 2, 0).numpy()
    top = np.iinfo(dtype).max if dtype in (np.uint8, np.uint16) else 1
    image = np.rint(pixels * top).astype(dtype) if top > 1 else pixels.astype(dtype)
    before = image.copy()
    result = restorer.restore(image, prompt=prompt)
    assert isinstance(result, np.ndarray)
    assert (result.dtype, result.shape) == (dtype, image.shape)
    assert np.array_equal(image, before)
    # The same picture as a float tensor gives the same result, but for the last rounding.
    exact = restorer.restore(torch.from_numpy(image.astype(np.float32) / np.float32(top)).permute(2, 0, 1), prompt=prompt)
    rounding = 0.5 if top > 1 else np.finfo(dtype).eps
    np.testing.assert_allclose(result.astype(np.float64), exact.permute(1, 2, 0).numpy() * top, atol=rounding + top * EPS)
    assert not np.array_equal(result, image)


@pytest.mark.parametrize(("dtype", "size"), [*product((torch.float32, torch.bfloat16, torch.float64), SIZES)])
@pytest.mark.parametrize("batch", [None, 2])
def test_a_tensor_comes_back_as_it_came(restorer, prompt, dtype, size, batch):
    image = picture(*size, batch=batch or 1).to(dtype)
    image = image if batch else image[0]
    before = image.clone()
    result = restorer.restore(image, prompt=prompt)
    assert (result.dtype, result.shape, result.device) == (dtype, image.shape, image.device)
    assert 0 <= result.min() <= result.max() <= 1
    assert torch.equal(image, before)
    assert not torch.equal(result, image)


def test_strides_do_not_matter(restorer, prompt):
    image = picture(16, 24)[0]
    strided = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(restorer.restore(strided, prompt=prompt), restorer.restore(image, prompt=prompt))
    array = image.permute(1, 2, 0).numpy()
    flipped = np.ascontiguousarray(array[::-1])[::-1]
    flipped.flags.writeable = False
    assert np.array_equal(restorer.restore(flipped, prompt=prompt), restorer.restore(array.copy(), prompt=prompt))


@pytest.mark.parametrize(
    ("mode", "result_mode"),
    [*((mode, mode) for mode in ("RGB", "RGBA", "L", "LA", "I;16")), ("P", "RGB"), ("1", "L"), ("CMYK", "RGB"), ("PA", "RGBA")],
)
@pytest.mark.parametrize("size", [(37, 53), (1, 1)])
def test_a_pil_image_comes_back_as_it_came(restorer, prompt, mode, result_mode, size):
    rgb = (picture(*size)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    alpha = Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size))
    if mode == "I;16":
        image = Image.fromarray(rgb[..., 1].astype(np.uint16) * 257)
    else:
        source = Image.fromarray(rgb)
        source.putalpha(alpha)
        image = source.convert(mode) if mode in ("RGBA", "LA", "PA") else source.convert("RGB").convert(mode)
    result = restorer.restore(image, prompt=prompt)
    assert (result.mode, result.size) == (result_mode, (size[1], size[0]))
    if mode in ("RGBA", "LA", "PA"):
        assert result.getchannel("A").tobytes() == image.convert("RGBA").getchannel("A").tobytes()
    if mode in ("RGB", "RGBA"):
        expected = restorer.restore(rgb, prompt=prompt)
        assert np.array_equal(np.asarray(result.convert("RGB")), expected)


def test_a_palettes_transparency_and_the_colour_profile_survive(restorer, prompt):
    image = Image.new("P", (9, 7), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((2, 3), 0)
    image.info = {"transparency": 0, "icc_profile": b"profile"}
    result = restorer.restore(image, prompt=prompt)
    assert result.mode == "RGBA"
    assert result.getpixel((2, 3))[3] == 0
    assert result.getpixel((0, 0))[3] == 255
    assert result.info == {"icc_profile": b"profile"}


def test_sixteen_bits_of_a_grey_pil_image_are_used(restorer, prompt):
    values = np.linspace(20000, 40000, 64, dtype=np.uint16).reshape(8, 8)
    result = np.asarray(restorer.restore(Image.fromarray(values), prompt=prompt))
    assert result.dtype == np.uint16
    rgb = restorer.restore(np.repeat(values[..., None], 3, axis=-1).astype(np.float32) / 65535, prompt=prompt)
    np.testing.assert_allclose(result, rgb @ [0.299, 0.587, 0.114] * 65535, atol=0.6)


def test_a_seed_means_one_result(restorer, prompt):
    image = picture()
    first = restorer.restore(image, prompt=prompt, seed=3)
    assert torch.equal(first, restorer.restore(image, prompt=prompt, seed=3))
    assert not torch.equal(first, restorer.restore(image, prompt=prompt, seed=4))


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2**-6), ("fp8", 2**-4)])
def test_lower_precision_stays_near_float32(restorer, weights, prompt, relative_rms, precision, bound, monkeypatch):
    monkeypatch.setattr("ebr_engine.backbones.layers.cpu_has_bf16", lambda: True)
    # A unit in the last place is 2⁻⁸ of a bf16 number and 2⁻³ of an e4m3 one: half of it, and a few in a row.
    table = make_table("fast", 0.2)
    state = torch.randn(1, 192, 1, 3, 5)

    def velocity(engine):
        plan = engine.bake([(prompt, 1.0)], table)
        return plan.averaged(engine.backbone.velocity)(state, plan.entries[2])

    lower = Restorer(model=weights, device="cpu", precision=precision)
    assert 2**-10 < relative_rms(velocity(lower), velocity(restorer)) < bound
    result = lower.restore(picture(), prompt=prompt)
    assert result.dtype == torch.float32
    assert relative_rms(result, restorer.restore(picture(), prompt=prompt)) < bound


def test_fp8_is_not_bf16(weights, prompt, monkeypatch):
    monkeypatch.setattr("ebr_engine.backbones.layers.cpu_has_bf16", lambda: True)
    results = [Restorer(model=weights, device="cpu", precision=p).restore(picture(), prompt=prompt) for p in ("bf16", "fp8")]
    assert not torch.equal(*results)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_bundled_and_does_something(task):
    image = picture(32, 32)
    result = Restorer(device="cpu").restore(image, task=task, steps=1)
    assert result.shape == image.shape
    assert result.isfinite().all()
    assert not torch.equal(result, image)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("photo.jpg", ["photo.jpg", "No such file"]),
        (None, ["NoneType"]),
        (np.zeros(8, np.uint8), ["[H, W, 3]", "(8,)"]),
        (np.zeros((8, 8, 5), np.uint8), ["(8, 8, 5)"]),
        (np.zeros((0, 8, 3), np.uint8), ["(0, 8, 3)"]),
        (np.zeros((8, 8, 3), np.int32), ["int32"]),
        (np.full((8, 8, 3), np.nan), ["not finite"]),
        (np.full((8, 8, 3), 1.5), ["[0, 1]", "1.5"]),
        (np.full((8, 8, 3), 128.0, np.float32), ["[0, 1]", "128"]),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ["uint8"]),
        (torch.zeros(8, 8, 3), ["(8, 8, 3)"]),
        (torch.zeros(1, 1, 3, 8, 8), ["[B, 3, H, W]"]),
        (torch.zeros(0, 3, 8, 8), ["(0, 3, 8, 8)"]),
        (torch.full((3, 8, 8), -0.1), ["[0, 1]", "-0.1"]),
        (torch.full((3, 8, 8), torch.inf), ["not finite"]),
        (Image.new("F", (8, 8)), ["mode F"]),
        (Image.new("I", (8, 8)), ["mode I"]),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(restorer, prompt, image, words, one_line):
    with pytest.raises(EbrError) as error:
        restorer.restore(image, prompt=prompt)
    one_line(error, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backbone": "sdxl"}, ["'sdxl'", "mini"]),
        ({"precision": "int4"}, ["'int4'", "bf16", "fp32", "fp8"]),
        ({"device": "cuda:99"}, ["cuda:99"]),
        ({"device": "abacus"}, ["'abacus'", "cuda"]),
        ({"device": "meta"}, ["'meta'", "cuda"]),
        ({"device": "cpu:x"}, ["'cpu:x'"]),
    ],
)
def test_an_engine_that_cannot_be_made_says_why(arguments, words, one_line):
    with pytest.raises(EbrError) as error:
        Restorer(**arguments)
    one_line(error, words)


def test_weights_that_cannot_be_read_are_named(tmp_path, prompt, one_line):
    prompt.save(tmp_path / "prompt.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("missing.safetensors", "junk.safetensors", "prompt.safetensors"):
        with pytest.raises(BackboneError) as error:
            Restorer(model=tmp_path / name, device="cpu")
        one_line(error, [name])


def test_loading_does_not_wait_for_torchs_compiler(weights):
    script = "import sys; from ebr_engine import Restorer; import torch\n"
    script += f"Restorer(model={str(weights)!r}, device='cpu').restore(torch.full((3, 8, 8), 0.5), t0=0.2, steps=2)\n"
    script += "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "[]\n"
