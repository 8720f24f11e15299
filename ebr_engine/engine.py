"""`Restorer`: load a backbone, plan a run, restore pictures and clips; the work is done in `planning` and `pipeline`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebr_engine import planning
from ebr_engine.backbones.loading import Backbone, ModelSource, load_backbone
from ebr_engine.batches import AT_ONCE, groups, one_item
from ebr_engine.bridge import StepTable
from ebr_engine.catalogue import AUTO, BACKBONES
from ebr_engine.codecs import Codec
from ebr_engine.devices import choose_device
from ebr_engine.errors import EngineError, check_choice
from ebr_engine.export.engine_file import load_engine, save_engine
from ebr_engine.fitting import Fitting, placed
from ebr_engine.kernels import backend
from ebr_engine.media.arrays import to_tensor
from ebr_engine.media.sizes import resized
from ebr_engine.media.tiling import crop
from ebr_engine.offload import OFFLOADS
from ebr_engine.pipeline import Pipeline
from ebr_engine.plan import Plan
from ebr_engine.prompts import Prompt
from ebr_engine.runner import COMPILES, Runner
from ebr_engine.sampler import Callback
from ebr_engine.spinning import views
from ebr_engine.tiled import BLENDS, share

PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8")


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
        fitting = Fitting(max_memory, low_memory)

        def load(offload: str) -> Pipeline:
            resident = torch.device("cpu") if offload == "blocks" else chosen
            return Pipeline(load_backbone(backbone, source, resident, precision), chosen, offload, compile, fitting)

        self.pipeline = placed(load, chosen, offload, compile != "on")
        self.built: Plan | None = None

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
        fitting = Fitting(max_memory, low_memory)

        def load(offload: str) -> Restorer:
            resident = torch.device("cpu") if offload == "blocks" else chosen
            file = load_engine(Path(path), resident, Path(vae) if vae else None)
            if offload == "blocks" and not isinstance(file.backbone.trunk, torch.nn.Module):
                raise EngineError("an exported trunk has no blocks that could wait on the CPU; use offload codec or none")
            tables = [tables.to(chosen, file.backbone.dtype) for tables in file.tables]
            plan = Plan(file.table, tables, views=views(file.backbone, file.table.times[:-1]))
            return cls.over(Pipeline(file.backbone, chosen, offload, compile, fitting), plan)

        return placed(load, chosen, offload, compile != "on")

    @classmethod
    def over(cls, pipeline: Pipeline, built: Plan | None = None) -> "Restorer":
        """A restorer over a backbone that is loaded already; `built`: the only plan that it runs."""
        restorer = cls.__new__(cls)
        restorer.pipeline, restorer.built = pipeline, built
        return restorer

    @property
    def parts(self) -> Backbone:
        """The loaded backbone."""
        return self.pipeline.parts

    @property
    def runner(self) -> Runner:
        """How the sampler runs on it."""
        return self.pipeline.runner

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
        plan.check_single()
        save_engine(Path(path), self.parts, plan.table, plan.tables, about or {})

    def bake(
        self, prompts: list[tuple[Prompt, float]], table: StepTable, mix: str = "residual", timesteps: Tensor | None = None
    ) -> Plan:
        """The plan of a run with these prompts and weights along a step table; see `planning.bake`."""
        return planning.bake(self.parts, prompts, table, mix, timesteps)

    def plan(
        self,
        task: str | None = None,
        prompt: planning.PromptLike | Sequence | None = None,
        *,
        steps: int | None = None,
        schedule: str = "fast",
        order: int | None = None,
        t0: float | None = None,
        mix: str = "auto",
        strength: float = 1.0,
    ) -> Plan:
        """Everything of a run that does not depend on a pixel; arguments and errors as those of `restore`."""
        sampling = {"steps": steps, "schedule": schedule, "order": order, "t0": t0, "mix": mix, "strength": strength}
        if self.built is None:
            return planning.make_plan(self.parts, task, prompt, **sampling)
        if (task, prompt, *sampling.values()) != (None, None, None, "fast", None, None, "auto", 1.0):
            raise EngineError(
                "an engine file's task, prompt, strength, steps and schedule are fixed; build another one to change them"
            )
        return self.built

    @torch.no_grad()
    def restore(
        self,
        image: Any,
        task: str | None = None,
        prompt: planning.PromptLike | Sequence | None = None,
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
        mix: str = "auto",
        strength: float = 1.0,
        callback: Callback | None = None,
    ) -> Any:
        """Restore one picture (or a batch of one size).

        Args: `image`: PIL image, array [H, W, 3] (uint8, uint16, or float in [0, 1]) or tensor [3, H, W] or [B, 3, H, W]
        (float in [0, 1]); the result is of the same kind, alpha untouched. `task`: a bundled or installed prompt by name, or
        several (`rain+haze`, `rain:0.7+haze:0.3`), or `auto` for whatever is wrong with the picture (with all of a batch);
        or `prompt`: a Prompt, a file, or a list of them or of (prompt, weight); or `plan`, made once for many pictures.
        `mix`: several prompts add their `residual`s in one run, or run once an evaluation each and average `velocity` (as
        released), or restore in `turn`, in the order that they are named, each from its own T0; `auto` is `planning.mix_for`.
        `strength`: of all prompts together, 1 as they were learned, 0 the empty prompt, at most 2.
        `steps`, `schedule`, `order`, `t0`: see `bridge.make_table`; t0 is the first prompt's by default. `tile`,
        `tile_overlap`: pixels; pictures larger than a tile run in tiles (default by backbone; 0 never tiles), which
        `tile_blend` blends in the `latent` inside every step, or in `pixel`s after all steps (less memory).
        `callback(done, total)` after each step, or once after the last where all of them are one CUDA graph.
        Raises: `EbrError` (a ValueError) for anything the request gets wrong.
        """
        pixels, rebuild = to_tensor(image)
        if plan is None:
            task = planning.seen(pixels) if task == AUTO else task
            plan = self.plan(task, prompt, steps=steps, schedule=schedule, order=order, t0=t0, mix=mix, strength=strength)
        how = {"tile": tile, "tile_overlap": tile_overlap, "tile_blend": tile_blend}
        return rebuild(self.run(pixels, plan, seed=seed, callback=callback, **how))

    @torch.no_grad()
    def restore_batch(
        self,
        images: Sequence[Any],
        task: str | None = None,
        prompt: planning.PromptLike | Sequence | None = None,
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
        geometry = self.pipeline.geometry
        padded = [geometry.padded(pixels) for pixels, _ in items]
        sides = geometry.tile_size(tile, tile_overlap)
        tiled = [len(geometry.tiles(*pixels.shape[-2:], *sides)) > 1 for pixels in padded]
        done, results = 0, [None] * len(items)
        how = {"seed": seed, "tile": tile, "tile_overlap": tile_overlap, "tile_blend": tile_blend}
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
        clips = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels
        if size is not None:
            clips = resized(clips, *size)
        stages = plan.stages
        for i, stage in enumerate(stages):
            told = share(callback, i, len(stages))
            clips = self.pipeline.run(clips, stage, seed, tile, tile_overlap, tile_blend, first, told)
        return clips.squeeze(2) if pixels.ndim == 4 else clips

    def chunk_size(
        self, frames: int | None, overlap: int | None, size: tuple[int, int] | None = None, tile: int | None = None
    ) -> tuple[int, int]:
        """Length and overlap of a clip's chunks in frames, with the backbone's defaults; `EngineError` for a wrong length.

        For frames of `size` (height, width) they are no longer than memory allows, where it is limited.
        """
        return self.pipeline.chunk_size(frames, overlap, size, tile)

    def tile_size(self, tile: int | None, overlap: int | None) -> tuple[int, int]:
        """Side and overlap of the tiles in pixels, checked, with the backbone's defaults; a side of 0 never tiles."""
        return self.pipeline.geometry.tile_size(tile, overlap)
