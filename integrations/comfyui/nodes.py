"""The nodes: what is asked for on the left, pictures [B, H, W, C] float in [0, 1] in and out."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ebr_engine.backbones.registry import BACKBONES
from ebr_engine.engine.classify import diagnose
from ebr_engine.integrations.frames import recipe_for, request_of, restored
from ebr_engine.jobs.recipe import NothingToRepair, Recipe
from ebr_engine.media.colour_fix import fix_colours
from ebr_engine.media.video.info import Frame
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.request import OFFLOADS, PRECISIONS, RestoreRequest

from .models import Model

CATEGORY = "ebr-engine"
PROMPTS = "ebr_prompts"  # the folder of models/ that prompt files lie in
NONE = "none"  # a task for pictures that need no repair
TICKS = 1000  # of the bar for one picture or one chunk

folder_paths.add_model_folder_path(PROMPTS, os.path.join(folder_paths.models_dir, PROMPTS))

RestorerType = io.Custom("EBR_RESTORER")
PromptType = io.Custom("EBR_PROMPT")


class LoadRestorer(io.ComfyNode):
    """A backbone; its weights are loaded when the first picture comes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EbrLoadRestorer",
            display_name="Load Restorer (EBR)",
            category=CATEGORY,
            description="The frozen transformer that restores. mini comes with ebr-engine; wan is for video, flux for pictures.",
            inputs=[
                io.Combo.Input("backbone", options=list(BACKBONES), default="mini"),
                io.Combo.Input("precision", options=list(PRECISIONS), default="auto"),
                io.Combo.Input("offload", options=list(OFFLOADS), default="none", tooltip="What waits in main memory."),
                io.String.Input("model", default="", tooltip="A folder, a file or a hub id; empty: the backbone's own."),
            ],
            outputs=[RestorerType.Output(display_name="restorer")],
        )

    @classmethod
    def execute(cls, backbone: str, precision: str, offload: str, model: str = "") -> io.NodeOutput:
        return io.NodeOutput(Model(backbone=backbone, precision=precision, offload=offload, model=model.strip() or None))


class LoadPrompt(io.ComfyNode):
    """A prompt file of the folder `models/ebr_prompts`, alone or beside others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EbrLoadPrompt",
            display_name="Load Prompt (EBR)",
            category=CATEGORY,
            description=f"A learned prompt from models/{PROMPTS}, in place of a task.",
            inputs=[
                io.Combo.Input("file", options=folder_paths.get_filename_list(PROMPTS)),
                io.Float.Input("weight", default=1.0, min=-4.0, max=4.0, step=0.05),
                PromptType.Input("mix_with", optional=True, tooltip="Another prompt, that this one is added to."),
            ],
            outputs=[PromptType.Output(display_name="prompt")],
        )

    @classmethod
    def execute(cls, file: str, weight: float = 1.0, mix_with: tuple = ()) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(PROMPTS, file)
        load_prompt(path)  # so that a damaged file fails here
        return io.NodeOutput((*(mix_with or ()), (Path(path), weight)))


class AutoTask(io.ComfyNode):
    """What is wrong with pictures, as a task for the other nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EbrAutoTask",
            display_name="Auto Task (EBR)",
            category=CATEGORY,
            description=f"Looks at pictures (at all of a batch) and names what to repair; {NONE!r} where nothing is wrong.",
            inputs=[
                io.Image.Input("image"),
                io.Boolean.Input("guess", default=False, tooltip="Take the likeliest task where none is sure."),
            ],
            outputs=[io.String.Output("task", display_name="task"), io.String.Output("seen", display_name="seen")],
        )

    @classmethod
    def execute(cls, image: Tensor, guess: bool = False) -> io.NodeOutput:
        with torch.inference_mode(False):
            diagnosis = diagnose(list(_normal(image)[..., :3].movedim(-1, 1)))
        chosen = diagnosis.tasks or ((diagnosis.likeliest,) if guess else ())
        return io.NodeOutput("+".join(chosen) or NONE, str(diagnosis))


def _inputs(*more: Any) -> list:
    """What both restoring nodes ask for."""
    return [
        RestorerType.Input("restorer"),
        io.Image.Input("image"),
        io.String.Input("task", default="auto", tooltip="haze, rain, snow, blur, lowlight; several: rain+haze; auto; none."),
        io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, tooltip="0: none, 1: as learned."),
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Runs of the transformer; 0: the schedule's own."),
        io.Int.Input("seed", default=42, min=0, max=2**63 - 1, control_after_generate=True),
        io.Int.Input("tile", default=-1, min=-1, max=16384, tooltip="Side in pixels; 0: never tiles; -1: the backbone's own."),
        *more,
        PromptType.Input("prompt", optional=True, tooltip="In place of the task."),
        io.Mask.Input("mask", optional=True, tooltip="Comes out as it is."),
    ]


_OUTPUTS = (("image", io.Image), ("mask", io.Mask))


