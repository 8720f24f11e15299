"""Our own endpoints: restorations, their progress and their files; the models, health and metrics."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ebr_engine.jobs.sheet import FIELDS as SHEET_FIELDS
from ebr_engine.serve.archive import zipped
from ebr_engine.serve.guard import COOKIE, shown_token
from ebr_engine.serve.hub import Hub
from ebr_engine.serve.store import DONE, RUNNING, StoredJob
from ebr_engine.serve.uploads import ASKABLE, MOST_STEPS, request_of, sheet_request_of, shown_name, take, target_suffix
from ebr_engine.serve.view import view_of

router = APIRouter()
LOOK = 0.2  # seconds between two looks at a job that is watched
SHEET_SUFFIX = ".png"
BEAT = 15  # seconds after which a silent stream of events says that it is there


def hub_of(request: Request) -> Hub:
    return request.app.state.hub


def found(request: Request, id: str) -> StoredJob:
    """A job by its id; HTTPException 404 for one that there is not, or no longer."""
    job = hub_of(request).store.get(id)
    if job is None:
        raise HTTPException(404, "there is no such job; those that are over are kept for some time only")
    return job


def described(hub: Hub, job: StoredJob) -> dict[str, Any]:
    """A job as clients see it."""
    progress = hub.worker.progress(job.id)
    about = {name: value for name, value in job.outcome.items() if name != "has_result"}
    values: dict[str, Any] = {
        "id": job.id,
        "object": "sheet" if job.is_sheet else "restoration",
        "status": job.state,
        "name": job.name,
        "source": job.source,
        "result": job.target if job.has_result else None,
        "request": job.request,
        "created_at": job.created,
        "finished_at": job.finished,
        "progress": 1.0 if job.state == DONE else round(progress.share, 4) if progress else 0.0,
        "error": job.error,
        **about,
    }
    if progress:
        values |= {"step": progress.text, "seconds_left": None if progress.left is None else round(progress.left, 1)}
    if not job.is_over and job.state != RUNNING:
        values["ahead"] = hub.store.before(job)
    return values


async def accept(
    hub: Hub, files: list[UploadFile], values: dict[str, Any], format: str | None = None, extra: dict[str, Any] | None = None
) -> list[str]:
    """Queue uploads as a job each, all or none; the jobs' ids. `EbrError` for anything that is wrong with one."""
    hub.check_request(values)
    is_sheet = bool((extra or {}).get("sheet"))

    def store() -> list[str]:
        with hub.store.receiving() as folder:
            taken = []
            for number, upload in enumerate(files):
                name = shown_name(upload.filename, number)
                path = take(upload.file, name, folder, number, hub.settings)
                taken.append((path, SHEET_SUFFIX if is_sheet else target_suffix(path, format), name))
            return hub.store.add(taken, values, extra)

    return await run_in_threadpool(store)


def queued(hub: Hub, ids: list[str]) -> dict[str, Any]:
    """New jobs as clients see them."""
    return {"object": "list", "data": [described(hub, hub.store.get(id)) for id in ids]}


@router.post("/v1/restorations", status_code=202, tags=["restorations"])
async def restore(
    request: Request,
    files: Annotated[list[UploadFile], File(description="Pictures and clips; each becomes a job.")],
    options: Annotated[str, Form(alias="request", description='Fields of RestoreRequest as JSON, such as {"task": "haze"}.')],
    format: Annotated[str | None, Form(description="Such as png or mp4; each file's own by default.")] = None,
) -> dict[str, Any]:
    """Queue files to be restored."""
    hub = hub_of(request)
    return queued(hub, await accept(hub, files, request_of(parsed(options), not hub.is_built), format))


@router.post("/v1/sheets", status_code=202, tags=["restorations"])
async def sheets(
    request: Request,
    files: Annotated[list[UploadFile], File(description="Pictures and clips; of a clip one frame is taken.")],
    options: Annotated[str, Form(alias="request", description=f"As JSON: {', '.join(SHEET_FIELDS)}.")] = "{}",
) -> dict[str, Any]:
    """Queue files to be tried with every task, each on one sheet to choose from; what auto would choose is marked.

    A sheet is a job as a restoration is; when it is over it also tells its `tiles`: task, probability and place.
    """
    hub = hub_of(request)
    hub.check_sheets()
    return queued(hub, await accept(hub, files, sheet_request_of(parsed(options)), extra={"sheet": True}))


