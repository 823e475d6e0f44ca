"""`omniavatar serve` and `serve worker` as programs, with the packaged model; run by `make stress`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import av
import httpx
import pytest

from omniavatar.serve.jobs.records import JobRecord, JobStatus
from omniavatar.serve.jobs.store import JobStore
from processes import start
from serve_api import portrait, voice
from stress.programs import SERVER, free_port

pytestmark = pytest.mark.slow

WAIT_S = 600.0


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.5)


class Programs:
    """Starts programs of one data folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self.started: list[Popen[str]] = []
        self._store: JobStore | None = None

    def start(self, *arguments: str) -> Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        options = ["--data-dir", str(self._folder), "--port", str(self._port)]
        with (self._folder / "log").open("a") as log:
            command = [sys.executable, "-c", SERVER, "serve", *options, *arguments]
            self.started.append(start(command, env=environment, stderr=log))
        return self.started[-1]

    def status(self, path: str) -> int:
        """0 while nothing answers."""
        try:
            return httpx.get(f"{self.address}{path}", timeout=30).status_code
        except httpx.TransportError:
            return 0

    def submit(self, seconds: float) -> str:
        files = {"input_reference": portrait(), "audio_reference": voice(seconds)}
        fields = {"prompt": "A man talks", "num_inference_steps": "1", "seed": "3"}
        created = httpx.post(f"{self.address}/v1/videos", data=fields, files=files, timeout=30)
        assert created.status_code == 200, created.text
        return str(created.json()["id"])

    def job(self, id: str) -> JobRecord:
        if self._store is None:
            self._store = JobStore.open(f"sqlite:///{self._folder}/jobs.db")
        return self._store.get(id)

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        if self._store is not None:
            self._store.close()

    def frames(self, id: str) -> int:
        """Of the downloaded video."""
        path = self._folder / "out.mp4"
        path.write_bytes(httpx.get(f"{self.address}/v1/videos/{id}/content", timeout=30).content)
        with av.open(str(path)) as container:
            return len(list(container.decode(video=0)))


@pytest.fixture
def programs(tmp_path: Path) -> Any:
    made = Programs(tmp_path)
    yield made
    made.close()
    print((tmp_path / "log").read_text()[-5000:])


def test_a_worker_beside_a_server_makes_a_real_video_and_drains(programs: Programs) -> None:
    server = programs.start("--api-only")
    until(lambda: programs.status("/ready") == 503)
    worker = programs.start("worker")
    until(lambda: programs.status("/ready") == 200)
    id = programs.submit(0.2)
    until(lambda: programs.job(id).status is JobStatus.completed)
    assert programs.frames(id) > 5
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(WAIT_S) == 0
    until(lambda: programs.status("/ready") == 503)
    server.send_signal(signal.SIGTERM)
    assert server.wait(WAIT_S) == 0


def test_sigterm_of_a_server_finishes_the_window_and_keeps_the_job(programs: Programs) -> None:
    server = programs.start()
    until(lambda: programs.status("/ready") == 200)
    id = programs.submit(6.0)
    until(lambda: programs.job(id).window >= 1)
    server.send_signal(signal.SIGTERM)
    assert server.wait(WAIT_S) == 0
    kept = programs.job(id)
    assert kept.status is JobStatus.queued and 1 <= kept.window < kept.windows
    programs.start()
    until(lambda: programs.job(id).status is JobStatus.completed)
    assert programs.job(id).resumed_windows >= kept.window
    until(lambda: programs.status("/health") == 200)
    assert programs.frames(id) > 50
