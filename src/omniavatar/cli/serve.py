"""`omniavatar serve`: the API with its workers; `serve worker`, `serve config`, `serve keys`."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omniavatar.cli.common import JsonOption, user_errors
from omniavatar.cli.serve_keys import keys_app
from omniavatar.cli.serve_store import open_store, settings_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from omniavatar.config.schema import PipelineConfig
    from omniavatar.serve.api.models import Catalogue
    from omniavatar.serve.jobs.files import JobFiles
    from omniavatar.serve.jobs.keys import KeyStore
    from omniavatar.serve.jobs.store import JobStore
    from omniavatar.serve.jobs.workers import Workers
    from omniavatar.serve.settings import ServeSettings

SWITCH_S = 0.001
"""How long a thread of a server keeps the interpreter from one that has just got its answer of the disk."""

app = typer.Typer(
    help="Serve videos by an API like OpenAI's, with a queue that survives restarts.", rich_markup_mode=None
)
app.add_typer(keys_app, name="keys")

FileOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="YAML", help="File of server settings.")
]
HostOption = Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on. Default: 8000.")]
DataOption = Annotated[Path | None, typer.Option(help="Folder of the database and the files.")]
DatabaseOption = Annotated[str | None, typer.Option(help="URL of the job database.")]
InsecureOption = Annotated[
    bool | None, typer.Option("--insecure", help="Listen on any address without API keys.")
]
RayOption = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="ADDRESS", help="Ray cluster whose GPUs make the videos."),
]


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    config: FileOption = None,
    host: HostOption = None,
    port: PortOption = None,
    data_dir: DataOption = None,
    database: DatabaseOption = None,
    insecure: InsecureOption = None,
    ray_address: RayOption = None,
    api_only: Annotated[
        bool, typer.Option("--api-only", help="Start no workers; `omniavatar serve worker` makes the videos.")
    ] = False,
) -> None:
    """Serve the API and make its videos.

    Settings come from --config, the environment (OMNIAVATAR_SERVE_...) and the options; `serve config` lists
    them. SIGTERM finishes the running windows and keeps their jobs.
    """
    options = {
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "database": database,
        "insecure": insecure,
        "ray_address": ray_address,
    }
    context.obj = (config, options)
    if context.invoked_subcommand is None:
        from omniavatar.serve.api.reader_processes import begin_readers

        begin_readers()
        with user_errors():
            run_server(settings_of(context).settings, api_only)


@app.command("config")
def show_config(context: typer.Context, as_json: JsonOption = False) -> None:
    """Print every setting, its value and its origin."""
    with user_errors():
        loaded = settings_of(context)
        from omniavatar.cli.terminal import SafeConsole, say_json

        rows = list(loaded.rows())
        if as_json:
            say_json({name: {"value": value, "origin": origin} for name, value, origin in rows})
            return
        from rich.markup import escape
        from rich.table import Table

        from omniavatar.text import json_text

        table = Table("setting", "value", "from", box=None, pad_edge=False)
        for name, value, origin in rows:
            table.add_row(*map(escape, (name, json_text(value), origin)))
        SafeConsole().print(table)


@app.command("worker")
def worker(context: typer.Context) -> None:
    """Make videos of the queue without an API, on this or another machine."""
    with user_errors():
        settings = settings_of(context).settings
        from omniavatar.serve.api.app import check_binding
        from omniavatar.serve.api.metrics import Metrics
        from omniavatar.serve.jobs.logs import log_as_json
        from omniavatar.serve.jobs.tracing import flush
        from omniavatar.serve.settings import load_configs

        store, files, keys = open_store(settings)
        with store:
            if settings.metrics_port:
                check_binding(settings, keys)
            log_as_json(settings.log_level, "uvicorn")
            metrics = Metrics(store)
            workers = _workers(settings, store, files, load_configs(settings), metrics.ended_id)
            _drain_at_signals(workers)
            if settings.metrics_port:
                from omniavatar.serve.api.operations import create_worker_app

                ready = lambda: workers.status().ready > 0  # noqa: E731
                door = _server(
                    create_worker_app(settings, store, keys, ready, metrics), settings, settings.metrics_port
                )
                threading.Thread(target=door.run, name="metrics", daemon=True).start()
            try:
                workers.run()
            finally:
                flush(5.0)


def _check_signing(configs: dict[str, PipelineConfig]) -> None:
    """Try the certificates that workers of this process sign with. Raises ConfigError, ResourceError."""
    import logging

    for config in configs.values():
        if config.output.provenance or config.output.provenance_certificate is not None:
            from omniavatar.engine.provenance import signer_of

            for warning in signer_of(config.output).warnings:
                logging.getLogger("omniavatar.serve").warning(warning)


def local_devices(settings: ServeSettings) -> tuple[str, ...]:
    """The device of workers that need no Ray: the CPU, or the only GPU where Ray is not installed."""
    from importlib.util import find_spec

    import torch

    if settings.ray_address:
        return ()
    if settings.gpus == "cpu":
        return ("cpu",)
    only = settings.gpus == "0" or (settings.gpus == "all" and torch.cuda.device_count() == 1)
    if only and settings.gpus_per_job == 1 and find_spec("ray") is None and torch.cuda.is_available():
        return ("cuda:0",)
    return ()


def _workers(
    settings: ServeSettings,
    store: JobStore,
    files: JobFiles,
    configs: dict[str, PipelineConfig],
    on_end: Callable[[str], None] = lambda id: None,
    lease: float | None = None,
) -> Workers:
    from omniavatar.serve.batch.items import Seat
    from omniavatar.serve.jobs.engines import JobEngines, JobGroupWorker
    from omniavatar.serve.jobs.workers import WorkerRules, Workers

    _check_signing(configs)
    engines = JobEngines(configs, log_level=settings.log_level)

    def crew() -> Any:
        devices = local_devices(settings)
        if devices:
            from omniavatar.serve.jobs.process_crew import ProcessCrew

            return ProcessCrew(settings.workers if devices == ("cpu",) else 1, engines, files, Seat(devices))
        from omniavatar.serve.batch.ray_crew import RayCrew
        from omniavatar.serve.batch.seats import WorkerOptions, plan_workers
        from omniavatar.serve.jobs.worker import JobWorker

        address = settings.ray_address or None
        plan = plan_workers(WorkerOptions(settings.gpus, True, 1, settings.gpus_per_job, None, address))
        factory: Any = engines
        return RayCrew(plan.seats, plan.workers, factory, files, kinds=(JobWorker, JobGroupWorker))

    rules = WorkerRules(keep=settings.keep_seconds)
    if lease is not None:
        rules = replace(rules, lease=lease)
    return Workers(store, files, crew, list(configs), rules, on_end, settings.otlp_endpoint)


def _server(app: Any, settings: ServeSettings, port: int, **more: Any) -> Any:
    """A uvicorn server of an app. more: further arguments of `uvicorn.Config`."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=port,
            log_config=None,
            access_log=False,
            http="h11",  # which has the limit below
            server_header=False,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=65536,
            **more,
        )
    )


