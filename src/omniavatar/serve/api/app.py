"""Puts the API together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from omniavatar import __version__
from omniavatar.errors import ConfigError
from omniavatar.serve.api import errors
from omniavatar.serve.api.access import READ, Access
from omniavatar.serve.api.addresses import Outside
from omniavatar.serve.api.checks import Checker, ProcessChecker
from omniavatar.serve.api.guard import Guard
from omniavatar.serve.api.load import QueueLoad
from omniavatar.serve.api.logs import trace
from omniavatar.serve.api.metrics import Metrics
from omniavatar.serve.api.models import Catalogue
from omniavatar.serve.api.operations import operations
from omniavatar.serve.api.replies import ListedModel, ModelList, size_text
from omniavatar.serve.api.service import Service
from omniavatar.serve.api.videos import ERRORS, videos
from omniavatar.serve.api.webhooks import Webhooks
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.keys import KeyStore
from omniavatar.serve.jobs.rates import Rates
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.settings import ServeSettings


def check_binding(settings: ServeSettings, keys: KeyStore) -> None:
    """Raise ConfigError if the address can be reached from elsewhere and nothing asks for keys."""
    if not settings.is_loopback and not settings.insecure and not keys.any_valid():
        raise ConfigError(
            f"host {settings.host}: other machines could use this server without a key; add one with "
            "`omniavatar serve keys add NAME`, or start it with --insecure"
        )


def create_app(
    settings: ServeSettings,
    store: JobStore,
    files: JobFiles,
    keys: KeyStore,
    models: Catalogue,
    *,
    checker: Checker | None = None,
    outside: Outside | None = None,
    ready: Callable[[], bool] = lambda: True,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The app of a server.

    checker, outside: how uploads are checked, and how other servers are reached; by default as configured.
    ready: whether a worker has a model loaded. Raises StoreError.
    """
    checker = checker or ProcessChecker(
        settings.check_processes, settings.check_seconds, settings.portrait_pixels, settings.voice_seconds
    )
    outside = outside or Outside(settings.private_urls)
    metrics = metrics or Metrics(store)
    hooks = Webhooks(store, outside, settings.webhook_secret, settings.webhook_tries)
    rates = Rates(store.database)
    load = QueueLoad(store, settings.poll_after_ms, settings.polls_per_second)
    service = Service(
        settings, store, files, Access(settings, keys, rates), models, checker, outside, hooks, metrics, load
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(checker.start)
        rates.start()
        if settings.webhook_secret:
            hooks.start()
        try:
            yield
        finally:
            hooks.stop()
            rates.stop()
            checker.close()
            outside.close()

    app = FastAPI(title="omniavatar", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    if settings.otlp_endpoint:
        trace(app, settings.otlp_endpoint)
    app.state.service = service
    errors.install(app)
    app.include_router(videos(service))

    @app.get("/v1/models", responses=ERRORS)
    def list_models(request: Request) -> ModelList:
        """The configured models; the first is the default."""
        service.access.caller(request, READ)
        found = [
            ListedModel(id=name, sizes=[size_text(size) for size in config.video.sizes], fps=config.video.fps)
            for name, config in models.configs.items()
        ]
        return ModelList(data=found)

    app.include_router(operations(service.access, store, ready, metrics))

    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            expose_headers=["openai-poll-after-ms", "x-request-id"],
        )
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    return app
