"""`Restorer`: load a backbone, bake the tables of a run, restore pictures and clips."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebr_engine import buckets
from ebr_engine.backbones.loading import Backbone, ModelSource, load_backbone
from ebr_engine.batches import AT_ONCE, groups, one_item
from ebr_engine.bridge import StepTable, make_table, released_timesteps
from ebr_engine.catalogue import AUTO, BACKBONES, TASKS, find_prompts
from ebr_engine.classify import diagnose
from ebr_engine.codecs import Codec
from ebr_engine.errors import EngineError
from ebr_engine.export.engine_file import load_engine, save_engine
from ebr_engine.fitting import Fitting, costs_of, rungs_of
from ebr_engine.kernels import backend
from ebr_engine.media.arrays import to_tensor
from ebr_engine.media.sizes import pad_frames, reduced, resized
from ebr_engine.media.tiling import Tiles, crop, match_tones, pad_to_multiple, plan_tiles
from ebr_engine.memory import Rung, Work, size_of
from ebr_engine.offload import OFFLOADS, offloaded
from ebr_engine.plan import Plan
from ebr_engine.prompts import Prompt, load_prompt, mixed_weights
from ebr_engine.runner import COMPILES, Runner, Tiling
from ebr_engine.safety import Safety
from ebr_engine.sampler import Callback, draw_noise
from ebr_engine.tiled import BLENDS, in_chunks, in_pixels, share

PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8")
MIXES = ("residual", "velocity")
STRONGEST = 2.0  # times a prompt's learned strength
DEFAULT_TILE = {"mini": 512, "wan": 832, "flux": 1024}  # the sizes that the backbones know
RELEASED_SIZES = {"wan": (480, 832), "flux": (1024, 1024)}  # height and width of the published protocol
DEFAULT_OVERLAP = 64
DEFAULT_CHUNK = {"mini": (4, 0), "wan": (33, 8), "flux": (1, 0)}  # frames restored together, and what neighbours share
TILES_AT_ONCE = 4
SMALLEST_GUIDE = 256  # pixels a side: less does not show what is in the picture
TONE_CELLS = 4  # cells a tile, either way, in which a tiled picture takes the tones of the whole
PromptLike = Prompt | Path | str


class Restorer:
    """A loaded backbone, ready to restore pictures and clips with any of its prompts.

    `backbone`: `mini` (bundled), `wan` or `flux`. `model`: a folder, a file or a hub id in place of the backbone's own weights,
    with `revision` and `offline` for the hub; `context` and `vae`: see `ModelSource`. `device`: `auto`, `cpu`, `cuda`,
    `cuda:1`. `precision`: `auto`, `bf16`, `fp16`, `fp32`, or `fp8` (linear layers in e4m3 with row scales). `offload`: what
    waits on the CPU while it is not needed: `none`, `codec`, or `blocks` (codec and transformer blocks, for small GPUs).
    `compile`: `auto`, `off` or `on`, see `runner.py`; compiled or captured pictures are run at a few sizes only.
    `max_memory`: bytes, or `8G`, that runs fit into by what `memory.py` computes (of the device; on a CPU weights, pictures and
    what is computed); `low_memory`: all that saves memory without smaller tiles or chunks. When memory runs out, a run is
    made again in a way that needs less, and that is told.
    """

    def __init__(
        self,
        backbone: str = "mini",
        *,
        model: str | Path | None = None,
        revision: str | None = None,
        offline: bool = False,
        context: str | Path | None = None,
        vae: str | Path | None = None,
        sample_latents: bool = False,
        device: str = "auto",
        precision: str = "auto",
        offload: str = "none",
        compile: str = "auto",
        max_memory: str | int | None = None,
        low_memory: bool = False,
    ):
        check_choice("backbone", backbone, BACKBONES)
        check_choice("precision", precision, PRECISIONS)
        check_choice("offload", offload, OFFLOADS)
        check_choice("compile", compile, COMPILES)
        check_choice("EBR_KERNELS", backend.ASKED, backend.CHOICES)
        paths = (Path(path) if path else None for path in (context, vae))
        source = ModelSource(model, revision, offline, *paths, sample_latents)
        chosen = choose_device(device)
        fitting = Fitting(None if max_memory is None else size_of(max_memory), low_memory)
        resident = torch.device("cpu") if offload == "blocks" else chosen
        self._start(load_backbone(backbone, source, resident, precision), chosen, offload, compile, fitting)

    @classmethod
    def from_engine(
        cls,
        path: str | Path,
        *,
        vae: str | Path | None = None,
        device: str = "auto",
        offload: str = "none",
        compile: str = "auto",
        max_memory: str | int | None = None,
        low_memory: bool = False,
    ) -> "Restorer":
        """Start from an engine file (`build`): its prompt, steps and precision are fixed, so `restore` takes none of them.

        Or from an exported trunk (`export/`: `.onnx`, `.plan`, `.pt2`) with its tables beside it. `vae`: a folder in place of
        the one that the file names. Raises `EngineError` for a file that is missing or damaged.
        """
        check_choice("offload", offload, OFFLOADS)
        check_choice("compile", compile, COMPILES)
        chosen = choose_device(device)
        resident = torch.device("cpu") if offload == "blocks" else chosen
        file = load_engine(Path(path), resident, Path(vae) if vae else None)
        if offload == "blocks" and not isinstance(file.backbone.trunk, torch.nn.Module):
            raise EngineError("an exported trunk has no blocks that could wait on the CPU; use offload codec or none")
        restorer = cls.__new__(cls)
        fitting = Fitting(None if max_memory is None else size_of(max_memory), low_memory)
        restorer._start(file.backbone, chosen, offload, compile, fitting)
        restorer.built = Plan(file.table, [tables.to(chosen, file.backbone.dtype) for tables in file.tables])
        return restorer

    def _start(self, parts: Backbone, device: torch.device, offload: str, compile: str, fitting: Fitting) -> None:
        self.fitting, self.asked_offload = fitting, offload
        self.built: Plan | None = None
        self._place(offloaded(parts, device, offload), offload, compile)
        self.costs = costs_of(self.parts)

    def _place(self, parts: Backbone, offload: str, compile: str) -> None:
        self.parts, self.offload = parts, offload
        self.runner = Runner(self.parts, compile, offload == "blocks")
        self.safety = Safety(self.parts, offload == "blocks")

    @property
    def backbone(self) -> str:
        """The backbone's name."""
        return self.parts.name

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        return self.parts.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's layers that are not fp8."""
        return self.parts.dtype

    @property
    def trunk(self) -> Any:
        """The transformer: a module, or an exported one."""
        return self.parts.trunk

    @property
    def codec(self) -> Codec:
        """Pixels ↔ latents."""
        return self.parts.codec

    def expect(self, pictures: int) -> None:
        """Say how many pictures, or frames of a clip, are to come: with `compile="auto"`, many are worth compiling for."""
        self.runner.expect(pictures)

    def build(self, path: str | Path, plan: Plan, about: dict | None = None) -> None:
        """Write an engine file of this backbone and one plan, to start from with `from_engine`; see `export/engine_file.py`."""
        save_engine(Path(path), self.parts, plan.table, plan.tables, about or {})

    def prompt(self, task: str | None, prompt: PromptLike | Sequence | None) -> list[tuple[Prompt, float]]:
        """The prompts of a request with their weights, loaded and checked against the backbone; [] is the empty prompt.

        Raises `EngineError` when the request names both a task and a prompt, `PromptError` for a prompt that does not fit.
        """
        if task is not None and prompt is not None:
            raise EngineError("give a task or a prompt, not both")
        if task is not None:
            prompt = find_prompts(self.backbone, task)
        if prompt is None:
            return []
        items = prompt if isinstance(prompt, list) else [prompt]
        chosen = []
        for item in items:
            one, weight = item if isinstance(item, tuple) else (item, 1.0)
            one = one if isinstance(one, Prompt) else load_prompt(one)
            one.check(self.backbone, self.parts.width, self.parts.blocks)
            if not math.isfinite(weight):
                raise EngineError(f"a prompt's weight must be a finite number, got {weight}")
            chosen.append((one, float(weight)))
        return chosen

    @torch.no_grad()
    def bake(
        self, prompts: list[tuple[Prompt, float]], table: StepTable, mix: str = "residual", timesteps: Tensor | None = None
    ) -> Plan:
        """The plan of a run with these prompts.

        `timesteps` [N]: what the transformer is told at each step, 1000 times the table's times by default.
        """
        check_choice("mix", mix, MIXES)
        if timesteps is None:
            timesteps = torch.tensor(table.times[:-1]) * 1000
        groups = [[pair] for pair in prompts] if mix == "velocity" and len(prompts) > 1 else [prompts]

        def tables(parts: Backbone) -> list[Any]:
            return [parts.bake(timesteps, mixed_weights(group)) for group in groups]

        return Plan(table, tables(self.parts), tables)

    def plan(
        self,
        task: str | None = None,
        prompt: PromptLike | Sequence | None = None,
        *,
        steps: int | None = None,
        schedule: str = "fast",
        order: int | None = None,
        t0: float | None = None,
        mix: str = "residual",
        strength: float = 1.0,
    ) -> Plan:
        """Everything of a run that does not depend on a pixel; arguments and errors as those of `restore`."""
        if self.built is not None:
            asked = (task, prompt, steps, order, t0, schedule, mix, strength)
            if asked != (None, None, None, None, None, "fast", "residual", 1.0):
                raise EngineError(
                    "an engine file's task, prompt, strength, steps and schedule are fixed; build another one to change them"
                )
            return self.built
        if not 0 <= strength <= STRONGEST:  # so that NaN fails too
            raise EngineError(f"the strength must be from 0 (the empty prompt) to {STRONGEST:g}, got {strength:g}")
        prompts = [(one, weight * strength) for one, weight in self.prompt(task, prompt)]
        if not prompts and t0 is None:
            raise EngineError(f"say what to repair: a task ({', '.join(TASKS)}) or a prompt")
        try:
            table = make_table(schedule, prompts[0][0].t0 if t0 is None else t0, steps, order)
        except ValueError as error:
            raise EngineError(str(error)) from error
        looked_up = self.backbone != "mini" and schedule in ("released", "exact")
        return self.bake(prompts, table, mix, released_timesteps(table.times, self.backbone) if looked_up else None)

    @torch.no_grad()
    def restore(
        self,
        image: Any,
        task: str | None = None,
        prompt: PromptLike | Sequence | None = None,
        *,
        plan: Plan | None = None,
        steps: int | None = None,
        schedule: str = "fast",
        order: int | None = None,
        t0: float | None = None,
        seed: int = 42,
        tile: int | None = None,
        tile_overlap: int | None = None,
        tile_blend: str = "latent",
        mix: str = "residual",
        strength: float = 1.0,
        callback: Callback | None = None,
    ) -> Any:
        """Restore one picture (or a batch of one size).

        Args: `image`: PIL image, array [H, W, 3] (uint8, uint16, or float in [0, 1]) or tensor [3, H, W] or [B, 3, H, W]
        (float in [0, 1]); the result is of the same kind, alpha untouched. `task`: a bundled or installed prompt by name, or
        several (`rain+haze`, `rain:0.7+haze:0.3`), or `auto` for whatever is wrong with the picture (with all of a batch);
        or `prompt`: a Prompt, a file, or a list of them or of (prompt, weight); or `plan`, made once for many pictures.
        `strength`: of all prompts together, 1 as they were learned, 0 the empty prompt, at most 2.
        `steps`, `schedule`, `order`, `t0`: see `bridge.make_table`; t0 is the first prompt's by default. `tile`,
        `tile_overlap`: pixels; pictures larger than a tile run in tiles (default by backbone; 0 never tiles), which
        `tile_blend` blends in the `latent` inside every step, or in `pixel`s after all steps (less memory).
        `callback(done, total)` after each step, or once after the last where all of them are one CUDA graph.
        Raises: `EbrError` (a ValueError) for anything the request gets wrong.
        """
        pixels, rebuild = to_tensor(image)
        if plan is None:
            task = seen(pixels) if task == AUTO else task
            plan = self.plan(task, prompt, steps=steps, schedule=schedule, order=order, t0=t0, mix=mix, strength=strength)
        how = {"tile": tile, "tile_overlap": tile_overlap, "tile_blend": tile_blend}
        return rebuild(self.run(pixels, plan, seed=seed, callback=callback, **how))

    @torch.no_grad()
    def restore_batch(
        self,
        images: Sequence[Any],
        task: str | None = None,
        prompt: PromptLike | Sequence | None = None,
        *,
        plan: Plan | None = None,
        at_once: int = AT_ONCE,
        callback: Callback | None = None,
        seed: int = 42,
        tile: int | None = None,
        tile_overlap: int | None = None,
        tile_blend: str = "latent",
        **request: Any,
    ) -> list[Any]:
        """Restore several pictures and clips of any sizes: those that are padded to one size run together, `at_once` at most.

        An image is one picture as `restore` takes it, or a clip, tensor [3, F, H, W] or array [F, H, W, 3]; results are of the
        same kinds, in the same order, and those of one by one but for rounding. Other arguments are those of `restore`, and
        so are the errors; `callback(done, total)` counts images.
        """
        plan = self.plan(task, prompt, **request) if plan is None else plan
        items = [one_item(image) for image in images]
        padded = [self._padded(pixels) for pixels, _ in items]
        tiled = [len(self.tiles(*pixels.shape[-2:], tile, tile_overlap)) > 1 for pixels in padded]
        results: list[Any] = [None] * len(items)
        how = {"seed": seed, "tile": tile, "tile_overlap": tile_overlap, "tile_blend": tile_blend}
        done = 0
        for group in groups([tuple(pixels.shape) for pixels in padded], tiled, at_once):
            restored = self.run(torch.cat([padded[i] for i in group]), plan, **how)
            for i, one in zip(group, restored.split([len(padded[i]) for i in group])):
                pixels, rebuild = items[i]
                results[i] = rebuild(crop(one, *pixels.shape[-2:])[:, :, : pixels.shape[2]])
            done += len(group)
            if callback is not None:
                callback(done, len(items))
        return results

    @torch.no_grad()
    def run(
        self,
        pixels: Tensor,
        plan: Plan,
        *,
        seed: int = 42,
        tile: int | None = None,
        tile_overlap: int | None = None,
        tile_blend: str = "latent",
        first: int = 0,
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Pixels [B, 3, H, W], or clips [B, 3, F, H, W], in [0, 1] → restored ones of the same shape, float32 on the CPU.

        `size` (height, width) resizes first, as the published protocol does; the result is then of that size.

        `first`: number of a chunk's first frame in its clip, so that every chunk sees the clip's noise of that moment. A
        backbone that knows nothing of time (mini, FLUX) restores a clip frame by frame, with the same noise in each.
        """
        check_choice("tile blend", tile_blend, BLENDS)
        if pixels.ndim == 4:
            how = {"seed": seed, "tile": tile, "tile_overlap": tile_overlap, "tile_blend": tile_blend, "callback": callback}
            return self.run(pixels.unsqueeze(2), plan, size=size, **how).squeeze(2)
        if size is not None:
            pixels = resized(pixels, *size)
        rungs, work = self._rungs(pixels.shape, tile, tile_overlap, tile_blend)

        def attempt(rung: Rung) -> Tensor:
            self._apply(rung)
            return self._run(pixels, plan, rung, seed, first, callback)

        return self.fitting.run(rungs, self.costs, work, attempt, self._free)

    def _rungs(self, shape: Sequence[int], tile: int | None, overlap: int | None, blend: str) -> tuple[list[Rung], Work]:
        """The ways to restore pixels [B, 3, F, H, W], from the one that is asked for down, and what there is to do."""
        batch, _, frames, height, width = shape
        if self.codec.temporal == 1:  # a clip is a batch of pictures
            batch, frames = 1, batch * frames
        codec_tile = getattr(inner(self.codec), "asked_tile", None)
        start = Rung(*self.tile_size(tile, overlap), blend, TILES_AT_ONCE, frames, codec_tile, self.asked_offload)
        return rungs_of(self.parts, start, self.costs, self.runner.compile == "on"), Work(batch, frames, height, width)

    def _apply(self, rung: Rung) -> None:
        """Have codec and blocks be where a rung says, and the codec take tiles of its size."""
        if OFFLOADS.index(rung.offload) > OFFLOADS.index(self.offload):
            if rung.offload == "blocks":
                self.parts.trunk.to("cpu")
            parts = replace(self.parts, codec=inner(self.codec))
            self._place(offloaded(parts, self.device, rung.offload), rung.offload, self.runner.compile)
        if self.costs.tiles_codec:
            inner(self.codec).set_tile(rung.codec_tile)

    def _free(self) -> None:
        """Drop what a run left behind: recorded graphs, compiled code, and the transformer in other precisions."""
        self._place(self.parts, self.offload, self.runner.compile)

    def _run(self, pixels: Tensor, plan: Plan, rung: Rung, seed: int, first: int = 0, callback: Callback | None = None) -> Tensor:
        batch, _, frames, height, width = pixels.shape
        if self.codec.temporal == 1 and (frames > 1 or batch > rung.frames):
            groups = pixels.transpose(1, 2).flatten(0, 1).unsqueeze(2).split(rung.frames)
            parts = [self._run(x, plan, rung, seed, 0, share(callback, i, len(groups))) for i, x in enumerate(groups)]
            return torch.cat(parts).squeeze(2).unflatten(0, (batch, frames)).transpose(1, 2)
        if frames > rung.frames:
            shared = min(DEFAULT_CHUNK[self.backbone][1], rung.frames - 1)
            return in_chunks(
                lambda chunk, start, callback: self._run(chunk, plan, rung, seed, first + start, callback),
                pixels,
                rung.frames,
                shared,
                callback,
            )
        padded, noise = self._ready(pixels, seed, first, rung.tile)
        tiles = self.tiles(*padded.shape[-2:], rung.tile, rung.overlap)
        whole = partial(self._run_whole, plan=plan)
        if len(tiles) == 1:
            restored = whole(padded, noise, callback)
        else:
            # How much haze or light there is shows in the whole picture only; the tiles add the detail.
            side = self.codec.spatial * max(tiles.tile_height, tiles.tile_width)
            fixed, smallest = self.parts.fixed, max(side, SMALLEST_GUIDE)
            small = resized(padded, *fixed[1:]) if fixed else reduced(padded, smallest, self.parts.multiple)
            guide = crop(whole(*self._ready(small, seed, first, 0), None), *small.shape[-2:])
            if rung.blend == "pixel":
                restored = in_pixels(whole, padded, noise, tiles, self.codec.spatial, callback)
            else:
                restored = whole(padded, noise, callback, tiling=Tiling(tiles, rung.at_once))
            by_frame = (x.transpose(1, 2).flatten(0, 1) for x in (restored, guide))
            matched = match_tones(*by_frame, side // TONE_CELLS)
            restored = matched.unflatten(0, (len(padded), -1)).transpose(1, 2)
        return crop(restored.clamp(0, 1), height, width)[:batch, :, :frames]

    def _ready(self, pixels: Tensor, seed: int, first: int, tile: int) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, F, H, W] extended to a shape that is run, and the noise for their latent."""
        padded = self._padded(pixels)
        noise = self._noise(padded.shape, seed, first)
        if not self.runner.static:
            return padded, noise
        shape = buckets.few_sizes(padded.shape, self.parts.multiple, self.codec.temporal, tile)
        padded = buckets.widened(padded, *shape)
        return padded, buckets.repeated(noise, self._latent_shape(padded.shape))

    def _padded(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] extended to what codec and transformer take; an exported one may take a single size."""
        fixed, frames = self.parts.fixed, self.codec.frames(pixels.shape[2])
        padded = pad_to_multiple(pad_frames(pixels, max(frames, fixed[0]) if fixed else frames), self.parts.multiple)
        if fixed and (frames > fixed[0] or any(found < made for found, made in zip(padded.shape[-2:], fixed[1:]))):
            made, found = (f"{f} frame(s) of {h} x {w} pixels" for f, h, w in (fixed, pixels.shape[2:]))
            raise EngineError(f"this graph was made for {made}, not for {found}; export one with --dynamic, or for that size")
        return padded

    def _noise(self, shape: Sequence[int], seed: int, first: int) -> Tensor:
        """The noise for the latent of padded pixels [B, 3, F, H, W] that begin with frame `first` of a clip.

        Noise belongs to a moment of the clip, not to a place in a chunk: where chunks overlap, they see the same.
        """
        batch, *cells = self._latent_shape(shape)
        return draw_noise((1, *cells), seed).roll(-round(first / self.codec.temporal), dims=2).expand(batch, -1, -1, -1, -1)

    def _latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[B, C, f, h, w] of padded pixels [B, 3, F, H, W]."""
        batch, _, frames, height, width = shape
        codec = self.codec
        return batch, codec.channels, 1 + (frames - 1) // codec.temporal, height // codec.spatial, width // codec.spatial

    def _run_whole(
        self, pixels: Tensor, noise: Tensor, callback: Callback | None, plan: Plan, tiling: Tiling | None = None
    ) -> Tensor:
        degraded = self.codec.encode(pixels.to(self.device))
        latent = self.runner.run(plan, degraded, noise, callback, tiling)
        if not latent.isfinite().all():
            latent = self.safety.run(plan, degraded, noise, tiling)
        return self.codec.decode(latent).cpu()

    def chunk_size(
        self, frames: int | None, overlap: int | None, size: tuple[int, int] | None = None, tile: int | None = None
    ) -> tuple[int, int]:
        """Length and overlap of a clip's chunks in frames, with the backbone's defaults.

        For frames of `size` (height, width) they are no longer than memory allows, where it is limited.
        Raises `EngineError` for a length that the codec does not take.
        """
        length, shared = DEFAULT_CHUNK[self.backbone]
        if self.parts.fixed and self.codec.temporal > 1:
            length = self.parts.fixed[0]
        length = length if frames is None else frames
        if self.codec.frames(length) != length:
            raise EngineError(f"{self.backbone} takes chunks of 4n + 1 frames, not {length}; use {self.codec.frames(length)}")
        if size is not None and self.codec.temporal > 1 and not self.parts.fixed:
            rungs, work = self._rungs((1, 3, length, *size), tile, None, "latent")
            length = rungs[self.fitting.rung(rungs, self.costs, work)].frames
        return length, min(shared, length - 1) if overlap is None else overlap

    def tile_size(self, tile: int | None, overlap: int | None) -> tuple[int, int]:
        """Side and overlap of the tiles in pixels, checked, with the backbone's defaults; a side of 0 never tiles."""
        multiple, fixed = self.parts.multiple, self.parts.fixed
        if fixed and tile not in (None, min(fixed[1:])):
            raise EngineError(f"this graph runs tiles of {fixed[1]} x {fixed[2]} pixels only; leave the tile size out")
        tile = (min(fixed[1:]) if fixed else DEFAULT_TILE[self.backbone]) if tile is None else tile
        if tile < 0 or tile % multiple:
            raise EngineError(f"the tile size must be a multiple of {multiple} pixels, got {tile}")
        if tile == 0:
            return 0, 0
        overlap = min(DEFAULT_OVERLAP, tile // 2) if overlap is None else overlap
        if not 0 <= overlap < tile:
            raise EngineError(f"the tile overlap must be at least 0 and less than the tile of {tile} pixels, got {overlap}")
        return tile, overlap

    def tiles(self, height: int, width: int, tile: int | None, overlap: int | None) -> Tiles:
        """The tiles of a padded picture of height × width pixels, in latent cells."""
        tile, overlap = self.tile_size(tile, overlap)
        cell = self.codec.spatial
        sides = self.parts.fixed[1:] if self.parts.fixed else 2 * (tile or max(height, width),)
        cells = tuple(side // cell for side in sides)
        return plan_tiles(height // cell, width // cell, cells, overlap // cell, self.parts.patch)


def seen(pictures: Tensor) -> str:
    """The tasks that auto chooses for pictures [B, 3, H, W] in [0, 1], as `plan` takes them; `EngineError` if there are none."""
    diagnosis = diagnose(list(pictures))
    if not diagnosis.tasks:
        raise EngineError(f"auto sees {diagnosis}; name a task")
    return "+".join(diagnosis.tasks)


def inner(codec: Codec) -> Codec:
    """The codec itself, where one waits on the CPU."""
    return getattr(codec, "codec", codec)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """`EngineError` unless `value` is one of `choices`."""
    if value not in choices:
        raise EngineError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


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
