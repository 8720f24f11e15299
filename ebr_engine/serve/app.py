"""The server: endpoints, page and worker in one process, from its start to the signal that ends it."""

import logging
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ebr_engine.errors import EbrError
from ebr_engine.serve import api, openai
from ebr_engine.serve.guard import Guard, error_body
from ebr_engine.serve.hub import Hub
from ebr_engine.serve.settings import Settings
from ebr_engine.serve.store import QueueFull, StoreFull
from ebr_engine.version import __version__

PAGE = Path(__file__).with_name("page")
MOST_CONNECTIONS = 800  # below the files that a process may usually open
RETRY = 10  # seconds after which a client may try again


def make_app(hub: Hub) -> FastAPI:
    """The application of one hub, whose worker runs while the application does."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        hub.worker.start()
        yield
        hub.close()

    app = FastAPI(title="ebr-engine", version=__version__, lifespan=life, redoc_url=None)
    app.state.hub = hub
    app.include_router(api.router)
    app.include_router(openai.router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.get("/", include_in_schema=False)(lambda: FileResponse(PAGE / "index.html"))

    def refusal(status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None) -> JSONResponse:
        if status >= 400:
            hub.metrics.refused.labels(str(status)).inc()
        return JSONResponse(error_body(status, message, code), status, headers)

    @app.exception_handler(EbrError)
    async def wrong(request: Request, error: EbrError) -> JSONResponse:
        if isinstance(error, QueueFull):
            return refusal(429, str(error), {"Retry-After": str(RETRY)}, "queue_full")
        if isinstance(error, StoreFull):
            return refusal(507, str(error), {"Retry-After": str(RETRY)}, "store_full")
        return refusal(400, " ".join(str(error).split()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")

    app.add_middleware(Guard, settings=hub.settings, refused=lambda status: hub.metrics.refused.labels(str(status)).inc())
    return app


class Server(uvicorn.Server):
    """Uvicorn that ends with code 0 when it is told to: open streams and waiting requests are let go at once."""

    def __init__(self, hub: Hub):
        self.hub = hub
        config = uvicorn.Config(
            make_app(hub),
            host=hub.settings.host,
            port=hub.settings.port,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=15,
            backlog=512,
            limit_concurrency=MOST_CONNECTIONS,
            ws="none",
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal ends it in good order; another Ctrl-C at once."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.hub.worker.stopping.set()
        threading.Thread(target=self.hub.worker.stop).start()  # takes a lock that the signal may have come in the middle of
        self.should_exit = True


def serve(settings: Settings, restorer: Any) -> None:
    """Serve until SIGTERM or Ctrl-C: the current step is finished, the queue is kept. `EbrError` where it cannot listen."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("ebr_engine.serve").setLevel(logging.INFO)
    hub = Hub(settings, restorer)
    server = Server(hub)
    try:
        server.run()
    except SystemExit:  # what uvicorn leaves with where the port is taken, after logging why
        raise EbrError(f"cannot listen on {settings.host}:{settings.port}; is another server there? choose with --port") from None
    finally:
        hub.worker.stop()
