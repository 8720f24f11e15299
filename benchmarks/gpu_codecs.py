"""The GPU check's section on a codec: diffusers' VAE with random weights behind the engine's two halves, at the real sizes."""

from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.clock import Run, milliseconds, relative_rms
from benchmarks.full_size import FLUX_VAE
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.vae import VaeCodec

SIZES = {"wan": (33, 480, 832), "flux": (1, 1024, 1024)}  # frames, height, width
TINY = {"wan": (5, 32, 48), "flux": (1, 64, 48)}
NARROW = {"wan": {"base_dim": 8}, "flux": {"block_out_channels": (32,) * 4}}
ROUNDING = 0.05  # relative RMS of a bf16 codec from the float32 one; random weights pass on noise that trained ones would not


def codec(run: Run, name: str) -> None:
    """Encoding and decoding: in bf16 as it runs on a GPU, how far that is from float32, and in tiles."""
    if find_spec("diffusers") is None:
        run.add(codec=name, error="left out: diffusers is not installed")
        return
    frames, height, width = (TINY if run.tiny else SIZES)[name]
    pixels = torch.rand(1, 3, frames, height, width, device=run.device)
    one = random_codec(name, run.tiny).to(run.device)
    one.asked_dtype = torch.bfloat16
    one.to(run.device)
    about = {"codec": name, "precision": "bf16"}
    with run.guarded(**about):
        latent = one.encode(pixels)
        for form, call in (("encode", lambda: one.encode(pixels)), ("decode", lambda: one.decode(latent))):
            if run.left(3, form=form, **about):
                call()
                found = milliseconds(call, run.device)
                rate = frames * height * width / found["median"] / 1e3
                run.add(form=form, **about, ms=found["median"], quartiles=found["quartiles"], **{"megapixels a second": rate})
    compared(run, name, one)


def compared(run: Run, name: str, one: VaeCodec) -> None:
    """A small clip in bf16 and in tiles against float32 in one piece."""
    frames, side = one.temporal + 1 if one.temporal > 1 else 1, 32 if run.tiny else 256
    pixels = torch.rand(1, 3, frames, side, side, device=run.device)
    results: dict[str, Any] = {}
    for form, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        about = {"codec": name, "result": f"{form}, {side} pixels"}
        if run.left(2, **about):
            with run.guarded(**about):
                one.asked_dtype = dtype
                one.to(run.device)
                latent = one.encode(pixels)
                results[form] = latent, one.decode(latent)
    if len(results) == 2:
        errors = [relative_rms(*pair) for pair in zip(results["bf16"], results["float32"])]
        good = all(error is not None and error <= ROUNDING for error in errors)
        run.add(codec=name, result="bf16 against float32", **{"RMS, latent": errors[0], "RMS, pixels": errors[1]}, ok=good)


def random_codec(name: str, small: bool) -> VaeCodec:
    """The published architecture, freshly initialised, behind the engine's interface."""
    import diffusers

    kind = spec(name).codec
    sizes = (FLUX_VAE if name == "flux" else {}) | (NARROW[name] if small else {})
    return kind(getattr(diffusers, kind.published)(**sizes))