class Restore(io.ComfyNode):
    """Pictures of a batch, each for itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EbrRestore",
            display_name="Restore (EBR)",
            category=CATEGORY,
            description="Restores pictures, each of a batch for itself; with task auto it also looks at each.",
            inputs=_inputs(),
            outputs=[kind.Output(f"{name}_out", display_name=name) for name, kind in _OUTPUTS],
        )

    @classmethod
    def execute(cls, restorer: Model, image: Tensor, mask: Tensor | None = None, **options: Any) -> io.NodeOutput:
        mask = _mask(image, mask)
        if (request := _request(options)) is None:
            return io.NodeOutput(image, mask)
        bar, results = comfy.utils.ProgressBar(TICKS * len(image)), []
        with torch.inference_mode(False):
            loaded, pixels = restorer.ready(), _normal(image)
            for index, picture in enumerate(pixels):
                results.append(_restore_one(loaded, picture, request, _stepped(bar, TICKS * index)))
            return io.NodeOutput(torch.stack(results), mask)


class RestoreVideo(io.ComfyNode):
    """The pictures of a batch as the frames of one clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EbrRestoreVideo",
            display_name="Restore Video (EBR)",
            category=CATEGORY,
            description="Restores the frames of a clip in chunks that fade into each other; none reaches over a scene cut.",
            inputs=_inputs(
                io.Int.Input("chunk_frames", default=0, min=0, max=1024, tooltip="Restored together; 0: the backbone's own."),
                io.Int.Input("chunk_overlap", default=-1, min=-1, max=512, tooltip="-1: the backbone's own."),
                io.Boolean.Input("per_frame", default=False, tooltip="Frame by frame, with flux, which knows no time."),
                io.Int.Input(
                    "temporal_window",
                    default=-1,
                    min=-1,
                    max=16,
                    optional=True,
                    tooltip="Frames on either side that each agrees with, for mini and flux; -1: the backbone's own.",
                ),
            ),
            outputs=[kind.Output(f"{name}_out", display_name=name) for name, kind in _OUTPUTS],
        )

    @classmethod
    def execute(cls, restorer: Model, image: Tensor, mask: Tensor | None = None, **options: Any) -> io.NodeOutput:
        mask = _mask(image, mask)
        if (request := _request(options)) is None:
            return io.NodeOutput(image, mask)
        bar = comfy.utils.ProgressBar(len(image))

        def on_chunk(until: int, part: float) -> None:
            bar.update_absolute(min(len(image), int(until * part)))
            management.throw_exception_if_processing_interrupted()

        with torch.inference_mode(False):
            loaded, pixels = restorer.ready(), _normal(image)
            looks = sorted({len(pixels) * i // 3 for i in range(3)})
            try:
                recipe = recipe_for(loaded, request, lambda: [_array(pixels[i]) for i in looks])
            except NothingToRepair:
                return io.NodeOutput(image, mask)
            frames = (Frame(_array(picture), n, Fraction(1)) for n, picture in enumerate(pixels))
            size = tuple(image.shape[1:3])
            made = [torch.from_numpy(frame.pixels) for frame in restored(loaded, frames, recipe, size, on_chunk)]
            return io.NodeOutput(torch.cat((torch.stack(made).to(image), pixels[..., 3:]), dim=-1), mask)


def _request(options: dict[str, Any]) -> RestoreRequest | None:
    """The request of a node's inputs; None for the task that changes nothing."""
    prompt, task = options.pop("prompt", None), options.pop("task", "").strip()
    if not prompt and task == NONE:
        return None
    own = {
        "steps": 0,
        "tile": -1,
        "chunk_frames": 0,
        "chunk_overlap": -1,
        "temporal_window": -1,
    }  # the values that leave it to the backbone
    asked = {name: value for name, value in options.items() if value != own.get(name, object())}
    return request_of(None if prompt else task, list(prompt) if prompt else None, asked)


def _restore_one(restorer: Any, picture: Tensor, request: RestoreRequest, callback: Callable[[int, int], None]) -> Tensor:
    """One picture [H, W, C], its alpha as it is; the same one where auto sees nothing to repair."""
    source = _array(picture)
    try:
        recipe: Recipe = recipe_for(restorer, request.with_(per_frame=True), lambda: [source])
    except NothingToRepair:
        return picture
    pixels = fix_colours(restorer.restore(source, callback=callback, **recipe.run), source, recipe.colour_fix or NONE)
    return torch.cat((torch.from_numpy(np.clip(pixels, 0, 1)).to(picture), picture[..., 3:]), dim=-1)


def _stepped(bar: Any, begin: int) -> Callable[[int, int], None]:
    """What is called after each step on a picture: moves the bar, and ends the run when that is asked for."""

    def on_step(done: int, total: int) -> None:
        bar.update_absolute(begin + TICKS * done // total)
        management.throw_exception_if_processing_interrupted()

    return on_step


def _normal(image: Tensor) -> Tensor:
    """Pictures as tensors that may be used outside of inference mode, in [0, 1]."""
    return image.detach().cpu().clone().clamp_(0, 1)


def _array(picture: Tensor) -> np.ndarray:
    """The colours [H, W, 3] float32 of a picture [H, W, C]."""
    return picture[..., :3].float().contiguous().numpy()


def _mask(image: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as it is; an empty one where there is none."""
    return torch.zeros(image.shape[:3], dtype=torch.float32) if mask is None else mask


NODES = [LoadRestorer, LoadPrompt, AutoTask, Restore, RestoreVideo]
