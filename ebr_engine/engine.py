"""`Restorer`: load a backbone, bake the tables of a run, restore pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.backbones.mini import load_mini
from ebr_engine.backbones.quantized import quantize_trunk, trunk_dtype
from ebr_engine.bridge import StepTable, make_table
from ebr_engine.catalogue import TASKS, find_prompt
from ebr_engine.errors import EbrError
from ebr_engine.media.tiling import Tiles, blend, crop, match_tones, pad_to_multiple, plan_tiles, split
from ebr_engine.prompts import Prompt, load_prompt, mixed_weights
from ebr_engine.sampler import Callback, Velocity, draw_noise, mean_velocity, sample

PRECISIONS = ("auto", "bf16", "fp32", "fp8")
MIXES = ("residual", "velocity")
DEFAULT_TILE = 512
DEFAULT_OVERLAP = 64
TILES_AT_ONCE = 4
SMALLEST_GUIDE = 256  # pixels a side: less does not show what is in the picture
TONE_CELLS = 4  # cells a tile, either way, in which a tiled picture takes the tones of the whole
PromptLike = Prompt | Path | str


class EngineError(EbrError):
    """A request that the engine cannot meet."""


class Restorer:
    """A loaded backbone, ready to restore pictures with any of its prompts.

    `backbone`: `mini` (bundled). `model`: another weights file of that backbone. `device`: `auto`, `cpu`, `cuda`, `cuda:1`.
    `precision`: `auto`, `bf16`, `fp32`, or `fp8` (linear layers in e4m3 with row scales).
    """

    def __init__(self, backbone: str = "mini", *, model: str | Path | None = None, device: str = "auto", precision: str = "auto"):
        if backbone != "mini":
            raise EngineError(f"unknown backbone {backbone!r}; this version has: mini")
        if precision not in PRECISIONS:
            raise EngineError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
        self.backbone = backbone
        self.device = choose_device(device)
        self.dtype = trunk_dtype(precision, self.device)
        mini = load_mini(*([Path(model)] if model else []), device=self.device, dtype=self.dtype)
        self.conditioner, self.trunk, self.context = mini.conditioner, mini.trunk, mini.context
        self.codec = mini.codec.to(self.device)
        if precision == "fp8":
            quantize_trunk(self.trunk)
        self.multiple = self.codec.spatial * self.trunk.config.patch_size[-1]  # pixels a token spans, either way

    def prompt(self, task: str | None, prompt: PromptLike | Sequence | None) -> list[tuple[Prompt, float]]:
        """The prompts of a request with their weights, loaded and checked against the backbone; [] is the empty prompt.

        Raises `EngineError` when the request names both a task and a prompt, `PromptError` for a prompt that does not fit.
        """
        if task is not None and prompt is not None:
            raise EngineError("give a task or a prompt, not both")
        if task is not None:
            prompt = find_prompt(self.backbone, task)
        if prompt is None:
            return []
        items = prompt if isinstance(prompt, list) else [prompt]
        chosen = []
        for item in items:
            one, weight = item if isinstance(item, tuple) else (item, 1.0)
            one = one if isinstance(one, Prompt) else load_prompt(one)
            one.check(self.backbone, self.trunk.config.width, self.trunk.config.num_layers)
            if not math.isfinite(weight):
                raise EngineError(f"a prompt's weight must be a finite number, got {weight}")
            chosen.append((one, float(weight)))
        return chosen

    def bake(self, prompts: list[tuple[Prompt, float]], table: StepTable, mix: str = "residual") -> tuple[Velocity, Sequence]:
        """The velocity function of a run and its conditioning, one entry a step, on the trunk's device."""
        if mix not in MIXES:
            raise EngineError(f"unknown mix {mix!r}; choose one of {', '.join(MIXES)}")
        timesteps = torch.tensor(table.times[:-1]) * 1000
        groups = [[pair] for pair in prompts] if mix == "velocity" and len(prompts) > 1 else [prompts]
        with torch.no_grad():
            tables = [
                self.conditioner(timesteps, self.context, mixed_weights(group)).to(self.device, self.dtype) for group in groups
            ]
        if len(tables) == 1:
            return self.trunk, tables[0]
        return mean_velocity(self.trunk), list(zip(*tables))

    @torch.no_grad()
    def restore(
        self,
        image: Any,
        task: str | None = None,
        prompt: PromptLike | Sequence | None = None,
        *,
        steps: int | None = None,
        schedule: str = "fast",
        order: int | None = None,
        t0: float | None = None,
        seed: int = 42,
        tile: int | None = None,
        tile_overlap: int | None = None,
        mix: str = "residual",
        callback: Callback | None = None,
    ) -> Any:
        """Restore one picture (or a batch of one size).

        Args: `image`: PIL image, array [H, W, 3] (uint8, uint16, or float in [0, 1]) or tensor [3, H, W] or [B, 3, H, W]
        (float in [0, 1]); the result is of the same kind, alpha untouched. `task`: a bundled or installed prompt by name;
        or `prompt`: a Prompt, a file, or a list of them or of (prompt, weight). `steps`, `schedule`, `order`, `t0`: see
        `bridge.make_table`; t0 is the first prompt's by default. `tile`, `tile_overlap`: pixels; pictures larger than a tile
        run in tiles that are blended inside every step (default 512 and 64; 0 never tiles). `callback(done, total)` after
        each step.
        Raises: `EbrError` (a ValueError) for anything the request gets wrong.
        """
        prompts = self.prompt(task, prompt)
        if not prompts and t0 is None:
            raise EngineError(f"say what to repair: a task ({', '.join(TASKS)}) or a prompt")
        try:
            table = make_table(schedule, prompts[0][0].t0 if t0 is None else t0, steps, order)
        except ValueError as error:
            raise EngineError(str(error)) from error
        pixels, rebuild = to_tensor(image)
        velocity, conditioning = self.bake(prompts, table, mix)
        return rebuild(self.run(pixels, velocity, conditioning, table, seed, tile, tile_overlap, callback))

    def run(
        self,
        pixels: Tensor,
        velocity: Velocity,
        conditioning: Sequence,
        table: StepTable,
        seed: int = 42,
        tile: int | None = None,
        tile_overlap: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] → restored pixels of the same shape, float32 on the CPU."""
        height, width = pixels.shape[-2:]
        padded = pad_to_multiple(pixels, self.multiple)
        tiles = self.tiles(*padded.shape[-2:], tile, tile_overlap)

        def run(picture: Tensor, velocity: Velocity, callback: Callback | None) -> Tensor:
            degraded = self.codec.encode(picture.to(self.device).unsqueeze(2))
            noise = draw_noise(degraded.shape, seed, self.device)
            latent = sample(velocity, conditioning, degraded, noise, table, callback)
            return self.codec.decode(latent).squeeze(2).cpu()

        if len(tiles) == 1:
            restored = run(padded, velocity, callback)
        else:
            # How much haze or light there is shows in the whole picture only; the tiles add the detail.
            side = self.codec.spatial * max(tiles.tile_height, tiles.tile_width)
            guide = run(reduced(padded, max(side, SMALLEST_GUIDE), self.multiple), velocity, None)
            restored = run(padded, tiled(velocity, tiles), callback)
            restored = match_tones(restored, guide, side // TONE_CELLS)
        return crop(restored.clamp(0, 1), height, width)

    def tiles(self, height: int, width: int, tile: int | None, overlap: int | None) -> Tiles:
        """The tiles of a padded picture in latent cells; a tile of 0 pixels means the whole picture at once."""
        tile = DEFAULT_TILE if tile is None else tile
        if tile == 0:
            tile = max(height, width)
        if tile < 0 or tile % self.multiple:
            raise EngineError(f"the tile size must be a multiple of {self.multiple} pixels, got {tile}")
        overlap = min(DEFAULT_OVERLAP, tile // 2) if overlap is None else overlap
        if not 0 <= overlap < tile:
            raise EngineError(f"the tile overlap must be at least 0 and less than the tile of {tile} pixels, got {overlap}")
        cell, patch = self.codec.spatial, self.trunk.config.patch_size[-1]
        return plan_tiles(height // cell, width // cell, tile // cell, overlap // cell, patch)


def tiled(velocity: Velocity, tiles: Tiles) -> Velocity:
    """The same velocity function evaluated tile by tile and blended, so that neighbours agree after every step."""

    def blended(state: Tensor, step: Any) -> Tensor:
        parts = split(state, tiles).split(TILES_AT_ONCE * state.shape[0])
        return blend(torch.cat([velocity(part, step) for part in parts]), tiles)

    return blended


def reduced(pixels: Tensor, side: int, multiple: int) -> Tensor:
    """The picture [B, 3, H, W] reduced so that its longer side is at most `side`; both sides multiples of `multiple`."""
    scale = min(1.0, side / max(pixels.shape[-2:]))
    shape = [max(multiple, round(length * scale / multiple) * multiple) for length in pixels.shape[-2:]]
    return F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU; `EngineError` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise EngineError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise EngineError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"there is no device {device}: {torch.cuda.device_count()} CUDA device(s) found")
    return chosen


def to_tensor(image: Any) -> tuple[Tensor, Any]:
    """Pixels [B, 3, H, W] float32 in [0, 1] of an image of any kind, and the function that turns a result back into that kind."""
    if isinstance(image, Tensor):
        return _from_torch(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if hasattr(image, "mode") and hasattr(image, "convert"):
        return _from_pil(image)
    raise EngineError(f"cannot restore a {type(image).__name__}; give a PIL image, an array [H, W, 3] or a tensor [3, H, W]")


def _from_torch(image: Tensor) -> tuple[Tensor, Any]:
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or not image.is_floating_point() or not image.numel():
        raise EngineError(f"expected a float tensor [3, H, W] or [B, 3, H, W], got {image.dtype} {tuple(image.shape)}")
    pixels = image.detach().float().cpu()
    _check_range(pixels)

    def rebuild(result: Tensor) -> Tensor:
        return result.reshape(image.shape).to(image.device, image.dtype)

    return pixels.view(-1, *pixels.shape[-3:]), rebuild


def _from_array(image: np.ndarray) -> tuple[Tensor, Any]:
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise EngineError(f"expected an array [H, W, 3], got shape {image.shape}")
    if image.dtype not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise EngineError(f"expected uint8, uint16 or float pixels, got {image.dtype}")
    top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    pixels = torch.from_numpy(image.astype(np.float32) / np.float32(top)).permute(2, 0, 1)[None]
    _check_range(pixels)

    def rebuild(result: Tensor) -> np.ndarray:
        values = result[0].permute(1, 2, 0).numpy()
        return (values * top).round().astype(image.dtype) if image.dtype.kind == "u" else values.astype(image.dtype)

    return pixels, rebuild


def _from_pil(image: Any) -> tuple[Tensor, Any]:
    if image.mode in ("I", "F"):
        raise EngineError(f"a PIL image of mode {image.mode} does not say its range; convert it to I;16, L or RGB")
    deep = image.mode.startswith("I;16")  # PIL's own conversion to RGB would clip it
    array = np.repeat(np.asarray(image)[..., None], 3, axis=-1) if deep else np.asarray(image.convert("RGB"))
    pixels, rebuild_array = _from_array(array.astype(np.uint16) if deep else array)

    def rebuild(result: Tensor) -> Any:
        from PIL import Image

        if deep:
            grey = torch.einsum("bchw,c->bhw", result, torch.tensor([0.299, 0.587, 0.114]))  # as PIL's convert("L")
            restored = Image.fromarray(np.ascontiguousarray(rebuild_array(grey[:, None])[..., 0]))
        else:
            restored = Image.fromarray(rebuild_array(result))
        if image.mode in ("L", "LA", "1"):
            restored = restored.convert("L")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            restored.putalpha(image.convert("RGBA").getchannel("A"))
        restored.info = {name: value for name, value in image.info.items() if name != "transparency"}
        return restored

    return pixels, rebuild


def _check_range(pixels: Tensor) -> None:
    if not pixels.isfinite().all():
        raise EngineError("the picture holds values that are not finite")
    if pixels.min() < 0 or pixels.max() > 1:
        raise EngineError(f"pixels must lie in [0, 1], got {pixels.min():.3g} to {pixels.max():.3g}")
