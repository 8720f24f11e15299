"""`Restorer`: what people call. It loads a backbone, plans a request and restores pictures, clips and files."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone, Codec
from ebr_engine.backbones.layers import quantised_as, quantised_for
from ebr_engine.backbones.registry import medium_of
from ebr_engine.bridge.sampler import Callback, StepTable
from ebr_engine.engine import plan as planning
from ebr_engine.engine.batches import AT_ONCE, one_item, read, together
from ebr_engine.engine.classify import Diagnosis, diagnose
from ebr_engine.engine.devices import choose_device
from ebr_engine.engine.execute import Runner
from ebr_engine.engine.layout import share
from ebr_engine.engine.loading import engine_of, engine_of_file
from ebr_engine.engine.measure import estimate
from ebr_engine.engine.parallel import first_device
from ebr_engine.engine.plan import Plan
from ebr_engine.engine.run import Engine
from ebr_engine.errors import EngineError
from ebr_engine.export.engine_file import save_engine
from ebr_engine.media import PICTURES
from ebr_engine.media.arrays import to_tensor
from ebr_engine.media.sizes import resized
from ebr_engine.prompts.catalogue import AUTO
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.request import CLIP, FILE, LOAD, PLAN, RUN, RestoreRequest, check_names, names_of

if TYPE_CHECKING:
    from ebr_engine.jobs.outcome import Outcome

PLANNED, RUNNING = names_of(PLAN), names_of(RUN)
KEPT_BY_ENGINE = ("device", "offload", "compile", "max_memory", "low_memory", "vae", "devices")  # what an engine file leaves open


class Restorer:
    """A loaded backbone, ready to restore pictures, clips and files with any of its prompts.

    `backbone`: `mini` (bundled), `wan` or `flux`. Keyword arguments are the model's and the machine's fields of
    `RestoreRequest`: `model`, `revision`, `offline`, `context`, `vae`, `sample_latents`, `device`, `precision`,
    `fp8_attention`, `offload`, `compile`, `max_memory`, `low_memory`; `devices`, several that share each run (`parallel.py`),
    whose processes end with this one or with `close`. When memory runs out, a run is made again in a way that
    needs less, and says so.
    Raises `EbrError` for anything that cannot be met.
    """

    def __init__(self, backbone: str = "mini", **options: Any):
        check_names(options, names_of(LOAD))
        request = RestoreRequest.of(backbone=backbone, **options)
        self.engine = engine_of(request)
        self.built: Plan | None = None
        self.loaded = request

    @classmethod
    def from_request(cls, request: RestoreRequest, here: bool = True) -> "Restorer":
        """The restorer that a request asks for: a backbone, or an engine file in its place.

        `here`: to restore on this machine, where fp8 may mean another precision; not to write a file for another one.
        """
        options = request.part(LOAD)
        if here and not request.engine:
            options["precision"] = quantised_for(request.precision, choose_device(first_device(request)))
        engine = options.pop("engine")
        if engine:
            return cls.from_engine(engine, **{name: options[name] for name in KEPT_BY_ENGINE})
        return cls(**options)

    @classmethod
    def from_engine(cls, path: str | Path, **options: Any) -> "Restorer":
        """Start from an engine file (`build`): its prompt, steps and precision are fixed, so `restore` takes none of them.

        Or from an exported trunk (`export/`: `.onnx`, `.plan`, `.pt2`) with its tables beside it. Keyword arguments: `device`,
        `offload`, `compile`, `max_memory`, `low_memory`, `devices`, and `vae`, a folder in place of the one that the file names.
        Raises `EngineError` for a file that is missing or damaged.
        """
        check_names(options, KEPT_BY_ENGINE)
        request = RestoreRequest.of(**options).with_(engine=Path(path).expanduser())
        engine, plan = engine_of_file(request)
        return cls.from_backbone(engine, plan, request.with_(backbone=engine.backbone.name))

    @classmethod
    def from_backbone(cls, engine: Engine, built: Plan | None = None, loaded: RestoreRequest | None = None) -> "Restorer":
        """A restorer of a backbone that is loaded already; `built`: the only plan that it runs; `loaded`: what was asked for."""
        restorer = cls.__new__(cls)
        restorer.engine, restorer.built = engine, built
        restorer.loaded = loaded or RestoreRequest(backbone=engine.backbone.name)
        return restorer

    @property
    def backbone(self) -> Backbone:
        """The loaded backbone."""
        return self.engine.backbone

    @property
    def runner(self) -> Runner:
        """How the sampler runs on it."""
        return self.engine.runner

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's layers that are not fp8."""
        return self.backbone.dtype

    @property
    def trunk(self) -> Any:
        """The transformer: a module, or an exported one."""
        return self.backbone.trunk

    @property
    def codec(self) -> Codec:
        """Pixels ↔ latents."""
        return self.backbone.codec

    @contextmanager
    def previewing(self) -> Iterator[None]:
        """Within it pictures go through the tiny autoencoder that `vae` names, where it names one."""
        own, preview = self.codec, self.backbone.preview
        if preview is not None:
            self.engine.backbone = replace(self.backbone, codec=preview.to(self.device))
        try:
            yield
        finally:
            if preview is not None:
                preview.to("cpu")
                self.engine.backbone = replace(self.backbone, codec=own)

    def expect(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Say which sizes (height, width) of pictures or frames are to come, each as often as it comes.

        With `compile="auto"` a size that comes often enough is compiled for, and no other; see `execute.py`.
        """
        self.engine.expect(sizes)

    @torch.no_grad()
    def estimate(self, pictures: Iterable[tuple[tuple[int, int], Plan, dict[str, Any]]]) -> float | None:
        """Seconds that pictures or frames will take: (height and width, plan, options of `run`) each; None where that is little.

        A few evaluations of the transformer on a small latent are timed; none on a GPU.
        """
        expected: Counter[tuple[int, int]] = Counter()
        step = None
        for size, plan, how in pictures:
            for stage in self.engine.stages(plan, *size, how):
                asked = (how["tile"], how["tile_overlap"], how["tile_blend"], how["detail"])
                expected += self.engine.evaluations(*size, stage, *asked)
                step = stage.tables[0][0]
        return estimate(self.engine, expected, step)

    def build(self, path: str | Path, plan: Plan, about: dict | None = None) -> None:
        """Write an engine file of this backbone and one plan, to start from with `from_engine`; see `export/engine_file.py`."""
        plan.check_single()
        if quantised_as(self.trunk) == "int8":
            raise EngineError("int8 layers are laid out for this machine's CPU: a file holds fp8 or another precision")
        save_engine(Path(path), self.backbone, plan.table, plan.tables, (about or {}) | plan.facts)

    def bake(
        self, prompts: list[tuple[Prompt, float]], table: StepTable, mix: str = "residual", timesteps: Tensor | None = None
    ) -> Plan:
        """The plan of a run with these prompts and weights along a step table; see `plan.bake`."""
        return planning.bake(self.backbone, prompts, table, mix, timesteps)

    def plan(self, task: str | None = None, prompt: Any = None, **options: Any) -> Plan:
        """Everything of a run that does not depend on a pixel; arguments and errors as those of `restore`."""
        check_names(options, PLANNED)
        return self.plan_for(RestoreRequest.of(task=task, prompt=prompt, **options))

    def plan_for(self, request: RestoreRequest) -> Plan:
        """The plan of a request's fields of that stage."""
        if self.built is None:
            return planning.make_plan(self.backbone, request)
        if request.part(PLAN) != RestoreRequest().part(PLAN):
            raise EngineError(
                "an engine file's task, prompt, strength, steps and schedule are fixed; build another one to change them"
            )
        return self.built

    @torch.no_grad()
    def restore(
        self,
        image: Any,
        task: str | None = None,
        prompt: Any = None,
        *,
        plan: Plan | None = None,
        callback: Callback | None = None,
        **options: Any,
    ) -> Any:
        """Restore one picture (or a batch of one size).

        Args: `image`: PIL image, array [H, W], [H, W, 1, 2, 3 or 4] (uint8, uint16, or float in [0, 1]) or tensor [3, H, W]
        or [B, 3, H, W] (float in [0, 1]); the result is of the same kind, alpha untouched. A path gives an array [H, W, 3].
        `task`: a bundled or installed prompt by name, or several (`rain+haze`, `rain:0.7+haze:0.3`), or `auto` for whatever is
        wrong with the picture (with all of a batch); or `prompt`: a Prompt, a file, or a list of them or of (prompt, weight);
        or `plan`, made once for many pictures.
        `options` are fields of `RestoreRequest`. `mix`: several prompts add their `residual`s in one run, or run once an
        evaluation each and average `velocity` (as released), or restore in `turn`, in the order that they are named, each from
        its own T0; `auto` is the backbone's. `strength`: of all prompts together, 1 as they were learned, 0 the empty prompt,
        at most 2. `steps`, `schedule`, `order`, `t0`: see `sampler.make_table`; t0 is the first prompt's by default. `seed` of
        the noise. `detail`: of the `model`, or of the `input`, whose tones alone the model then changes, by one run on a small
        version (`media/detail.py`); `auto` is what the prompt says. `deconvolve`: whether the blur that a picture shows is found
        and taken out first (`media/deconvolution`): `on`, `off`, or `auto`, what the prompt says. `supersample`: how many times
        finer than its pixels, either way, the transformer sees a picture, where the task has a prompt for that; by default 2 up
        to a megapixel. `tile`, `tile_overlap`: pixels; pictures larger than a tile run in tiles (default by backbone; 0 never
        tiles), which `tile_blend` blends in the `latent` inside every step, or in `pixel`s after all steps (less memory).
        `callback(done, total)` after each step, of a picture in tiles after each group of them; once after the last step where
        all of them are one CUDA graph. What it raises ends the run.
        Raises: `EbrError` (a ValueError) for anything the request gets wrong.
        """
        request = _asked(task, prompt, plan, options)
        self._check_pictures()
        pixels, rebuild = to_tensor(read(image))
        if plan is None:
            plan = self.plan_for(request.with_(task=self._seen(pixels)) if task == AUTO else request)
        self.engine.begin()
        how = request.part(RUN)
        clips = pixels.unsqueeze(2)
        stages = self.engine.stages(plan, *clips.shape[-2:], how)
        for i, stage in enumerate(stages):
            clips = self.engine.run(clips, stage, 0, share(callback, i, len(stages)), **how)
        return rebuild(clips.squeeze(2))

    @torch.no_grad()
    def restore_batch(
        self,
        images: Sequence[Any],
        task: str | None = None,
        prompt: Any = None,
        *,
        plan: Plan | None = None,
        at_once: int = AT_ONCE,
        callback: Callback | None = None,
        **options: Any,
    ) -> list[Any]:
        """Restore several pictures and clips of any sizes: those that are padded to one size run together, `at_once` at most.

        An image is one picture as `restore` takes it, or a clip: tensor [1, 3, F, H, W] or [3, F, H, W] (F other than 3), or
        array [F, H, W, 3]; results are of the same kinds, in the same order, and those of one by one but for rounding. Other
        arguments are those of `restore`, and so are the errors; `callback(done, total)` counts images.
        """
        request = _asked(task, prompt, plan, options)
        self._check_pictures()
        items = [one_item(read(image)) for image in images]
        plans = self._plans([pixels for pixels, _ in items], request) if plan is None else [plan] * len(items)
        self.engine.begin()
        results: list[Any] = [None] * len(items)
        done = 0
        for one in dict.fromkeys(map(id, plans)):
            mine = [i for i, each in enumerate(plans) if id(each) == one]
            found = together(self.engine, [items[i][0] for i in mine], plans[mine[0]], at_once, request.part(RUN))
            for i, clip in found:
                results[mine[i]] = items[mine[i]][1](clip)
                done += 1
                if callback is not None:
                    callback(done, len(items))
        return results

    def _plans(self, clips: list[Tensor], request: RestoreRequest) -> list[Plan]:
        """The plan of each clip; with task auto each is looked at, and equal tasks share one."""
        if request.task != AUTO:
            return [self.plan_for(request)] * len(clips)
        tasks = [self._seen(clip.transpose(1, 2).flatten(0, 1)) for clip in clips]
        made = {task: self.plan_for(request.with_(task=task)) for task in dict.fromkeys(tasks)}
        return [made[task] for task in tasks]

    def restore_file(
        self, source: str | Path, target: str | Path, *, callback: Callable[[float, str], None] | None = None, **options: Any
    ) -> "Outcome":
        """Restore a picture or a clip from file to file, with all that the file holds beside its pixels, as the command does.

        `options`: every field of `RestoreRequest` but the model's and the machine's; `overwrite`, whether `target` may be
        replaced; and `resume`, whether a clip goes on where an earlier call was stopped or killed, which then leaves what it
        has finished beside `target`. `callback(share, where)` hears of the work. Raises `EbrError` or OSError where the file
        cannot be restored; nothing else that is half-written is left.
        """
        from ebr_engine.jobs.run import restore_one

        how = {name: options.pop(name, False) for name in ("overwrite", "resume")}
        check_names(options, names_of(PLAN, RUN, CLIP, FILE))
        return restore_one(self, source, target, RestoreRequest.of(**options), callback, **how)

    @torch.no_grad()
    def run(
        self,
        pixels: Tensor,
        plan: Plan,
        *,
        first: int = 0,
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Pixels [B, 3, H, W], or clips [B, 3, F, H, W], in [0, 1] → restored ones of the same shape, float32 on the CPU.

        `size` (height, width) resizes first, as the published protocol does; the result is then of that size.
        `first`: number of a chunk's first frame in its clip, so that every chunk sees the clip's noise of that moment. A
        backbone that knows nothing of time (mini, FLUX) restores a clip frame by frame, with the same noise in each; the frames
        then agree with `temporal_window` neighbours on either side (`media/motion.py`).
        `options`: `seed`, `detail`, `deconvolve`, `tile`, `tile_overlap`, `tile_blend`, `temporal_window`.
        """
        check_names(options, RUNNING)
        how = RestoreRequest.of(**options).part(RUN)
        clips = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels
        if size is not None:
            clips = resized(clips, *size)
        stages = self.engine.stages(plan, *clips.shape[-2:], how) if pixels.ndim == 4 else plan.stages
        for i, stage in enumerate(stages):
            clips = self.engine.run(clips, stage, first, share(callback, i, len(stages)), **how)
        return clips.squeeze(2) if pixels.ndim == 4 else clips

    def close(self) -> None:
        """Let the processes of other devices go, where there are any; nothing can be restored with them any more."""
        if self.engine.ranks:
            self.engine.ranks.end()

    def begin(self) -> None:
        """A new file begins: what an earlier one had to run with when memory ran out is not held against it."""
        self.engine.begin()

    @property
    def smaller(self) -> str:
        """How this file had to be run in pieces that are seen when memory ran out; empty where it was not."""
        return self.engine.fitting.seen

    def diagnose(self, pictures: Sequence[Tensor]) -> Diagnosis:
        """What is wrong with a picture [3, H, W] in [0, 1], or with all of several; see `classify.py`."""
        return diagnose(pictures)

    def _check_pictures(self) -> None:
        """`EngineError` for a backbone that restores none."""
        if medium_of(self.backbone.name) != PICTURES:
            raise EngineError(f"{self.backbone.name} restores no pictures but {medium_of(self.backbone.name)}; use restore_file")

    def _seen(self, pictures: Tensor) -> str:
        """The tasks that auto chooses for pictures [B, 3, H, W] in [0, 1]; `EngineError` for none."""
        diagnosis = self.diagnose(list(pictures))
        if not diagnosis.tasks:
            raise EngineError(f"auto sees {diagnosis}; name a task")
        return "+".join(diagnosis.tasks)

    @property
    def released_size(self) -> tuple[int, int]:
        """Height and width of the published protocol; `EngineError` for a backbone that has none."""
        return planning.released_size(self.backbone)

    @property
    def asks_per_frame(self) -> bool:
        """Whether a clip is restored frame by frame only where that is asked for."""
        return self.backbone.spec.asks_for_frames

    def chunk_size(
        self,
        frames: int | None,
        overlap: int | None,
        size: tuple[int, int] | None = None,
        plan: Plan | None = None,
        **options: Any,
    ) -> tuple[int, int]:
        """Length and overlap of a clip's chunks in frames, with the backbone's defaults; `EngineError` for a wrong length.

        For frames of `size` (height, width), run by `plan` with `options` of `run`, they are no longer than memory allows, where
        it is limited. A backbone that knows no time has longer ones, too, where neighbours smooth each other: in
        `temporal_window`, or where the detail is the input's.
        """
        check_names(options, RUNNING)
        how = RestoreRequest.of(**options).part(RUN)
        by_input = plan is not None and plan.any_by_input(how["detail"])
        return self.engine.chunk_size(frames, overlap, size, by_input, how)

    def tile_size(self, tile: int | None, overlap: int | None) -> tuple[int, int]:
        """Side and overlap of the tiles in pixels, checked, with the backbone's defaults; a side of 0 never tiles."""
        return self.engine.geometry.tile_size(tile, overlap)


def _asked(task: str | None, prompt: Any, plan: Plan | None, options: dict[str, Any]) -> RestoreRequest:
    """The request of `restore`'s arguments; `EngineError` where a plan is given, and what it has fixed."""
    check_names(options, (*PLANNED, *RUNNING))
    request = RestoreRequest.of(task=task, prompt=prompt, **options)
    if plan is not None and (fixed := [name for name, value in request.part(PLAN).items() if value != PLAN_DEFAULTS[name]]):
        raise EngineError(f"a plan has its {', '.join(fixed)} already; give a plan, or these")
    return request


PLAN_DEFAULTS = RestoreRequest().part(PLAN)
