"""The server and the workers of the stress: the real API and store, an engine that only waits."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

import uvicorn

from omniavatar.serve.api.app import create_app
from omniavatar.serve.api.models import Catalogue
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.keys import KeyStore
from omniavatar.serve.jobs.records import VIDEO, JobProgress, JobResult
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.settings import ServeSettings
from serve_api import MP4

LEASE_S = 3.0


def settings(folder: Path) -> ServeSettings:
    return ServeSettings(data_dir=folder, requests_per_minute=10**9, queue_length=10**6)


def server(folder: Path, port: int) -> None:
    chosen = settings(folder)
    store = JobStore.open(chosen.database_url)
    files = JobFiles(chosen.files_place)
    app = create_app(chosen, store, files, KeyStore(store.database), Catalogue.load(chosen))
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False, backlog=2048)


def worker(folder: Path, number: str) -> None:
    """Make a job in two windows; what was completed is written down, to find one that is made twice."""
    chosen = settings(folder)
    store, files = JobStore.open(chosen.database_url), JobFiles(chosen.files_place)
    made = (folder / f"made-{number}-{os.getpid()}").open("a")
    parent = os.getppid()
    while os.getppid() == parent:  # ends with the stress
        store.requeue_expired()
        claim = store.claim(f"stub-{number}-{os.getpid()}", ["pocket"], LEASE_S)
        if claim is None:
            time.sleep(0.1)
            continue
        for window in (1, 2):
            time.sleep(0.01)
            store.heartbeat(claim, JobProgress(window=window, windows=2))
        files.put(claim.job.id, VIDEO, io.BytesIO(MP4))
        if store.complete(claim, JobResult(VIDEO, len(MP4), 0.8, 2)):
            print(claim.job.id, file=made, flush=True)


if __name__ == "__main__":
    role, place, last = sys.argv[1:]
    server(Path(place), int(last)) if role == "server" else worker(Path(place), last)
