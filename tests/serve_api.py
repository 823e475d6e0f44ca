"""A server on the real store with small settings, and files to upload."""

from __future__ import annotations

import io
import shutil
import struct
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from omniavatar.serve.api.addresses import Outside
from omniavatar.serve.api.app import create_app
from omniavatar.serve.api.checks import Checker, DirectChecker
from omniavatar.serve.api.models import Catalogue
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.keys import KeyStore
from omniavatar.serve.jobs.records import VIDEO, Claim, JobProgress, JobResult
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.settings import ServeSettings

MODELS = Catalogue.load(ServeSettings())
BASE = "http://127.0.0.1:8000"
MP4 = struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 512, b"isom") + bytes(range(256)) * 40


def portrait(side: int = 64) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(file, "PNG")
    return file.getvalue()


def voice(seconds: float = 0.5) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        samples = 8000 * np.sin(np.arange(round(seconds * 16000)) / 10)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


FILES = {"input_reference": ("a.png", portrait()), "audio_reference": ("a.wav", voice())}


@dataclass
class Server:
    """An app and what it stands on."""

    app: FastAPI
    client: TestClient
    store: JobStore
    files: JobFiles
    keys: KeyStore

    @property
    def folders(self) -> list[Path]:
        """Folders of all jobs' files."""
        return list(Path(self.files.place).glob("video_*"))

    def create(self, **fields: Any) -> Any:
        headers = fields.pop("headers", None)
        return self.client.post(
            "/v1/videos", data={"prompt": "A man talks", **fields}, files=FILES, headers=headers
        )

    def claim(self) -> Claim:
        claim = self.store.claim("test", ["pocket"], 60.0)
        assert claim is not None
        return claim

    def finish(self, claim: Claim | None = None) -> None:
        """Do a worker's work on the next job."""
        claim = claim or self.claim()
        self.store.heartbeat(claim, JobProgress(window=1, windows=1, steps=4, eta_seconds=0.0))
        self.files.put(claim.job.id, VIDEO, io.BytesIO(MP4))
        assert self.store.complete(claim, JobResult(VIDEO, len(MP4), 0.8, 1))


Serve = Callable[..., Server]
Clock = Callable[[], float] | None


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, to copy."""
    path = tmp_path_factory.mktemp("serve") / "jobs.db"
    JobStore.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def serve(tmp_path: Path, empty_database: Path) -> Iterator[Serve]:
    opened: list[Server] = []

    def start(
        *,
        base: str = BASE,
        outside: Outside | None = None,
        ready: bool = True,
        clock: Clock = None,
        store: type[JobStore] = JobStore,
        checker: Checker | None = None,
        models: Catalogue = MODELS,
        **values: Any,
    ) -> Server:
        settings = ServeSettings(data_dir=tmp_path, **values)
        if not (tmp_path / "jobs.db").exists():
            shutil.copy(empty_database, tmp_path)
        opened_store = store.open(settings.database_url, clock)
        files, keys = JobFiles(settings.files_place), KeyStore(opened_store.database)
        checker = checker or DirectChecker(settings.portrait_pixels, settings.voice_seconds)
        if settings.provenance_certificate is not None:
            models = Catalogue.load(settings)
        app = create_app(
            settings, opened_store, files, keys, models, checker=checker, outside=outside, ready=lambda: ready
        )
        client = TestClient(app, base_url=base, raise_server_exceptions=False)
        opened.append(Server(app, client, opened_store, files, keys))
        return opened[-1]

    yield start
    for server in opened:
        server.client.close()
        server.store.close()
