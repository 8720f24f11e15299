"""Endpoints in the form of OpenAI's images and videos, for clients that speak it already; the prompt is read as tasks."""

import asyncio
import base64
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from ebr_engine.errors import EbrError
from ebr_engine.prompts.catalogue import AUTO
from ebr_engine.serve.api import LOOK, accept, delete, found, hub_of, result
from ebr_engine.serve.hub import Hub
from ebr_engine.serve.store import CANCELLED, DONE, FAILED, QUEUED, RUNNING, SKIPPED, StoredJob
from ebr_engine.serve.uploads import request_of

router = APIRouter()
FORMATS = ("png", "jpeg", "webp")
_STATUS = {QUEUED: "queued", RUNNING: "in_progress", DONE: "completed", SKIPPED: "failed", FAILED: "failed", CANCELLED: "failed"}
_SAID = {  # other words for tasks
    **dict.fromkeys(("fog", "mist", "hazy", "dehaze", "dehazing", "defog"), "haze"),
    **dict.fromkeys(("rainy", "derain", "deraining", "raindrops"), "rain"),
    **dict.fromkeys(("snowy", "desnow", "desnowing", "snowflakes"), "snow"),
    **dict.fromkeys(("blurry", "blurred", "deblur", "deblurring"), "blur"),
    **dict.fromkeys(("dark", "darkness", "low-light", "low_light", "underexposed"), "lowlight"),
    **dict.fromkeys(("automatic", "automatically"), AUTO),
}
_FILLING = frozenset(  # words around tasks that ask for nothing more
    re.findall(
        r"\S+",
        "a all an and any clean clear clip everything fix from image images in is it me my of out photo photos picture "
        "pictures please remove repair restore take that the this to up video whatever wrong",
    )
)


def tasks_of(prompt: str, known: list[str]) -> str:
    """The tasks that a prompt names, as a request has them: "remove haze and rain" → "haze+rain".

    A task as `RestoreRequest` has it, such as `rain:0.7+haze:0.3`, is taken as it is. `EbrError` lists the tasks where a word
    is left that is none of them.
    """
    text = " ".join(prompt.lower().split())
    if text and all(part.partition(":")[0].strip() in known for part in text.split("+")):
        return text.replace(" ", "")
    words = re.findall(r"[^\s,.;!+]+", text.replace("low light", "lowlight"))
    named = [_SAID.get(word, word) for word in words if word not in _FILLING or word in known]
    unknown = [word for word in named if word not in known]
    if unknown or not named:
        what = f"{unknown[0][:40]!r} is no task" if unknown else "the prompt names no task"
        raise EbrError(f"{what}; choose from: {', '.join(known)}, as in 'remove rain and haze'")
    return AUTO if AUTO in named else "+".join(dict.fromkeys(named))


@router.post("/v1/images/edits", tags=["as OpenAI"])
async def edit(
    request: Request,
    prompt: Annotated[str, Form()],
    image: Annotated[list[UploadFile] | None, File()] = None,
    images: Annotated[list[UploadFile] | None, File(alias="image[]")] = None,
    model: Annotated[str | None, Form()] = None,
    n: Annotated[int, Form()] = 1,
    size: Annotated[str, Form()] = "auto",
    response_format: Annotated[str, Form()] = "b64_json",
    output_format: Annotated[str | None, Form()] = None,
    output_compression: Annotated[int | None, Form()] = None,
    stream: Annotated[bool, Form()] = False,
    mask: Annotated[UploadFile | None, File()] = None,
) -> dict[str, Any]:
    """Restore pictures and wait for them; each keeps its own format unless `output_format` names one.

    A client that goes away cancels its jobs. Other fields of OpenAI's are ignored where they ask for nothing that we lack.
    """
    hub = hub_of(request)
    hub.check_model(model)
    _only(n == 1, "n", "1: a picture is restored in one way")
    _only(size == "auto", "size", "auto: a picture keeps its size")
    _only(response_format == "b64_json", "response_format", "b64_json")
    _only(not stream, "stream", "false")
    _only(mask is None, "mask", "absent: the whole picture is restored")
    _only(output_format in (None, *FORMATS), "output_format", f"one of {', '.join(FORMATS)}")
    values = _request(hub, prompt) | ({} if output_compression is None else {"quality": output_compression})
    uploads = [*(image or []), *(images or [])]
    _only(bool(uploads), "image", "one picture or several")
    ids = await accept(hub, uploads, request_of(values, not hub.is_built), output_format)
    try:
        jobs = [await _over(request, hub, id) for id in ids]
        data = [{"b64_json": base64.b64encode(_result(hub, job)).decode()} for job in jobs]
    finally:
        for id in ids:
            hub.worker.cancel(id)  # nothing where they are over
    return {"created": int(time.time()), "data": data}


