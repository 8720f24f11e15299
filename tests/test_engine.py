"""`Restorer`: any kind of picture in and the same kind out, and every wrong request told in one line."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from ebr_engine import Restorer
from ebr_engine.bridge import make_table
from ebr_engine.catalogue import ASSETS, TASKS
from ebr_engine.errors import BackboneError, EbrError, PromptError
from ebr_engine.media.tiling import plan_tiles
from ebr_engine.sampler import draw_noise, sample
from ebr_engine.tiled import tiled
from tests.tiny import make_prompt

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def prompt():
    return make_prompt()


def picture(height=24, width=40, batch=1, seed=5):
    """[B, 3, H, W] float32 away from black and white, so that little of a result is clipped."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 0.4 + 0.3


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


def test_a_batch_equals_one_by_one(restorer, prompt, relative_rms):
    images = picture(24, 40, batch=3)
    together = restorer.restore(images, prompt=prompt)
    alone = torch.cat([restorer.restore(image[None], prompt=prompt) for image in images])
    # Sums of at most 48 numbers in another order, in each of five steps through two blocks.
    assert relative_rms(together, alone) < 16 * EPS
    assert not torch.equal(together[0], together[1])


def test_a_batch_in_tiles_equals_one_by_one(restorer, prompt, relative_rms):
    images = picture(40, 56, batch=2)
    together = restorer.restore(images, prompt=prompt, tile=32, tile_overlap=8)
    alone = torch.cat([restorer.restore(image[None], prompt=prompt, tile=32, tile_overlap=8) for image in images])
    assert relative_rms(together, alone) < 16 * EPS


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (32, None), (32, 0), (64, 60)])
def test_tiles_keep_the_size_and_stay_near_one_piece(restorer, prompt, tile, overlap):
    image = picture(43, 101)
    whole = restorer.restore(image, prompt=prompt, tile=0)
    parts = restorer.restore(image, prompt=prompt, tile=tile, tile_overlap=overlap)
    assert parts.shape == image.shape
    assert parts.isfinite().all()
    assert 0 <= parts.min() <= parts.max() <= 1
    assert not torch.equal(parts, whole)
    assert (parts - whole).square().mean() < 0.25 * (image - whole).square().mean()


def test_the_smallest_tiles_cover_any_size(restorer, prompt):
    image = picture(13, 50)
    result = restorer.restore(image, prompt=prompt, tile=8, tile_overlap=0)
    assert result.shape == image.shape
    assert 0 <= result.min() <= result.max() <= 1


def test_a_picture_no_larger_than_a_tile_is_one_piece(restorer, prompt):
    image = picture(37, 53)
    whole = restorer.restore(image, prompt=prompt, tile=0)
    assert torch.equal(restorer.restore(image, prompt=prompt, tile=64, tile_overlap=8), whole)
    assert torch.equal(restorer.restore(image, prompt=prompt), whole)


def test_tiling_changes_nothing_when_pixels_do_not_look_at_each_other(relative_rms):
    degraded = torch.randn(2, 48, 1, 10, 17)
    noise = draw_noise(degraded.shape, 42)
    table = make_table("fast", 0.3)

    def velocity(state, step):
        return torch.tanh(state) * step

    conditioning = [0.5] * len(table)
    whole = sample(velocity, conditioning, degraded, noise, table)
    parts = sample(tiled(velocity, plan_tiles(10, 17, 4, 2), at_once=3), conditioning, degraded, noise, table)
    assert relative_rms(parts, whole) < 5 * 4 * EPS  # four tiles summed in each of five steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 5),
        ({"steps": 3}, 3),
        ({"schedule": "released"}, 20),
        ({"schedule": "exact"}, 19),
        ({"schedule": "uniform", "steps": 2, "order": 1}, 2),
        ({"tile": 16, "tile_overlap": 8}, 5),
        ({"mix": "velocity"}, 5),
    ],
)
def test_the_callback_hears_of_every_step_once(restorer, prompt, settings, steps):
    heard = []
    prompts = [prompt, make_prompt(1)]
    restorer.restore(picture(24, 32), prompt=prompts, callback=lambda *step: heard.append(step), **settings)
    assert heard == [(i + 1, steps) for i in range(steps)]


