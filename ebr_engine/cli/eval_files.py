"""The part of `ebr-engine eval` that measures a person's own files."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ebr_engine.cli.telling import tell, warnings_told
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
    weights_dir: Path | None
    empty: bool
    form: str  # of the table that is printed
    cluster: str | None = None
    cluster_cores: int = 1


def evaluate_files(request: Request, tasks: list[str], asked: RestoreRequest, seeds: tuple[int, ...]) -> None:
    """Measure, tell of every file, write the summary; exit code 1 where a file could not be measured."""
    if request.out is None:
        raise EbrError("--out is missing: the folder for scores.csv, summary.md and summary.json")
    if request.out.exists() and not request.out.is_dir():
        raise EbrError(f"{request.out}: has to be a folder")
    from ebr_engine.evaluation.metrics import METRICS, make_scores

    names = tuple(name for name in METRICS if name in (wanted := [part.strip() for part in request.metrics.split(",")]))
    make_scores(wanted, weights_dir=request.weights_dir)  # refuses what is unknown or missing before anything is read
    items = _items(request)
    if all(item.target is None for item in items) and all(METRICS[name].needs_target for name in names):
        learned = ", ".join(name for name, metric in METRICS.items() if not metric.needs_target)
        raise EbrError(f"nothing here has a target; give --target, or --metrics that need none: {learned}")
    restoring, device = _restoring(items, tasks, asked, seeds), asked.device

    from ebr_engine.backbones.registry import spec
    from ebr_engine.evaluation.pictures import write_sheets
    from ebr_engine.evaluation.protocols import protocol_for
    from ebr_engine.evaluation.provenance import data_facts, provenance, restoration_facts
    from ebr_engine.evaluation.run import Measurer, Row, Settings, evaluate, means
    from ebr_engine.evaluation.statistics import worst
    from ebr_engine.evaluation.summary import notes, score_table, write_summary
    from ebr_engine.version import __version__

    backbone = asked.backbone if spec(asked.backbone).released_size else None
    folder = request.weights_dir and str(request.weights_dir)
    settings = Settings(request.protocol, names, restoring, backbone, folder, request.empty)
    kinds = dict.fromkeys((item.source or item.restored).clip for item in items)
    protocol = "; ".join(protocol_for(request.protocol, backbone, clip).about for clip in kinds)
    typer.echo(f"protocol {protocol}")

    fresh: list[Row] = []

    def tell_row(row: Row) -> None:
        fresh.append(row)
        if "error" in row:
            tell(row["error"] if row["name"] in row["error"] else f"{row['name']}: {row['error']}")
        else:
            typer.echo(f"{row['name']}  " + ("  ".join(_text(*score) for score in row["scores"].items()) or "no target"))

    measurer = cache(lambda: Measurer(settings, device))
    how_run = {"device": device, "workers": request.workers, "resume": request.resume}
    if request.cluster:
        from ebr_engine.cluster.measure import measuring

        how = request.cluster, request.cluster_cores, settings, device
        how_run["elsewhere"] = measuring(*how, lambda text: tell(text, "note"))
    with warnings_told():
        rows = evaluate(items, settings, request.out, callback=tell_row, measurer=measurer, **how_run)
    if len(fresh) < len(rows):
        typer.echo(f"{len(rows) - len(fresh)} of {len(rows)} file(s) were measured by an earlier run")
    about = {"protocol": protocol, "files": len(rows), **_about(restoring), "version": __version__}
    facts = {"provenance": provenance(device), "data": data_facts(items)}
    facts |= {"restoration": restoration_facts(restoring, device)} if restoring else {}
    first = next(iter(means(rows, names)), None)
    shown = worst(rows, first) if first else []
    with warnings_told():
        sheets = write_sheets(request.out / "worst", items, shown, settings.to_json(), measurer)
        write_summary(request.out, rows, names, about, facts, sheets)
    typer.echo("\n" + score_table(rows, names).render(request.form))
    for note in notes(rows, names):
        typer.echo(note)
    typer.echo(f"{request.out / 'scores.csv'}, summary.md, summary.json")
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _items(request: Request) -> "list[Item]":
    """What there is to measure, without what the protocol leaves out."""
    from ebr_engine.evaluation.paired import pair_folders, read_list
    from ebr_engine.evaluation.protocols import counts

    if request.list_file:
        if request.source or request.target:
            raise EbrError("give --list, or --input and --target, not both")
        items = read_list(request.list_file, request.root, request.restored, request.clips)
    elif request.source or request.restored:
        items = pair_folders(request.source, request.target, request.restored, request.clips, request.partial)
    else:
        raise EbrError("--target alone is nothing to measure; add --input, or --restored")
    counted = [item for item in items if counts(request.protocol, item)]
    if not counted:
        raise EbrError(f"the protocol {request.protocol} counts none of these {len(items)} files")
    if len(counted) < len(items):
        typer.echo(f"{len(counted)} of {len(items)} files count: of SICE the released protocol leaves out those numbered above 3")
    return counted


def _restoring(items: "list[Item]", tasks: list[str], asked: RestoreRequest, seeds: tuple[int, ...]):
    """How to restore what has no result yet; None where everything has one."""
    from ebr_engine.evaluation.run import Restoring
    from ebr_engine.prompts.catalogue import AUTO, find_prompts

    missing = [item for item in items if item.restored is None]
    if not missing:
        if tasks or asked.prompt or asked.engine:
            raise EbrError("the results are given (--restored); leave --task, --prompt and --engine out")
        if len(seeds) > 1:
            raise EbrError("the results are given (--restored); --seeds restores by several seeds")
        return None
    if len(missing) < len(items):
        raise EbrError(f"{missing[0].name}: has no result, others have; give results of all, or of none")
    if len(tasks) > 1:
        raise EbrError(f"one --task restores files; {len(tasks)} are given")
    if asked.engine and (tasks or asked.prompt):
        raise EbrError("an engine file holds its own prompt; leave --task and --prompt out")
    request = asked.with_(task=tasks[0] if tasks else None)
    if request.task == AUTO:
        find_prompts(request.backbone, AUTO)  # which says why not
    prompts_of(request)
    return Restoring(request, seeds)


def _about(restoring: Any) -> dict[str, Any]:
    if restoring is None:
        return {"restored": "given"}
    request, seeds = restoring.request, restoring.seeds
    what = request.engine or request.task or ", ".join(f"{path}:{weight:g}" for path, weight in request.prompt)
    model = f"{request.model or request.backbone}, {what}, schedule {request.schedule}"
    return {"restored": f"now, {model}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"}


def _text(name: str, value: float) -> str:
    from ebr_engine.evaluation.metrics import METRICS

    return f"{name} {value:.{METRICS[name].digits}f}"
