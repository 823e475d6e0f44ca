"""What operators ask a server or a worker: whether it lives, whether it is ready, its metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from omniavatar import __version__
from omniavatar.errors import OmniAvatarError
from omniavatar.serve.api import errors
from omniavatar.serve.api.access import ADMIN, Access
from omniavatar.serve.api.guard import Guard
from omniavatar.serve.api.metrics import Metrics
from omniavatar.serve.api.videos import ERRORS
from omniavatar.serve.jobs.keys import KeyStore
from omniavatar.serve.jobs.rates import Rates
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.settings import ServeSettings


def operations(access: Access, store: JobStore, ready: Callable[[], bool], metrics: Metrics) -> APIRouter:
    """The routes /health, /ready and /metrics."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @router.get("/ready", responses={503: {"description": "Not ready."}})
    def is_ready() -> JSONResponse:
        """Whether the database answers and a model is loaded."""
        problem = _ready_problem(store, ready())
        body = {"status": "ready"} if problem is None else {"status": "not ready", "reason": problem}
        return JSONResponse(body, 200 if problem is None else 503)

    @router.get("/metrics", responses={**ERRORS, 200: {"content": {"text/plain": {}}}})
    def prometheus(request: Request) -> Response:
        """Prometheus metrics; a server with keys asks for one of the scope admin."""
        access.caller(request, ADMIN)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def create_worker_app(
    settings: ServeSettings, store: JobStore, keys: KeyStore, ready: Callable[[], bool], metrics: Metrics
) -> FastAPI:
    """The app of `omniavatar serve worker`, which serves these routes only."""
    rates = Rates(store.database)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        rates.start()
        try:
            yield
        finally:
            rates.stop()

    app = FastAPI(
        title="omniavatar worker", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    errors.install(app)
    app.include_router(operations(Access(settings, keys, rates), store, ready, metrics))
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    return app


def _ready_problem(store: JobStore, workers_ready: bool) -> str | None:
    """Why videos cannot be made now; None if they can."""
    try:
        store.ping()
    except OmniAvatarError:
        return "the job database does not answer"
    return None if workers_ready else "no worker has a model loaded yet"