def test_t0_is_the_prompts_unless_it_is_given(restorer):
    image, mild, strong = picture(), make_prompt(t0=0.1), make_prompt(t0=0.5)
    assert not torch.equal(restorer.restore(image, prompt=mild), restorer.restore(image, prompt=strong))
    assert torch.equal(restorer.restore(image, prompt=mild, t0=0.5), restorer.restore(image, prompt=strong))


def test_the_empty_prompt_needs_a_t0_only(restorer, prompt, relative_rms):
    image = picture()
    empty = restorer.restore(image, t0=prompt.t0)
    silent = restorer.restore(image, prompt=(prompt, 0.0))
    assert relative_rms(silent, empty) < 16 * EPS
    assert relative_rms(restorer.restore(image, prompt=prompt), empty) > 0.01


def test_strength_scales_every_prompt_of_a_request(restorer, prompt, relative_rms):
    image, other = picture(), make_prompt(1)
    assert relative_rms(restorer.restore(image, prompt=prompt, strength=0.0), restorer.restore(image, t0=prompt.t0)) < 16 * EPS
    assert torch.equal(restorer.restore(image, prompt=prompt, strength=1.0), restorer.restore(image, prompt=prompt))
    for mix in ("residual", "velocity"):
        scaled = restorer.restore(image, prompt=[(prompt, 0.5), other], strength=1.5, mix=mix)
        assert torch.equal(scaled, restorer.restore(image, prompt=[(prompt, 0.75), (other, 1.5)], mix=mix))


def test_several_tasks_are_several_prompts():
    restorer, image = Restorer("mini", device="cpu", precision="fp32"), picture()
    both = restorer.restore(image, "rain:0.5+haze")
    files = {task: ASSETS / "mini" / "prompts" / f"{task}.safetensors" for task in ("rain", "haze")}
    assert torch.equal(both, restorer.restore(image, prompt=[(files["rain"], 0.5), files["haze"]]))


def test_half_a_prompt_twice_is_the_prompt(restorer, prompt, relative_rms):
    image = picture()
    once = restorer.restore(image, prompt=[(prompt, 1.0)])
    twice = restorer.restore(image, prompt=[(prompt, 0.5), (prompt, 0.5)])
    # One more addition in each of two blocks and five steps, carried through the rest.
    assert relative_rms(twice, once) < 16 * EPS
    other = restorer.restore(image, prompt=[(prompt, 0.5), (make_prompt(1), 0.5)])
    assert relative_rms(other, once) > 0.001


def test_the_mean_velocity_of_a_prompt_with_itself_is_its_own(restorer, prompt):
    image = picture()
    once = restorer.restore(image, prompt=prompt, mix="velocity")
    assert torch.equal(restorer.restore(image, prompt=[prompt, prompt], mix="velocity"), once)
    assert torch.equal(restorer.restore(image, prompt=prompt), once)
    both = [prompt, make_prompt(1)]
    assert not torch.equal(
        restorer.restore(image, prompt=both, mix="velocity"), restorer.restore(image, prompt=both, mix="residual")
    )


def test_velocity_mixes_prompts_of_unequal_length(restorer, prompt):
    longer = make_prompt(1, tokens=6)
    assert restorer.restore(picture(), prompt=[prompt, longer], mix="velocity").isfinite().all()
    with pytest.raises(EbrError, match="same number of tokens"):
        restorer.restore(picture(), prompt=[prompt, longer])


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2**-6), ("fp8", 2**-4)])
def test_lower_precision_stays_near_float32(restorer, weights, prompt, relative_rms, precision, bound):
    # A unit in the last place is 2⁻⁸ of a bf16 number and 2⁻³ of an e4m3 one: half of it, and a few in a row.
    table = make_table("fast", 0.2)
    state = torch.randn(1, 48, 1, 6, 10)

    def velocity(engine):
        plan = engine.bake([(prompt, 1.0)], table)
        return plan.velocity(engine.parts.velocity)(state, plan.conditioning[2])

    lower = Restorer(model=weights, device="cpu", precision=precision)
    assert 2**-10 < relative_rms(velocity(lower), velocity(restorer)) < bound
    result = lower.restore(picture(), prompt=prompt)
    assert result.dtype == torch.float32
    assert relative_rms(result, restorer.restore(picture(), prompt=prompt)) < bound


