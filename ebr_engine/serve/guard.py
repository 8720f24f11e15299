"""What stands before the endpoints: who may come in, how much may be sent and how slowly, and what an error may tell.

Everything is decided from the headers, or while a body comes in, before anything of it is decoded.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ebr_engine.serve.settings import Settings, is_loopback

log = logging.getLogger("ebr_engine.serve")
COOKIE = "ebr_token"
OPEN = ("/", "/healthz", "/v1/session")  # without a token: the page itself, and nothing of what the server holds
SLOWEST = 1000  # bytes a second that a body has to come with, on average
_POLICY = "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'"


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it, which is how all endpoints tell theirs."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Guard:
    """ASGI middleware around all endpoints. `refused(status)` hears of what is turned away here."""

    def __init__(self, app: Any, settings: Settings, refused: Callable[[int], None]):
        self.app, self.settings, self.refused = app, settings, refused
        self._uploads = asyncio.Semaphore(settings.uploads)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        begun = False

        async def answer(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                _harden(MutableHeaders(scope=message), scope["path"])
            await send(message)

        async def refuse(status: int, text: str) -> None:
            self.refused(status)
            more = {"Retry-After": "5"} if status in (429, 503) else {"WWW-Authenticate": "Bearer"} if status == 401 else {}
            await JSONResponse(error_body(status, text), status, {"Connection": "close", **more})(scope, receive, answer)

        if problem := self._problem(scope, headers):
            await refuse(*problem)
            return
        waits = _has_body(scope, headers)
        if waits:
            try:
                await asyncio.wait_for(self._uploads.acquire(), self.settings.idle_seconds)
            except asyncio.TimeoutError:
                await refuse(429, "too many uploads at one time; try again")
                return
        body = _Body(receive, self.settings, self._uploads.release if waits else None)
        try:
            await self.app(scope, body, answer)
        except Exception as error:
            _log(error)
            if not begun:
                await refuse(500, "an error inside the server; its log has more")
        finally:
            body.release()

    def _problem(self, scope: Any, headers: Headers) -> tuple[int, str] | None:
        """Status and reason to turn a request away by its headers."""
        host = headers.get("host", "")
        if self.settings.token is None and not is_loopback(_name(host)):
            return 403, "this server answers to this machine's own names only"  # another name that leads here: DNS rebinding
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "requests from other sites' pages are not answered"
        if not _is_open(scope["path"]) and not self.settings.admits(shown_token(headers)):
            return 401, "show the server's token: Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            return 400, "the length of the body is no number"
        if int(length) > self.settings.upload_bytes:
            return 413, f"the request is larger than the limit of {self.settings.upload_bytes} bytes"
        return None


class _Body:
    """A request's `receive` that stops bodies which are too long or come too slowly. HTTPException for either."""

    def __init__(self, receive: Any, settings: Settings, done: Callable[[], None] | None):
        self._receive, self._settings, self._done = receive, settings, done
        self._size, self._began, self._whole = 0, time.monotonic(), False

    async def __call__(self) -> Any:
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._settings.idle_seconds)
        except asyncio.TimeoutError:
            raise HTTPException(408, "the body stopped coming", {"Connection": "close"}) from None
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._size > self._settings.upload_bytes:
            raise HTTPException(413, f"the request is larger than the limit of {self._settings.upload_bytes} bytes", _CLOSE)
        spent = time.monotonic() - self._began - self._settings.idle_seconds
        if not self._whole and spent > 0 and self._size < spent * SLOWEST:
            raise HTTPException(408, "the body comes too slowly", _CLOSE)
        if self._whole:
            self.release()
        return message

    def release(self) -> None:
        """Let the next upload in."""
        if self._done is not None:
            self._done()
            self._done = None


_CLOSE = {"Connection": "close"}


def shown_token(headers: Headers) -> str | None:
    """The token of a request: in its Authorization header, or in the page's cookie."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except Exception:  # http.cookies.CookieError, for names that cannot be
        return None
    return cookie.value if cookie else None


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith("/page/")


def _has_body(scope: Any, headers: Headers) -> bool:
    if scope["method"] in ("GET", "HEAD"):
        return False
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _harden(headers: MutableHeaders, path: str) -> None:
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    if path != "/docs":  # whose scripts FastAPI takes from another host
        headers["Content-Security-Policy"] = _POLICY
    if not path.startswith("/page/"):
        headers["Cache-Control"] = "no-store"


def _log(error: Exception) -> None:
    """The kind of an unexpected error and where it was, not its words, which may repeat something of a request."""
    log.error("unexpected %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
