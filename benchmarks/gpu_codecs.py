"""The GPU check's section on a codec: the VAE with random weights at the real sizes, beside diffusers' module."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

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
    beside(run, name, pixels)
    compared(run, name, one)


def beside(run: Run, name: str, pixels: torch.Tensor) -> None:
    """diffusers' module in bf16 on the same pixels, in one piece as it is."""
    if find_spec("diffusers") is None:
        run.add(codec=name, form="diffusers", error="left out: diffusers is not installed")
        return
    about = {"codec": name, "precision": "bf16"}
    with run.guarded(**about), torch.no_grad():
        vae = published(name, run.tiny).to(run.device, torch.bfloat16).eval()
        x = (pixels if name == "wan" else pixels.squeeze(2)).bfloat16()
        latent = vae.encode(x).latent_dist.mode()
        calls = {"encode, diffusers": lambda: vae.encode(x), "decode, diffusers": lambda: vae.decode(latent)}
        for form, call in calls.items():
            if run.left(3, form=form, **about):
                call()
                found = milliseconds(call, run.device)
                rate = pixels[0, 0].numel() / found["median"] / 1e3
                run.add(form=form, **about, ms=found["median"], quartiles=found["quartiles"], **{"megapixels a second": rate})


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
    """The published architecture, freshly initialised."""
    kind = spec(name).codec
    return kind(kind.network(kind.sizes(**sizes(name, small))))


def published(name: str, small: bool) -> nn.Module:
    """diffusers' module of the same sizes."""
    import diffusers

    return getattr(diffusers, spec(name).codec.published)(**sizes(name, small))


def sizes(name: str, small: bool) -> dict[str, Any]:
    """What config.json would have, where that is not the default."""
    return (FLUX_VAE if name == "flux" else {}) | (NARROW[name] if small else {})
