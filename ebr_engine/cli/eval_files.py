"""The part of `ebr-engine eval` that measures a person's own files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ebr_engine.cli.telling import tell
from ebr_engine.errors import EbrError
from ebr_engine.jobs.work import prompts_of
from ebr_engine.request import RestoreRequest

if TYPE_CHECKING:
    from ebr_engine.evaluation.paired import Item


@dataclass(frozen=True)
class Request:
    """What to measure, and how; the options of the same names."""

    source: Path | None
    target: Path | None
    restored: Path | None
    list_file: Path | None
    root: Path | None
    clips: bool
    partial: bool
    protocol: str
    metrics: str
    workers: int
    resume: bool
    out: Path | None


def evaluate_files(
    request: Request, tasks: list[str], prompts: list[tuple[Path, float]], how: dict[str, Any], device: str
) -> None:
    """Measure, tell of every file, write the summary; exit code 1 where a file could not be measured."""
    if request.out is None:
        raise EbrError("--out is missing: the folder for scores.csv, summary.md and summary.json")
    if request.out.exists() and not request.out.is_dir():
        raise EbrError(f"{request.out}: has to be a folder")
    from ebr_engine.evaluation.metrics import METRICS, make_scores

    names = tuple(name for name in METRICS if name in (wanted := [part.strip() for part in request.metrics.split(",")]))
    make_scores(wanted)  # refuses what is unknown or not installed before anything is read
    items = _items(request)
    if all(item.target is None for item in items) and all(METRICS[name].needs_target for name in names):
        learned = ", ".join(name for name, metric in METRICS.items() if not metric.needs_target)
        raise EbrError(f"nothing here has a target; give --target, or --metrics that need none: {learned}")
    restoring = _restoring(request, items, tasks, prompts, how)

    from ebr_engine.evaluation.protocols import protocol_for
    from ebr_engine.evaluation.run import Row, Settings, evaluate
    from ebr_engine.evaluation.summary import notes, table, write_summary
    from ebr_engine.version import __version__

    backbone = how["backbone"] if how["backbone"] != "mini" else None
    settings = Settings(request.protocol, names, restoring, backbone)
    kinds = dict.fromkeys((item.source or item.restored).clip for item in items)
    protocol = "; ".join(protocol_for(request.protocol, backbone, clip).about for clip in kinds)
    typer.echo(f"protocol {protocol}")

    fresh: list[Row] = []

    def told(row: Row) -> None:
        fresh.append(row)
        if "error" in row:
            tell(row["error"] if row["name"] in row["error"] else f"{row['name']}: {row['error']}")
        else:
            typer.echo(f"{row['name']}  " + ("  ".join(_text(*score) for score in row["scores"].items()) or "no target"))

    how_run = {"device": device, "workers": request.workers, "resume": request.resume}
    rows = evaluate(items, settings, request.out, callback=told, **how_run)
    if len(fresh) < len(rows):
        typer.echo(f"{len(rows) - len(fresh)} of {len(rows)} file(s) were measured by an earlier run")
    about = {"protocol": protocol, "files": len(rows), **_about(restoring), "version": __version__}
    write_summary(request.out, rows, names, about)
    typer.echo("\n" + table(rows, names))
    for note in notes(rows, names):
        typer.echo(note)
    typer.echo(f"{request.out / 'scores.csv'}, summary.md, summary.json")
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _items(request: Request) -> "list[Item]":
    from ebr_engine.evaluation.paired import pair_folders, read_list

    if request.list_file:
        if request.source or request.target:
            raise EbrError("give --list, or --input and --target, not both")
        return read_list(request.list_file, request.root, request.restored, request.clips)
    if not (request.source or request.restored):
        raise EbrError("--target alone is nothing to measure; add --input, or --restored")
    return pair_folders(request.source, request.target, request.restored, request.clips, request.partial)


def _restoring(request: Request, items: "list[Item]", tasks: list[str], prompts: list[tuple[Path, float]], how: dict[str, Any]):
    """How to restore what has no result yet; None where everything has one."""
    from ebr_engine.evaluation.run import Restoring
    from ebr_engine.prompts.catalogue import AUTO, find_prompts

    missing = [item for item in items if item.restored is None]
    if not missing:
        if tasks or prompts or how["engine"]:
            raise EbrError("the results are given (--restored); leave --task, --prompt and --engine out")
        return None
    if len(missing) < len(items):
        raise EbrError(f"{missing[0].name}: has no result, others have; give results of all, or of none")
    if len(tasks) > 1:
        raise EbrError(f"one --task restores files; {len(tasks)} are given")
    if how["engine"]:
        if tasks or prompts:
            raise EbrError("an engine file holds its own prompt; leave --task and --prompt out")
        return Restoring(**how)
    task = tasks[0] if tasks else None
    if task == AUTO:
        find_prompts(how["backbone"], AUTO)  # which says why not
    asked = RestoreRequest(task=task, prompt=tuple(prompts), backbone=how["backbone"])
    prompts_of(asked)
    return Restoring(**how, task=task, prompts=tuple((str(path), weight) for path, weight in asked.prompt))


def _about(restoring: Any) -> dict[str, Any]:
    if restoring is None:
        return {"restored": "given"}
    what = restoring.engine or restoring.task or ", ".join(f"{path}:{weight:g}" for path, weight in restoring.prompts)
    model = restoring.model or restoring.backbone
    return {"restored": f"now, {model}, {what}, schedule {restoring.schedule}, seed {restoring.seed}"}


def _text(name: str, value: float) -> str:
    from ebr_engine.evaluation.metrics import METRICS

    return f"{name} {value:.{METRICS[name].digits}f}"