@router.post("/v1/videos", tags=["as OpenAI"])
async def create_video(
    request: Request,
    prompt: Annotated[str, Form()],
    input_reference: Annotated[UploadFile, File()],
    model: Annotated[str | None, Form()] = None,
    seconds: Annotated[str | None, Form()] = None,
    size: Annotated[str | None, Form()] = None,
) -> dict[str, Any]:
    """Queue a clip to be restored: the `input_reference`, whole and at its own size."""
    hub = hub_of(request)
    hub.check_model(model)
    _only(seconds is None, "seconds", "absent: a clip keeps its length")
    _only(size is None, "size", "absent: a clip keeps its size")
    values = request_of(_request(hub, prompt), not hub.is_built)
    (id,) = await accept(hub, [input_reference], values, extra={"video": True, "prompt": prompt[:1000]})
    return _video(hub, found(request, id))


@router.get("/v1/videos/{id}", tags=["as OpenAI"])
def get_video(request: Request, id: str) -> dict[str, Any]:
    """How far a clip is."""
    return _video(hub_of(request), found(request, id))


@router.get("/v1/videos/{id}/content", tags=["as OpenAI"])
def video_content(request: Request, id: str) -> FileResponse:
    """The restored clip."""
    return result(request, id)


@router.delete("/v1/videos/{id}", tags=["as OpenAI"])
def delete_video(request: Request, id: str) -> dict[str, Any]:
    """Forget a clip."""
    delete(request, id)
    return {"id": id, "object": "video.deleted", "deleted": True}


def _request(hub: Hub, prompt: str) -> dict[str, Any]:
    return {} if hub.is_built else {"task": tasks_of(prompt, hub.tasks)}


def _only(met: bool, name: str, allowed: str) -> None:
    if not met:
        raise EbrError(f"{name} can only be {allowed}")


async def _over(request: Request, hub: Hub, id: str) -> StoredJob:
    """A job when it is over; HTTPException where the client has gone or the server ends."""
    while True:
        job = found(request, id)
        if job.is_over:
            return job
        if hub.worker.stopping.is_set():
            raise HTTPException(503, "the server is ending; send the request again when it is back", {"Retry-After": "10"})
        if await request.is_disconnected():
            raise HTTPException(499, "the client has gone")
        await asyncio.sleep(LOOK / 4)


def _result(hub: Hub, job: StoredJob) -> bytes:
    """The bytes of the result; HTTPException with the job's own words where there is none."""
    path = hub.store.path(job, job.target)
    if job.state == DONE and path.is_file():
        return path.read_bytes()
    raise HTTPException(400, job.error or job.outcome.get("note") or f"the job is {job.state}")


def _video(hub: Hub, job: StoredJob) -> dict[str, Any]:
    progress = hub.worker.progress(job.id)
    reason = job.error or (job.outcome.get("note") if job.state == SKIPPED else None) or job.state
    failed = _STATUS[job.state] == "failed"
    return {
        "id": job.id,
        "object": "video",
        "model": hub.model,
        "status": _STATUS[job.state],
        "progress": 100 if job.state == DONE else int(100 * progress.share) if progress else 0,
        "created_at": int(job.created),
        "completed_at": int(job.finished) if job.finished and job.state == DONE else None,
        "expires_at": int(job.finished + hub.settings.keep_seconds) if job.finished else None,
        "prompt": job.extra.get("prompt"),
        "seconds": "",  # of the input, which is not looked at for it
        "size": "",
        "remixed_from_video_id": None,
        "error": {"code": job.state, "message": reason} if failed else None,
    }