def test_fp8_is_not_bf16(weights, prompt):
    results = [Restorer(model=weights, device="cpu", precision=p).restore(picture(), prompt=prompt) for p in ("bf16", "fp8")]
    assert not torch.equal(*results)


def test_a_prompt_may_be_a_file_a_task_or_itself(restorer, prompt, tmp_path, monkeypatch):
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path))
    file = tmp_path / "mini" / "moire.safetensors"
    prompt.save(file)
    image = picture()
    expected = restorer.restore(image, prompt=prompt)
    for request in ({"task": "moire"}, {"prompt": file}, {"prompt": str(file)}, {"prompt": [(file, 1)]}):
        assert torch.equal(restorer.restore(image, **request), expected)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_bundled_and_does_something(task):
    image = picture(32, 32)
    result = Restorer(device="cpu").restore(image, task=task, steps=1)
    assert result.shape == image.shape
    assert result.isfinite().all()
    assert not torch.equal(result, image)


def one_line(error, words):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) > 10
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, ["haze", "lowlight", "prompt"]),
        ({"task": "haze", "prompt": make_prompt()}, ["task", "prompt", "not both"]),
        ({"task": "fog"}, ["'fog'", "haze"]),
        ({"prompt": make_prompt(), "schedule": "slow"}, ["'slow'", "fast", "released"]),
        ({"prompt": make_prompt(), "steps": 0}, ["0 steps"]),
        ({"prompt": make_prompt(), "steps": -3}, ["-3 steps"]),
        ({"prompt": make_prompt(), "steps": 1, "schedule": "released"}, ["1 steps"]),
        ({"prompt": make_prompt(), "order": 3}, ["order", "3"]),
        ({"prompt": make_prompt(), "t0": 0.0}, ["t0", "0.0"]),
        ({"prompt": make_prompt(), "t0": 1.0}, ["t0", "1.0"]),
        ({"prompt": make_prompt(), "t0": float("nan")}, ["t0", "nan"]),
        ({"prompt": make_prompt(), "mix": "mean"}, ["'mean'", "residual", "velocity"]),
        ({"prompt": make_prompt(), "strength": -0.1}, ["strength", "-0.1"]),
        ({"prompt": make_prompt(), "strength": 2.5}, ["strength", "2.5"]),
        ({"prompt": make_prompt(), "strength": float("nan")}, ["strength", "nan"]),
        ({"task": "haze+fog"}, ["'fog'", "haze"]),
        ({"prompt": make_prompt(), "tile": 12}, ["tile", "multiple of 8", "12"]),
        ({"prompt": make_prompt(), "tile": -8}, ["tile", "-8"]),
        ({"prompt": make_prompt(), "tile": 16, "tile_overlap": 16}, ["overlap", "16"]),
        ({"prompt": make_prompt(), "tile_overlap": -4}, ["overlap", "-4"]),
        ({"prompt": (make_prompt(), float("nan"))}, ["weight", "nan"]),
        ({"prompt": "nowhere.safetensors"}, ["nowhere.safetensors"]),
    ],
)
def test_a_request_that_cannot_be_met_is_told_in_one_line(restorer, request_, words):
    with pytest.raises(EbrError) as error:
        restorer.restore(picture(), **request_)
    one_line(error, words)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_prompt(backbone="wan"), ["wan", "mini"]),
        (make_prompt(width=32), ["width 32", "width 24"]),
        (make_prompt(blocks=3), ["3 blocks", "2 blocks"]),
    ],
)
def test_a_prompt_for_another_backbone_is_refused(restorer, other, words):
    with pytest.raises(PromptError) as error:
        restorer.restore(picture(), prompt=other)
    one_line(error, words)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("photo.jpg", ["str"]),
        (None, ["NoneType"]),
        (np.zeros((8, 8), np.uint8), ["[H, W, 3]", "(8, 8)"]),
        (np.zeros((8, 8, 4), np.uint8), ["(8, 8, 4)"]),
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
def test_what_is_no_picture_is_told_in_one_line(restorer, prompt, image, words):
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
def test_an_engine_that_cannot_be_made_says_why(arguments, words):
    with pytest.raises(EbrError) as error:
        Restorer(**arguments)
    one_line(error, words)


def test_weights_that_cannot_be_read_are_named(tmp_path, prompt):
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
