"""`ebr-engine eval`: measure files against their targets, or the bundled prompts on real photos."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.cli import options
from ebr_engine.cli.options import takes
from ebr_engine.errors import EbrError
from ebr_engine.evaluation.choices import FORMS, METRICS, PROTOCOLS
from ebr_engine.request import RestoreRequest

_bundled = partial(typer.Option, rich_help_panel="Bundled benchmark")
_files = partial(typer.Option, rich_help_panel="Your files")
_results = partial(typer.Option, rich_help_panel="Results")

Size = Annotated[str, _bundled("--size", metavar="N|full", help="Side of the square photos in pixels, or full.")]
PromptFolder = Annotated[Path | None, _bundled("--prompts", help="A folder of prompts in place of the bundled ones.")]
Input = Annotated[Path | None, _files("--input", "-i", metavar="PATH", help="Degraded files: a folder (or one file).")]
Target = Annotated[Path | None, _files("--target", metavar="PATH", help="What they should look like; same stems.")]
Restored = Annotated[
    Path | None, _files("--restored", metavar="PATH", help="Results, same stems; otherwise --task or --prompt restores now.")
]
List = Annotated[
    Path | None, _files("--list", metavar="FILE.json", help="In place of folders: image_path and target_path, as released.")
]
Root = Annotated[
    Path | None, _files("--root", metavar="FOLDER", show_default="the list's", help="Folder that the list's paths start from.")
]
Clips = Annotated[bool, _files("--clips", help="A folder of pictures is a clip, its pictures the frames.")]
Partial = Annotated[bool, _files("--partial", help="Leave out files without a partner; otherwise they are refused.")]
ProtocolChoice = Annotated[
    Literal[PROTOCOLS],
    _files(
        "--protocol",
        help="native: own size. released: the paper's, 480x832 or 1024x1024, then 512x512. y-channel: luma, as deraining does.",
    ),
]
Metrics = Annotated[
    str,
    _files(
        "--metrics",
        metavar="NAMES",
        help=f"Of {', '.join(METRICS)}; lpips needs the extra metrics, those from dists on the extra iqa.",
    ),
]
WeightsDir = Annotated[
    Path | None,
    _files("--weights-dir", metavar="FOLDER", show_default="torch's", help="Where the weights of lpips, dists, … lie."),
]
Empty = Annotated[
    bool,
    _files("--empty/--no-empty", help="Also measure the frozen transformer with the empty prompt, which takes as long again."),
]
Seeds = Annotated[
    str | None,
    _files("--seeds", metavar="N,N...", show_default="--seed's", help="Restore by several seeds; scores are means over them."),
]
Workers = Annotated[int, _files("--workers", metavar="N", min=1, help="Processes; scores do not depend on it, but for rounding.")]
Cluster = options.cluster("Your files")
Cores = options.cores("Your files")
Resume = Annotated[bool, _files("--resume/--no-resume", help="Keep the rows that an earlier run left in --out.")]


Folders = Annotated[
    list[Path] | None, typer.Argument(metavar="FOLDER...", help="Folders of results, for --collect and --compare.")
]
Collect = Annotated[bool, _results("--collect", help="One table of several measurements and learning runs: FOLDER...")]
CompareTwo = Annotated[bool, _results("--compare", help="Two measurements of the same files, file by file: FOLDER FOLDER.")]
TableForm = Annotated[Literal[FORMS], _results("--table", help="How tables are printed.")]


@takes(
    *("prompt", "mix", "strength", "detail", "deconvolve", "supersample", "steps", "order", "t0", "seed", "backbone", "model"),
    *("revision", "offline", "context", "vae", "engine", "device", "precision", "tile", "tile_overlap"),
)
def evaluate(
    folders: Folders = None,
    *,
    collect: Collect = False,
    compare: CompareTwo = False,
    form: TableForm = "markdown",
    source: Input = None,
    target: Target = None,
    restored: Restored = None,
    list_file: List = None,
    root: Root = None,
    clips: Clips = False,
    incomplete: Partial = False,
    protocol: ProtocolChoice = "native",
    metrics: Metrics = "psnr,ssim",
    workers: Workers = 1,
    cluster: Cluster = None,
    cluster_cores: Cores = 1,
    resume: Resume = True,
    weights_dir: WeightsDir = None,
    empty: Empty = True,
    seeds: Seeds = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PATH", help="Your files: the folder for the results. Bundled: a .json file."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="NAME", help="What to restore by. Bundled: only these tasks (repeatable)."),
    ] = None,
    size: Size = "256",
    prompts: PromptFolder = None,
    schedule: Annotated[
        Literal[tuple(SCHEDULES)] | None,
        typer.Option("--schedule", show_default="released by that protocol, else fast", rich_help_panel="Sampling"),
    ] = None,
    request: RestoreRequest,
) -> None:
    """Measure restorations: PSNR, SSIM and, with their libraries, LPIPS, DISTS, CLIP-IQA+ and MUSIQ.

    Beside the results stand the input and the frozen transformer with the empty prompt, and what was gained over both, with
    95 % intervals. Writes scores.csv (a line a file), summary.md with the worst files, and summary.json with all that the
    numbers were made with, into the folder OUT; an interrupted run goes on. What has no target gets no score that needs one.

    [bold]ebr-engine eval --input rainy/ --target clean/ --task rain -o scores/[/]

    [bold]ebr-engine eval --restored mine/ --target clean/ --protocol y-channel -o scores/[/]

    [bold]ebr-engine eval --list LOLv1.json --root data/ --task lowlight --protocol released -o scores/[/]

    [bold]ebr-engine eval --compare scores/ others/[/]

    [bold]ebr-engine eval --collect scores/*/ --table latex[/]

    Without files it measures the bundled prompts on four real photos, degraded, beside three other ways: the degraded input,
    the empty prompt, and a prompt learned by the naive process. Needs the extra: pip install 'ebr-engine\\[train]'.

    [bold]ebr-engine eval --size 256 --out quality.json[/]
    """
    if collect or compare:
        from ebr_engine.cli.eval_folders import show_folders

        if collect and compare:
            raise EbrError("--collect and --compare are two tables; ask for one")
        show_folders(folders or [], compare, form, out)
        return
    if folders:
        raise EbrError(f"{folders[0]}: folders of results go with --collect or --compare; files are named by --input")
    if not (source or target or restored or list_file):
        if request.prompt or request.engine or request.mix != "auto":
            raise EbrError("--prompt, --mix and --engine are for files of your own; name them by --input or --list")
        _bundled_benchmark(task, size, request, prompts, out, form)
        return
    from ebr_engine.cli.eval_files import Request, evaluate_files

    if prompts:
        raise EbrError("--prompts is the bundled benchmark's; a prompt for files of your own goes by --prompt")
    wanted = Request(
        *(source, target, restored, list_file, root, clips, incomplete, protocol, metrics, workers, resume, out),
        *(weights_dir, empty, form, cluster, cluster_cores),
    )
    if not schedule:
        schedule = "released" if protocol == "released" and not request.engine else "fast"
    evaluate_files(wanted, task or [], request.with_(schedule=schedule), _seeds(seeds, request.seed))


def _seeds(text: str | None, seed: int) -> tuple[int, ...]:
    """The seeds that --seeds names; without it --seed's."""
    parts = [part.strip() for part in text.split(",")] if text is not None else [str(seed)]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise EbrError(f"--seeds takes different whole numbers such as 1,2,3, not {text}")
    return tuple(map(int, parts))


def _bundled_benchmark(
    task: list[str] | None,
    size: str,
    request: RestoreRequest,
    prompts: Path | None,
    out: Path | None,
    form: str,
) -> None:
    if size != "full" and not (size.isdigit() and int(size) >= 64 and int(size) % 8 == 0):
        raise EbrError(f"--size must be full, or a multiple of 8 of at least 64, not {size}")

    import torch

    from ebr_engine.evaluation import quality
    from ebr_engine.evaluation.photos import STRENGTH
    from ebr_engine.evaluation.provenance import provenance
    from ebr_engine.prompts.catalogue import TASKS
    from ebr_engine.version import __version__

    if wrong := [name for name in task or [] if name not in TASKS]:
        raise EbrError(f"unknown task {', '.join(wrong)}; there is: {', '.join(TASKS)}")
    from ebr_engine.engine.restorer import Restorer

    restorer = Restorer.from_request(request)
    started = time.monotonic()

    def tell(record: dict) -> None:
        typer.echo(f"{record['task']:9} {record['photo']:11} {record['row']:13} {record['psnr']:6.2f} dB", err=True)

    pixels = None if size == "full" else int(size)
    seen = {"detail": request.detail, "deconvolve": request.deconvolve, "supersample": request.supersample}
    scores = quality.measure(restorer, task or TASKS, size=pixels, callback=tell, prompts=prompts, **seen)
    where = {
        "device": str(restorer.device),
        "dtype": str(restorer.dtype),
        "torch": torch.__version__,
        "version": __version__,
        "provenance": provenance(restorer.device),
    }
    typer.echo(
        f"Degradation strength {STRENGTH} of 1, photos {'whole' if pixels is None else f'{size} x {size}'}, "
        f"mean of four; {where['device']}, {where['dtype']}, {time.monotonic() - started:.0f} s\n"
    )
    for value, title, digits in (("psnr", "PSNR in dB", 2), ("ssim", "SSIM", 3)):
        typer.echo(f"{title}\n\n{quality.markdown(scores, value, digits)}\n")
        if len({record["photo"] for record in scores}) > 1:
            typer.echo(f"{quality.gain_table(scores, value, digits).render(form)}\n")
    if out is not None:
        out.write_text(json.dumps({"size": size, "strength": STRENGTH, **where, "scores": scores}, indent=1) + "\n")