def _drain_at_signals(workers: Workers | None) -> None:
    """Let the first SIGTERM or Ctrl-C drain the workers, and the second one end them at once.

    uvicorn raises the signals that ended it once more. Without a handler of ours, the process would then die
    before its workers have finished their windows.
    """
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        came.append(number)
        if workers is not None:
            workers.drain() if len(came) == 1 else workers.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def run_server(
    settings: ServeSettings,
    api_only: bool = False,
    models: Catalogue | None = None,
    listening: socket.socket | None = None,
    dress: Callable[[FastAPI, KeyStore, Workers | None], None] = lambda app, keys, workers: None,
    lease: float | None = None,
    websockets: Mapping[str, Any] | None = None,
) -> None:
    """Serve until a signal.

    models: by default those of the settings.
    listening: a bound socket, instead of the settings' address.
    dress: called with the app, the keys and this process's workers, before the app answers.
    lease: seconds after which the job of a silent worker is given to another.
    websockets: arguments of `uvicorn.Config` for an app that has them.
    """
    import logging

    from omniavatar.serve.api.app import check_binding, create_app
    from omniavatar.serve.api.logs import configure
    from omniavatar.serve.api.metrics import Metrics
    from omniavatar.serve.api.models import Catalogue
    from omniavatar.serve.jobs.retention import Retention
    from omniavatar.serve.jobs.tracing import flush

    store, files, keys = open_store(settings)
    with store:
        check_binding(settings, keys)
        configure(settings.log_level, settings.audit_path)
        models, metrics = models or Catalogue.load(settings), Metrics(store)

        workers = None
        if not api_only:
            workers = _workers(settings, store, files, models.configs, metrics.ended_id, lease)

        def ready() -> bool:
            own = 0 if workers is None else workers.status().ready
            return own > 0 or store.ready_workers() > 0

        server_app = create_app(settings, store, files, keys, models, ready=ready, metrics=metrics)
        dress(server_app, keys, workers)
        server = _server(server_app, settings, settings.port, **(websockets or {}))
        retention = Retention(store, files, settings.keep_seconds, settings.keep_bytes)
        retention.start()
        sys.setswitchinterval(SWITCH_S)
        _drain_at_signals(workers)
        if workers is not None:
            workers.start()
        try:
            server.run(None if listening is None else [listening])
        finally:
            retention.stop()
            if workers is not None:
                workers.drain()
                drained = workers.join(settings.drain_seconds)
                if not drained:
                    workers.stop()
                    workers.join(30.0)
                text = "the workers have drained" if drained else "the workers were stopped within a window"
                logging.getLogger("omniavatar.serve").info(text)
            flush(5.0)
