"""`ebr-engine restore`: pictures in, restored pictures out."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from ebr_engine.cli import options
from ebr_engine.cli.options import named, takes
from ebr_engine.errors import EbrError
from ebr_engine.jobs.texts import is_address, is_prompt, prompts_of_texts
from ebr_engine.request import FIELDS, RestoreRequest
from ebr_engine.settings import several_processes


@takes(*FIELDS)
def restore(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="Pictures, clips or sounds, folders of them, patterns in quotes such as 'photos/**/*.jpg', or addresses: "
            "s3://bucket/photos/.",
        ),
    ] = None,
    *,
    out: Annotated[
        str | None, named("Files", "--out -o OUT", "A file for one input, or a folder (made if missing) that mirrors them.")
    ] = None,
    manifest: Annotated[
        str | None,
        named(
            "Files", "--manifest FILE", "A list of work, .csv or .jsonl: input, output, task and more; relative to its folder."
        ),
    ] = None,
    preview: Annotated[
        bool,
        named("Files", "--preview", "First write NAME_preview.png, a frame or the centre of the first file, and ask to go on."),
    ] = False,
    yes: Annotated[
        bool, named("Files", "--yes -y", "Go on after the preview without asking; without a terminal it ends there.")
    ] = False,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool,
        named("Files", "--resume/--no-resume", "Leave out what an earlier run with the same settings finished; go on in clips."),
    ] = True,
    fail_fast: Annotated[bool, named("Files", "--fail-fast", "End at the first file that fails.")] = False,
    cluster: options.cluster("Computing") = None,
    cluster_cores: options.cores("Computing") = 1,
    cluster_workers: Annotated[
        int | None,
        named("Computing", "--cluster-workers N", "So many at most.", min=1, show_default="all that there is room for"),
    ] = None,
    quiet: Annotated[bool, named("Files", "--quiet -q", "Print errors only.")] = False,
    json: Annotated[
        bool, named("Files", "--json", "Print a JSON object a file, and one for the whole, in place of lines.")
    ] = False,
    request: RestoreRequest,
) -> None:
    """Restore pictures and clips: of any size, depth and length; what a file holds beside its pixels is kept, or told.

    Reads and writes PNG, JPEG, WebP, TIFF and AVIF, and the videos that FFmpeg knows, each file in its own format unless
    OUT says otherwise. Sound is WAV and FLAC, with --backbone mini-audio.

    [bold]ebr-engine restore hazy.jpg -o clear.jpg --task haze[/]

    [bold]ebr-engine restore photos/ -o restored/ --task rain --compare[/]

    [bold]ebr-engine restore clip.mp4 -o clean.mp4 --backbone wan --task rain --fp8[/]

    [bold]ebr-engine restore noisy.wav -o clean.wav --backbone mini-audio --task noise[/]

    [bold]ebr-engine restore s3://photos/2024/ -o s3://restored/2024/ --task rain --cluster ray://head:10001[/]

    [bold]ebr-engine restore in.png -o out.png --prompt rain.safetensors:0.7 haze.safetensors:0.3[/]
    """
    from ebr_engine.cli.progress import Display
    from ebr_engine.jobs.work import find_work

    if cluster and (several_processes() or request.devices):
        raise EbrError("--cluster gives each worker one device; leave torchrun and --devices out")
    if several_processes():
        from ebr_engine.engine.parallel import torchrun

        request = torchrun(request)  # returns to rank 0 only

    # Prompt files may follow one --prompt, where the parser can only see more inputs.
    words = inputs or []
    if more := [word for word in words if is_prompt(word)]:
        request = request.with_(prompt=(*request.prompt, *prompts_of_texts(more)))
    words = [word for word in words if not is_prompt(word)]
    if out == "-":
        raise EbrError("-o -: pictures are not written to standard output; name a file or a folder")
    if preview and cluster:
        raise EbrError("--preview shows one file before all others; make it without --cluster")
    if far := any(map(is_address, (*words, out or "", manifest or ""))):
        from ebr_engine.jobs.remote import find_remote

        if preview:
            raise EbrError("--preview is for files of this machine; leave it out where there is an address")
        work = find_remote(words, out, request, manifest=manifest, overwrite=overwrite, resume=resume)
    else:
        out = out and str(Path(out).expanduser()) + ("/" if out.endswith("/") else "")
        listed = Path(manifest).expanduser() if manifest else None
        files = [Path(word).expanduser() for word in words]
        work = find_work(files, out, request, manifest=listed, overwrite=overwrite, resume=resume)
    with Display(work.files, quiet, json) as progress, work.locked(), ExitStack() as stack:
        if work.left_out:
            progress.error(work.left_out, "note")
        if not work.files:
            progress.summary(0, [], work.skipped, 0, 0.0)
            return

        from ebr_engine.jobs.recipe import Recipes
        from ebr_engine.jobs.run import Run, run_work

        if cluster:
            from ebr_engine.cluster.restore import fleet_on
            from ebr_engine.cluster.run import FleetRun

            jobs = work.first() if far else work.jobs
            restorer = stack.enter_context(
                fleet_on(cluster, cluster_cores, cluster_workers, request, work.digests, jobs, progress)
            )
            kind = FleetRun
        else:
            from ebr_engine.engine.restorer import Restorer

            restorer, kind = stack.enter_context(closing(Restorer.from_request(request))), Run
        recipes = Recipes(restorer, work.digests, keep_parts=resume)
        if preview:
            from ebr_engine.jobs.preview import write_preview

            write_preview(restorer, work.jobs, recipes, progress)
            if not progress.go_on(len(work.jobs), yes):
                return
        if far:
            failed = work.run(restorer, progress, recipes, fail_fast, kind)
        else:
            failed = run_work(restorer, work, progress, recipes, fail_fast, kind)
    if failed:
        raise typer.Exit(1)
