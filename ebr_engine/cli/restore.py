"""`ebr-engine restore`: pictures in, restored pictures out."""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ebr_engine.cli import options
from ebr_engine.cli.clips import ClipOptions, restore_clip
from ebr_engine.cli.group import one_line, out_of_memory
from ebr_engine.cli.progress import Progress
from ebr_engine.errors import EbrError

if TYPE_CHECKING:
    from ebr_engine.media.files import Job
    from ebr_engine.media.images import Picture

PROMPT_SUFFIXES = (".safetensors", ".pt", ".pth")


def restore(
    inputs: options.Inputs,
    *,
    task: options.Task = None,
    prompt: options.Prompts = None,
    mix: options.PromptMix = options.Mix.residual,
    out: options.Out,
    compare: options.Compare = False,
    overwrite: options.Overwrite = False,
    quality: options.Quality = 95,
    quiet: options.Quiet = False,
    start: options.Start = None,
    frames: options.Frames = None,
    chunk_frames: options.ChunkFrames = None,
    chunk_overlap: options.ChunkOverlap = None,
    per_frame: options.PerFrame = False,
    deinterlace: options.Deinterlace = False,
    codec: options.VideoCodec = None,
    pix_fmt: options.PixelFormat = None,
    crf: options.Crf = None,
    encoder: options.EncoderOptions = None,
    copy_audio: options.CopyAudio = True,
    copy_subtitles: options.CopySubtitles = True,
    steps: options.Steps = None,
    schedule: options.StepSchedule = options.Schedule.fast,
    order: options.Order = None,
    t0: options.T0 = None,
    seed: options.Seed = 42,
    size: options.PictureSize = options.Size.native,
    backbone: options.Backbone = "mini",
    model: options.Model = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    context: options.Context = None,
    vae: options.Vae = None,
    sample_latents: options.SampleLatents = False,
    engine: options.Engine = None,
    device: options.Device = "auto",
    precision: options.TrunkPrecision = options.Precision.auto,
    fp8: options.Fp8 = False,
    offload: options.OffloadMode = options.Offload.none,
    tile: options.Tile = None,
    tile_overlap: options.TileOverlap = None,
) -> None:
    """Restore pictures and clips: of any size, depth and length; alpha, EXIF, colour profile, sound and times are kept.

    Reads and writes PNG, JPEG, WebP, TIFF and AVIF, and the videos that FFmpeg knows, each file in its own format unless
    OUT says otherwise.

    [bold]ebr-engine restore hazy.jpg -o clear.jpg --task haze[/]

    [bold]ebr-engine restore photos/ -o restored/ --task rain --compare[/]

    [bold]ebr-engine restore clip.mp4 -o clean.mp4 --backbone wan --task rain --fp8[/]

    [bold]ebr-engine restore in.png -o out.png --prompt rain.safetensors:0.7 haze.safetensors:0.3[/]
    """
    # Prompt files may follow one --prompt, where the parser can only see more inputs.
    pictures = [item for item in inputs if not _is_prompt(item)]
    texts = [*(prompt or []), *filter(_is_prompt, inputs)]
    if not pictures:
        raise EbrError("nothing to restore: name at least one file or folder")
    if engine and (task or texts):
        raise EbrError("an engine file holds its own prompt; leave --task and --prompt out, or build another one")
    prompts = [] if engine else chosen_prompts(backbone, task, texts)
    if t0 is not None and not 0 < t0 < 1:
        raise EbrError(f"--t0 must be above 0 and below 1, not {t0:g}")
    chosen = precision_of(precision, fp8)
    clips = ClipOptions(
        start,
        frames,
        chunk_frames,
        chunk_overlap,
        deinterlace,
        codec,
        pix_fmt,
        crf,
        tuple(encoder or ()),
        copy_audio,
        copy_subtitles,
    )
    clips.encoder_options  # noqa: B018 (refuses what is not KEY=VALUE before any work)

    from ebr_engine.media.files import plan_jobs

    jobs = plan_jobs([Path(item) for item in pictures], out, compare, overwrite)
    with Progress(len(jobs), quiet) as progress:
        from ebr_engine.engine import RELEASED_SIZES, Restorer

        if engine:
            restorer = Restorer.from_engine(engine, vae=vae, device=device, offload=offload.value)
        else:
            restorer = Restorer(
                backbone,
                model=model,
                revision=revision,
                offline=offline,
                context=context,
                vae=vae,
                sample_latents=sample_latents,
                device=device,
                precision=chosen,
                offload=offload.value,
            )
        run = {"steps": steps, "schedule": schedule.value, "order": order, "t0": t0, "mix": mix.value}
        plan = restorer.plan(task, prompts or None, **run)
        restorer.tile_size(tile, tile_overlap)  # refuses impossible ones before any picture is read
        fixed = RELEASED_SIZES.get(restorer.backbone) if size is options.Size.released else None
        if restorer.backbone == "flux" and any(job.is_clip for job in jobs) and not per_frame:
            raise EbrError("flux knows no time; add --per-frame to restore a clip frame by frame, or use --backbone wan")
        settings = {"plan": plan, "seed": seed, "tile": tile, "tile_overlap": tile_overlap}
        failed = restore_all(restorer, jobs, settings, Output(quality, fixed, clips), progress)
    if failed:
        raise typer.Exit(1)