@router.post("/v1/restorations/{id}/again", status_code=202, tags=["restorations"])
def again(request: Request, id: str, options: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    """Queue the same file once more, without sending it: the body is the new request, such as {"task": "rain"}."""
    hub, job = hub_of(request), found(request, id)
    values = request_of(options, not hub.is_built)
    hub.check_request(values)
    return queued(hub, [hub.store.add_again(job, lambda path: target_suffix(path, None), values)])


@router.post("/v1/restorations/{id}/sheet", status_code=202, tags=["restorations"])
def sheet_of(request: Request, id: str, options: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    """Queue a sheet of the same file, without sending it: the body is as the request of `/v1/sheets`, such as {}."""
    hub, job = hub_of(request), found(request, id)
    hub.check_sheets()
    values = sheet_request_of(options)
    return queued(hub, [hub.store.add_again(job, lambda path: SHEET_SUFFIX, values, {"sheet": True})])


@router.get("/v1/restorations", tags=["restorations"])
def listed(request: Request, limit: int = 100) -> dict[str, Any]:
    """The newest jobs first."""
    hub = hub_of(request)
    return {"object": "list", "data": [described(hub, job) for job in hub.store.newest(min(max(limit, 1), 1000))]}


@router.get("/v1/restorations/{id}", tags=["restorations"])
def status(request: Request, id: str) -> dict[str, Any]:
    """One job."""
    return described(hub_of(request), found(request, id))


@router.get("/v1/restorations/{id}/events", tags=["restorations"])
async def events(request: Request, id: str) -> StreamingResponse:
    """A job's changes as server-sent events, until it is over: `data:` is the job as its status has it."""
    hub = hub_of(request)
    found(request, id)

    async def changes() -> AsyncIterator[str]:
        last, silent = None, 0.0
        while not hub.worker.stopping.is_set():
            job = hub.store.get(id)
            if job is None:
                return
            now = described(hub, job)
            if now != last:
                last, silent = now, 0.0
                yield f"event: {job.state}\ndata: {json.dumps(now)}\n\n"
            elif (silent := silent + LOOK) >= BEAT:
                silent = 0.0
                yield ": still here\n\n"
            if job.is_over:
                return
            await asyncio.sleep(LOOK)

    return StreamingResponse(changes(), media_type="text/event-stream")


@router.post("/v1/restorations/{id}/cancel", tags=["restorations"])
def cancel(request: Request, id: str) -> dict[str, Any]:
    """Cancel a job: at once if it waits, after its current step if it runs."""
    hub = hub_of(request)
    hub.worker.cancel(found(request, id).id)
    return described(hub, found(request, id))


@router.delete("/v1/restorations/{id}", status_code=204, tags=["restorations"])
def delete(request: Request, id: str) -> Response:
    """Forget a job that is over, with its files."""
    hub, job = hub_of(request), found(request, id)
    if not job.is_over:
        hub.worker.cancel(id)
    if not found(request, id).is_over:
        raise HTTPException(409, "the job runs; it was asked to stop after its current step, delete it then")
    hub.store.delete(id)
    return Response(status_code=204)


@router.get("/v1/restorations/{id}/result", tags=["restorations"])
def result(request: Request, id: str) -> FileResponse:
    """The restored file, as a command would have written it."""
    hub, job = hub_of(request), found(request, id)
    path = hub.store.path(job, job.target)
    if not job.has_result or not path.is_file():
        raise HTTPException(409 if not job.is_over else 404, job.error or f"there is no result; the job is {job.state}")
    return FileResponse(path, filename=job.result_name)


@router.get("/v1/results.zip", tags=["restorations"])
def results(
    request: Request, id: Annotated[list[str] | None, Query(description="Of these jobs; of all by default.")] = None
) -> Response:
    """All restored files in one archive, oldest first; sheets only where they are named."""
    hub = hub_of(request)
    jobs = [found(request, one) for one in id] if id else [job for job in reversed(hub.store.newest(-1)) if not job.is_sheet]
    files = [(hub.store.path(job, job.target), job.result_name) for job in jobs if job.has_result]
    if not files:
        raise HTTPException(404, "there is no result yet")
    named = {"Content-Disposition": 'attachment; filename="restored.zip"'}
    return StreamingResponse(zipped(files), media_type="application/zip", headers=named)


@router.get("/v1/restorations/{id}/view/{which}", tags=["restorations"])
def view(request: Request, id: str, which: str) -> Response:
    """The `source` or the `result` as a browser can show it: a picture reduced to 8 bit, a clip as it is. For looking only."""
    hub, job = hub_of(request), found(request, id)
    if which not in ("source", "result"):
        raise HTTPException(404, "there is source and result to view")
    path = hub.store.path(job, job.source if which == "source" else job.target)
    if not path.is_file() or (which == "result" and not job.has_result):
        raise HTTPException(404, "there is nothing to view yet")
    return view_of(path)


@router.get("/v1/models", tags=["models"])
def models(request: Request) -> dict[str, Any]:
    """The model that is loaded, with the tasks that it has prompts for."""
    hub = hub_of(request)
    about = {"id": hub.model, "object": "model", "created": 0, "owned_by": "ebr-engine"}
    return {"object": "list", "data": [{**about, "tasks": hub.tasks, "options": ASKABLE, "most_steps": MOST_STEPS}]}


@router.post("/v1/session", status_code=204, include_in_schema=False)
def session(request: Request) -> Response:
    """Give the page a cookie for the token that it shows, so that pictures and downloads work by plain links."""
    hub, token = hub_of(request), shown_token(request.headers)
    if not hub.settings.admits(token):
        raise HTTPException(401, "this is not the server's token")
    response = Response(status_code=204)
    if hub.settings.token:
        response.set_cookie(COOKIE, token or "", httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response


@router.get("/healthz", tags=["server"])
def health(request: Request) -> dict[str, str]:
    """Whether the server takes work and does it; 503 where its worker has ended."""
    worker = hub_of(request).worker
    if worker.stopping.is_set() or not worker.is_alive():
        raise HTTPException(503, "the worker has ended")
    return {"status": "ok"}


@router.get("/metrics", tags=["server"])
def metrics(request: Request) -> Response:
    """Numbers in Prometheus' format."""
    return Response(hub_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def parsed(options: str) -> Any:
    """A form's JSON; HTTPException for what is none."""
    try:
        return json.loads(options)
    except (json.JSONDecodeError, RecursionError):
        raise HTTPException(400, "the request is no JSON object") from None
