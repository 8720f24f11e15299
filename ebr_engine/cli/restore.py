"""`ebr-engine restore`: pictures in, restored pictures out."""

from dataclasses import replace
from functools import partial

import typer

from ebr_engine.cli import options
from ebr_engine.cli.run.auto import recipe_for
from ebr_engine.cli.run.choosing import precision_of
from ebr_engine.cli.run.jobs import run_jobs
from ebr_engine.cli.run.loading import BaseModel, spread
from ebr_engine.cli.run.preview import go_on, write_preview
from ebr_engine.cli.run.progress import Progress
from ebr_engine.cli.run.recipe import ClipOptions, Recipe
from ebr_engine.cli.run.work import plan_work
from ebr_engine.errors import EbrError


@spread
def restore(
    inputs: options.Inputs = None,
    *,
    task: options.Task = None,
    prompt: options.Prompts = None,
    mix: options.PromptMix = options.Mix.auto,
    strength: options.Strength = 1.0,
    guess: options.Guess = False,
    color_fix: options.ColourFix = None,
    manifest: options.Manifest = None,
    out: options.Out = None,
    compare: options.Compare = False,
    compare_as: options.CompareWay = None,
    preview: options.Preview = False,
    yes: options.Yes = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = True,
    fail_fast: options.FailFast = False,
    quality: options.Quality = None,
    strict: options.Strict = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    start: options.Start = None,
    frames: options.Frames = None,
    chunk_frames: options.ChunkFrames = None,
    chunk_overlap: options.ChunkOverlap = None,
    as_clip: options.AsClip = False,
    fps: options.FrameRate = 24,
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
    base: BaseModel,
    sample_latents: options.SampleLatents = False,
    engine: options.Engine = None,
    device: options.Device = "auto",
    precision: options.TrunkPrecision = options.Precision.auto,
    fp8: options.Fp8 = False,
    offload: options.OffloadMode = options.Offload.none,
    compile: options.Compile = options.CompileMode.auto,
    tile: options.Tile = None,
    tile_overlap: options.TileOverlap = None,
    tile_blend: options.TileBlend = options.Blend.latent,
    max_memory: options.MaxMemory = None,
    low_memory: options.LowMemory = False,
) -> None:
    """Restore pictures and clips: of any size, depth and length; what a file holds beside its pixels is kept, or told.

    Reads and writes PNG, JPEG, WebP, TIFF and AVIF, and the videos that FFmpeg knows, each file in its own format unless
    OUT says otherwise.

    [bold]ebr-engine restore hazy.jpg -o clear.jpg --task haze[/]

    [bold]ebr-engine restore photos/ -o restored/ --task rain --compare[/]

    [bold]ebr-engine restore clip.mp4 -o clean.mp4 --backbone wan --task rain --fp8[/]

    [bold]ebr-engine restore in.png -o out.png --prompt rain.safetensors:0.7 haze.safetensors:0.3[/]
    """
    asked = dict(locals())
    asked |= vars(asked.pop("base"))
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
        fps,
    )
    clips.encoder_options  # noqa: B018 (refuses what is not KEY=VALUE before any work)

    work = plan_work(asked)
    with Progress(len(work.jobs), quiet, json) as progress:
        if work.left_out:
            progress.error(work.left_out, "note")
        if not work.jobs:
            progress.summary(0, [], work.skipped, 0, 0.0)
            return

        from ebr_engine.catalogue import RELEASED_SIZES

        placed = {"device": device, "offload": offload, "compile": compile, "max_memory": max_memory, "low_memory": low_memory}
        restorer = base.load(engine, **placed, precision=chosen, sample_latents=sample_latents)
        bake = {"steps": steps, "schedule": schedule.value, "order": order, "t0": t0, "mix": mix.value, "strength": strength}
        restorer.tile_size(tile, tile_overlap)  # refuses impossible ones before any picture is read
        fixed = RELEASED_SIZES.get(restorer.backbone) if size is options.Size.released else None
        if restorer.backbone == "flux" and any(job.is_clip for job in work.jobs) and not per_frame:
            raise EbrError("flux knows no time; add --per-frame to restore a clip frame by frame, or use --backbone wan")
        run = {"seed": seed, "tile": tile, "tile_overlap": tile_overlap, "tile_blend": tile_blend.value}
        common = Recipe(
            run,
            quality,
            strict,
            fixed,
            clips,
            keep_parts=resume,
            colour_fix=color_fix and color_fix.value,
            compare=compare_as.value if compare_as else "side",
        )
        recipes = {
            key: replace(recipe_for(choice, common, partial(restorer.plan, **bake), guess), settings=work.digests[key])
            for key, choice in work.choices.items()
        }
        if preview:
            write_preview(restorer, work.jobs, recipes[work.jobs[0].task], progress)
            if not go_on(len(work.jobs), yes, progress):
                return
        kept = {"journal": work.journal, "skipped": work.skipped}
        restorer.expect(sum(not job.is_clip for job in work.jobs))
        failed = run_jobs(restorer, work.jobs, recipes, progress, **kept, fail_fast=fail_fast)
    if failed:
        raise typer.Exit(1)