def chosen_prompts(backbone: str, task: str | None, texts: list[str]) -> list[tuple[Path, float]]:
    """Prompt files and their weights; `EbrError` unless there is a task or a prompt, and not both, and the files exist.

    Asked before any weights are: a prompt that is missing is told before a model is downloaded.
    """
    from ebr_engine.catalogue import BACKBONES, find_prompt

    prompts = [_prompt(text) for text in texts]
    if bool(task) == bool(prompts):
        wrong = "both --task and --prompt" if task else "neither --task nor --prompt"
        raise EbrError(f"{wrong} given; say what to repair by one of them, for example --task haze")
    if task and backbone in BACKBONES:
        find_prompt(backbone, task)
    return prompts


@dataclass(frozen=True)
class Output:
    """How results are made and written."""

    quality: int = 95
    size: tuple[int, int] | None = None  # height and width to restore at; None is each picture's own
    clips: ClipOptions = field(default_factory=ClipOptions)


def precision_of(precision: options.Precision, fp8: bool) -> str:
    """The precision that --precision and --fp8 ask for together; `EbrError` when they contradict each other."""
    if fp8 and precision.value not in ("auto", "fp8"):
        raise EbrError(f"--fp8 and --precision {precision.value} contradict each other")
    return "fp8" if fp8 else precision.value


def restore_all(restorer: Any, jobs: "list[Job]", settings: dict[str, Any], output: Output, progress: Progress) -> int:
    """Restore every job, telling of each; the number that failed."""
    started = time.perf_counter()
    failed = 0
    for job in jobs:
        progress.start(job.source.name)
        try:
            restore_one = _restore_clip if job.is_clip else _restore_picture
            progress.finish(restore_one(restorer, job, settings, output, progress))
        except (EbrError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            failed += 1
            line = one_line(error)
            progress.error(line if str(job.source) in line else f"{job.source}: {line}")
            progress.finish(None)
    if len(jobs) > 1:
        failures = f", {failed} failed" if failed else ""
        progress.line(f"{len(jobs) - failed} of {len(jobs)} restored{failures}, {time.perf_counter() - started:.1f} s")
    return failed


def _restore_picture(restorer: Any, job: "Job", settings: dict[str, Any], output: Output, progress: Progress) -> str:
    from ebr_engine.media.images import check_can_hold, read_image, resize_picture, write_image

    started = time.perf_counter()
    picture = read_image(job.source)
    for path in job.outputs:
        check_can_hold(path, picture)
    if output.size:
        picture = resize_picture(picture, *output.size)
    restored = replace(picture, pixels=restorer.restore(picture.pixels, callback=progress.step, **settings))
    job.target.parent.mkdir(parents=True, exist_ok=True)
    write_image(job.target, restored, output.quality)
    if job.compare:
        write_image(job.compare, _beside(picture, restored))
    seconds = time.perf_counter() - started
    return f"{job.source} -> {job.target}  {picture.width} x {picture.height}  {picture.bits} bit  {seconds:.1f} s"


def _restore_clip(restorer: Any, job: "Job", settings: dict[str, Any], output: Output, progress: Progress) -> str:
    if output.size:
        settings = settings | {"size": output.size}
    return restore_clip(restorer, job, settings, output.clips, progress)


def _beside(left: "Picture", right: "Picture") -> "Picture":
    import numpy as np

    alpha = None if left.alpha is None else np.concatenate([left.alpha, right.alpha], axis=1)
    return replace(right, pixels=np.concatenate([left.pixels, right.pixels], axis=1), alpha=alpha)


def _is_prompt(text: str) -> bool:
    return _prompt_parts(text)[0].lower().endswith(PROMPT_SUFFIXES)


def _prompt(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT; the file has to exist."""
    path, weight = _prompt_parts(text)
    if not Path(path).is_file():
        raise EbrError(f"{path}: no such prompt file")
    if not math.isfinite(weight):
        raise EbrError(f"{text}: the weight must be a finite number")
    return Path(path), weight


def _prompt_parts(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition(":")
    try:  # what follows the colon of C:\rain.safetensors is no number
        return (path, float(weight)) if path and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0
